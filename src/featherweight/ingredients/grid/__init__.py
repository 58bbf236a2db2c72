"""Slot `grid`: which values a weight may take, `(site, bits) -> Form`; with slot `gradient`, `(bits) -> Form`."""
