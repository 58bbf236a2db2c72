"""Slot `plan`: the stages in which a student learns features, outputs and labels, `() -> stages`."""
