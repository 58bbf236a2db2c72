"""Grids: `(site, bits) -> Form` for a weight; DoReFa brings its activations and gradients along."""
