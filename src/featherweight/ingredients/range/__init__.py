"""Slot `range`: where an activation grid ends, `(what was seen, bits) -> Form`."""
