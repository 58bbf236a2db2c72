"""Slot `adapter`: joins features of unequal widths, `(student's, teacher's) -> module`; trained along, then dropped."""
