"""Slot `schedule`: how fast a goal is approached, `(progress 0..1) -> part of the way 0..1`."""
