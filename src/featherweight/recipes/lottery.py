"""Lottery tickets: prune what was trained, go back to where training began, train what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor, nn

from featherweight.allowed import Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import DECAYS, Optimizers
from featherweight.core.ledger import note
from featherweight.core.masks import hidden, largest, masks, set_masks, settle, told
from featherweight.core.restart import reinitialise
from featherweight.core.site import PerLayer, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.errors import BadOption
from featherweight.prune import ranks_apart

Whole = Annotated[int, Ge(0)]


def rewinds_into_the_run(options: Mapping[str, Any]) -> None:
    """Refuses to go back to an epoch that training does not reach."""
    if options["rewind"] >= options["epochs"]:
        raise BadOption(f"rewind={options['rewind']} must be below epochs={options['epochs']}: that is where it ends")


@recipe(
    paper="Frankle and Carbin, ICLR 2019, arXiv:1803.03635; Renda et al., ICLR 2020, arXiv:2003.02389",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    rules=(ranks_apart, rewinds_into_the_run),
    small={"epochs": 1, "rate": 0.5},
)
def lottery(
    model: nn.Module,
    task: Task,
    *,
    sparsity: PerLayer[Fraction] = 0.8,
    rate: Fraction = 0.2,
    scope: Literal["layer", "global"] = "layer",
    survivors: Literal["rewound", "kept", "redrawn"] = "rewound",
    rewind: Whole = 0,
    start: Literal["redrawn", "given"] = "redrawn",
    epochs: Count = 10,
    lr: Positive = 0.05,
    optimizer: Optimizers = "sgd",
    where: WhereWeighted = None,
) -> nn.Module:
    """Trains, removes the smallest weights, sets the others back to what they were in epoch `rewind`, trains again.

    Jonathan Frankle, Michael Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR
    2019: with `rewind=0`, survivors go back to theta_0. Alex Renda, Jonathan Frankle, Michael Carbin, "Comparing
    Rewinding and Fine-tuning in Neural Network Pruning", ICLR 2020: with `rewind=k`, weights and learning rate go back
    to epoch k; with `survivors="kept"`, the learning rate alone does. The control of the first, the ticket's mask on
    weights that are drawn at random again before the last training, is `survivors="redrawn"`.

    The theta_0 of a network that comes trained is not known. By default its weights are therefore drawn anew, from each
    module's own `reset_parameters`, and it is trained first; with `start="given"` what comes is theta_0, for a network
    that was just initialised.

    Departs from the paper: output layers are pruned at the same rate as the others unless `sparsity` is a mapping (the
    paper halves it); the optimizer's momentum starts from zero after going back; batches come in another order in every
    training; what an earlier method masked stays masked. Batch-norm statistics and biases go back too, as in the paper.

    Args:
        sparsity: fraction of the weights removed in the end; or layer patterns with a fraction each, ranked apart.
        rate: fraction of the remaining weights removed in a round, at most: as many rounds as it takes, all removing
            the same fraction of what remains.
        scope: "layer" ranks every layer's weights apart, "global" together.
        survivors: what is left is "rewound" to epoch `rewind`, "kept" as trained (the learning rate is rewound alone),
            or "redrawn" at random: rewound in every round but the last, which is the control.
        rewind: the epoch whose weights, and learning rate, are gone back to.
        start: "redrawn" draws initial weights anew and trains them; "given" takes those that come for the initial ones.
        epochs: of every training, in which the learning rate falls to zero.
        lr: learning rate at the start of every training.
        optimizer: "sgd" (default), "adam" or "adamw".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range, `rewind` not below `epochs`, a model that cannot draw new weights, or a
            training loop that does not say when epochs begin.
        UnknownName: a pattern matches nothing.
    """
    found, goals = per_layer(model, "sparsity", sparsity, where)
    allowed, early = masks(found), dict[str, Tensor]()
    set_masks(model, found, allowed)
    if start == "redrawn":
        reinitialise(model)

    def remember(epoch: int) -> None:
        if epoch == rewind:
            early.update({name: value.clone() for name, value in model.state_dict().items()})

    task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, before_epoch=remember, label="train the dense")
    if not early:
        raise BadOption(
            "the task's own fit never calls before_epoch(epoch), so that no weights are known to go back to"
        )
    rounds = rounds_for(max(goals.values()), rate)
    for turn in range(1, rounds + 1):
        now = {path: 1 - (1 - goal) ** (turn / rounds) for path, goal in goals.items()}
        size = {path: hidden(site).abs() for path, site in found.items()}
        keep = largest(size, now, within=masks(found), together=scope == "global")
        if survivors != "kept":
            model.load_state_dict(early)
        set_masks(model, found, keep)
        if control := survivors == "redrawn" and turn == rounds:  # the ticket's own mask, on other weights
            reinitialise(model)
        done = 0.0 if control else rewind / epochs
        task.fit(model, task, epochs=epochs * (1 - done), lr=lr, optimizer=optimizer, decay=late(done),
                 label=f"train the ticket {turn}/{rounds}")  # fmt: skip
    settle(model, found)
    note(f"{rounds} rounds, {told(found)}")
    return model


def rounds_for(sparsity: float, rate: float) -> int:
    """In how many rounds a sparsity is reached if each removes at most `rate` of what remains.

    >>> rounds_for(0.8, 0.2), rounds_for(0.2, 0.2), rounds_for(0.0, 0.2)
    (8, 1, 1)
    """
    return max(1, math.ceil(math.log(1 - sparsity) / math.log(1 - rate) - 1e-9)) if rate else 1


def late(done: float) -> Callable[[float], float]:
    """The cosine schedule of the learning rate from where a share of the run is done."""
    return lambda progress: DECAYS["cosine"](done + (1 - done) * progress)
