"""The control of structured pruning: the pruned network, its weights drawn anew, trained as long as the large one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import Entry, check_options, entries, entry, recipe
from featherweight.core.cost import cost
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake
from featherweight.core.ledger import note
from featherweight.core.restart import reinitialise
from featherweight.core.task import Task
from featherweight.errors import BadOption


def removes_channels(options: Mapping[str, Any]) -> None:
    """Refuses a method that does not change the network's shape, and options that it does not have."""
    if options["method"] is not None:
        check_options(structured(options["method"]), options["options"] or {})
    elif options["options"]:
        raise BadOption(f"options={options['options']!r} are those of a method: name it, or leave them out")


@recipe(
    paper="Liu et al., ICLR 2019, arXiv:1810.05270",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"options": {"prune_ratio": 0.5, "round_to": 1}, "epochs": 2, "lr": 0.02},
    rules=(removes_channels,),
)
def scratch_retrain(
    model: nn.Module,
    task: Task,
    *,
    method: str | None = "pfec_l1",
    options: Mapping[str, Any] | None = None,
    budget: Literal["E", "B"] = "B",
    most: Positive | None = None,
    epochs: Amount = 160,
    lr: Positive = 0.1,
    optimizer: Optimizers = "sgd",
) -> nn.Module:
    """Prunes by any method that removes channels, forgets all weights, and trains what is left from scratch.

    Zhuang Liu, Mingjie Sun, Tinghui Zhou, Gao Huang, Trevor Darrell, "Rethinking the Value of Network Pruning",
    ICLR 2019: with the same epochs as the large network had (Scratch-E), or with the same computation, that is
    `epochs * MACs(large) / MACs(pruned)` (Scratch-B), the pruned network trained from random weights is the control
    without which fine-tuning proves nothing. Behind another method in a chain, `method=None` takes the network as that
    method left it; the large one is then the chain's original.

    Departs from the paper: weights are drawn by each layer's own rule, where the paper draws He's; the learning rate
    falls along a cosine, where the paper's falls in steps; the computation is that of a forward pass, of convolutions
    and products; the authors never train more than twice as long (`most=2`).

    Args:
        method: the id of a method that removes channels, whose fine-tuning is left out; or None.
        options: of that method; its defaults when left out.
        budget: "E" as many epochs as are given, "B" as much computation as the large network had with them.
        most: the most by which "B" multiplies epochs; no limit when left out.
        epochs: what the large network was trained.
        lr: learning rate, falling to zero.
        optimizer: as in `fit`.

    Raises:
        UnknownName: there is no such method.
        BadOption: a method that removes no channels; a network that cannot draw weights anew.
    """
    large = macs(model if method is not None or task.teacher is None else task.teacher, task)
    if method is not None:
        found = structured(method)
        given = {name: 0 for name in ("finetune",) if any(option.name == name for option in found.options())}
        model = found(model, task, **{**given, **(options or {})})
    pruned = macs(reinitialise(model), task)
    factor = max(1.0, large / pruned) if budget == "B" else 1.0
    factor = factor if most is None else min(factor, max(1.0, most))
    note(f"Scratch-{budget}: {epochs:g} epochs times {factor:.3g}, of {large:,} MACs {pruned:,} are left")
    return task.fit(model, task, epochs=epochs * factor, lr=lr, optimizer=optimizer, label=f"Scratch-{budget}")


def macs(model: nn.Module, task: Task) -> int:
    """Of one sample, whatever forms the model holds."""
    return cost(bake(copy.deepcopy(model)), task.inputs()).macs


def structured(name: str) -> Entry:
    """The method of this id.

    Raises:
        UnknownName: there is none.
        BadOption: it removes no channels.
    """
    found = entry(name, "method")
    if "channels" not in found.shrinks or name == "scratch_retrain":
        known = [i for i, one in entries("method").items() if "channels" in one.shrinks and i != "scratch_retrain"]
        raise BadOption(
            f"method={name!r} removes no channels, so that its network is as it was: use {', '.join(known)}"
        )
    return found
