"""Clusterings of numbers: `(values, centroids to start from) -> centroids`."""
