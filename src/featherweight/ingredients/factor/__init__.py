"""Slot `factor`: what a layer becomes, `(layer, ranks, *, sweeps) -> nn.Module` of thinner ordinary layers."""
