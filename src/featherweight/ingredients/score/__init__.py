"""Slot `score`: what a weight is worth, `(site) -> tensor of the weight's shape`; what scores lowest goes first."""
