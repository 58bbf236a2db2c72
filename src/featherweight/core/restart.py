"""Training anew: fresh weights in the same network, and an optimizer that outlives a removal of channels."""

from __future__ import annotations

from typing import final

from torch import nn
from torch.optim import Optimizer

from featherweight.core.fit import Optimizers, make_optimizer
from featherweight.core.forms import Mask, attach, bake, mask_of, masked_names, own_modules
from featherweight.core.ledger import note
from featherweight.errors import BadOption

RESETS = ("reset_parameters", "_reset_parameters")  # torch's attention calls its own by the second name


def reinitialise(model: nn.Module) -> nn.Module:
    """Draws every layer's weights anew, in place, as its own `reset_parameters` does; masks stay where they are.

    The draws come from torch's global generator. Parameters that no module draws stay as they are, and that is noted;
    quantized and shared weights become plain ones.

    Raises:
        BadOption: no module of the model can draw new weights.
    """
    kept = {(path, name): mask_of(model.get_submodule(path), name) for path, name in masked_names(model)}
    drawn: set[int] = set()
    for _, module in own_modules(bake(model)):
        for name in RESETS:
            if callable(reset := getattr(module, name, None)):
                reset()
                drawn |= {id(p) for p in module.parameters(recurse=name == "_reset_parameters")}
                break
    if not drawn:
        raise BadOption("no module of the model has a reset_parameters(): pass a model with initial weights instead")
    if left := [name for name, p in model.named_parameters() if id(p) not in drawn]:
        note(f"no module draws new initial weights for {', '.join(left)}: they stay as they are")
    for (path, name), keep in kept.items():
        if keep is not None:
            attach(model.get_submodule(path), Mask(keep), at=name, root=model)
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
