"""Schedules: `(progress 0..1) -> part of the way 0..1` from the first sparsity to the last."""
