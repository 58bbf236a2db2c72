"""Slot `start`: where a clustering starts, `(values, k) -> centroids`, ascending."""
