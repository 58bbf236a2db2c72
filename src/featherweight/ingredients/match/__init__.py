"""Slot `match`: how far a student is from its teacher, `(student's taps, teacher's taps, batch, progress) -> loss`."""
