"""Starting over: new initial weights for a network that is already trained."""

from __future__ import annotations

from torch import nn

from featherweight.core.forms import Mask, attach, bake, mask_of, masked_names, own_modules
from featherweight.core.ledger import note
from featherweight.errors import BadOption

RESETS = ("reset_parameters", "_reset_parameters")  # torch's attention calls its own by the second name


def reinitialise(model: nn.Module) -> nn.Module:
    """Draws every module's initial weights anew, in place, from the module's own `reset_parameters`; masks stay.

    The draws come from torch's global generator. Parameters that no module resets are noted and stay as they are;
    quantized and shared weights become plain ones.

    Raises:
        BadOption: no module of the model can draw new weights.
    """
    held = {(path, name): mask_of(model.get_submodule(path), name) for path, name in masked_names(model)}
    bake(model)
    drawn: set[int] = set()
    for _, module in own_modules(model):
        for name in RESETS:
            if callable(reset := getattr(module, name, None)):
                reset()
                drawn |= {id(p) for p in module.parameters(recurse=name == "_reset_parameters")}
                break
    if not drawn:
        raise BadOption("no module of the model has a reset_parameters(): pass a model with initial weights instead")
    if left := [name for name, p in model.named_parameters() if id(p) not in drawn]:
        note(f"no module draws new initial weights for {', '.join(left)}: they stay as they are")
    for (path, name), keep in held.items():
        if keep is not None:
            attach(model.get_submodule(path), Mask(keep), at=name, root=model)
    return model
