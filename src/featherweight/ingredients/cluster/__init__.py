"""Slot `cluster`: how numbers are grouped, `(values, centroids to start from) -> centroids`, ascending."""
