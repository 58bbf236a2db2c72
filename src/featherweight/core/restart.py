"""Training anew: fresh weights in the same network, and an optimizer that outlives a removal of channels."""

from __future__ import annotations

from typing import final

from torch import nn
from torch.optim import Optimizer

from featherweight.core.fit import Optimizers, make_optimizer
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.ledger import note


def reinitialise(model: nn.Module) -> nn.Module:
    """Draws every layer's weights anew, in place, as its own `reset_parameters` does; masks stay where they are.

    Modules that hold parameters of their own and have no such method keep what they have, and that is noted.
    """
    masked = masked_names(model)
    kept = {(path, name): (getattr(model.get_submodule(path), name) != 0) for path, name in masked}
    bake(model)
    for path, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif any(p is not None for p in module._parameters.values()):
            note(f"{path or 'the model'} ({type(module).__name__}) cannot draw its parameters anew: they stay")
    for (path, name), keep in kept.items():
        tensor = getattr(model.get_submodule(path), name)
        tensor.data.mul_(keep)
    mask_zeros(model, masked)
    return model


@final
class Carried:
    """Makes one optimizer and hands it back at every further fit, so that momentum outlives a removal of channels.

    Pass it as `optimizer=` to several fits of one model, and `carried.held` to `remove_channels`. Parameters that came
    in the meantime are added; the learning rate is the new fit's.
    """

    def __init__(self, optimizer: Optimizers) -> None:
        self.make = optimizer
        self.held: Optimizer | None = None

    def __call__(self, params: list[nn.Parameter], lr: float) -> Optimizer:
        if self.held is None:
            self.held = make_optimizer(self.make, params, lr)
            return self.held
        wanted = {id(p) for p in params}
        for group in self.held.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in wanted]
            group["lr"] = lr
        known = {id(p) for group in self.held.param_groups for p in group["params"]}
        if fresh := [p for p in params if id(p) not in known]:
            self.held.param_groups[0]["params"].extend(fresh)
        for gone in [p for p in self.held.state if id(p) not in wanted]:
            del self.held.state[gone]
        return self.held
