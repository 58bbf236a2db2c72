"""Slot `place`: which tensors carry activation grids, `(model, task, layers) -> list[Place]`."""
