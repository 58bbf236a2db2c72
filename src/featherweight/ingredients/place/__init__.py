"""Places: `(model, task, layers) -> list[Place]`, the tensors that carry activation grids."""
