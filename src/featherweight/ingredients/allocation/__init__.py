"""Slot `allocation`: how much of each layer goes, `(curves, fraction of the whole) -> ratio of every layer`."""
