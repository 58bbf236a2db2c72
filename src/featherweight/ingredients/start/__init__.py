"""Where a clustering starts: `(values, k) -> centroids`, ascending."""
