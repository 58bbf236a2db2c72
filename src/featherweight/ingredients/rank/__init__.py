"""Slot `rank`: how many components of a matrix are kept, `(matrix) -> int`."""
