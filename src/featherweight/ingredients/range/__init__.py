"""Ranges: `(what was seen, bits) -> ActivationGrid`."""
