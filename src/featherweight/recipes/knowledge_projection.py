"""Knowledge projection: which layer of the teacher, projected, guides which layer of the student is found by trying."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, final

from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import fill, recipe
from featherweight.core.features import exact, features, rows, same_size
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note, show
from featherweight.core.task import Batch, Task, device_of, eval_mode, first, loss_of, to_device
from featherweight.core.taught import teacher_of
from featherweight.distill import Term, learn, named, tapped
from featherweight.errors import BadOption

Direction = Literal["t2s", "s2t"]


@final
class Projection(nn.Module):
    """`1/B sum_x h(x) mean (F_S - P(F_T))^2`: P, trained along, makes the teacher's channels the student's.

    Args:
        guided, hint: the student's and the teacher's layer.
        ours, theirs: one batch of what the two put out.
        direction: P projects the teacher's features (t2s), or the student's (s2t).
        gated: h leaves out the samples whose class the teacher does not know.
    """

    def __init__(
        self, guided: str, hint: str, ours: Tensor, theirs: Tensor, direction: Direction = "t2s", gated: bool = False
    ) -> None:
        super().__init__()
        self.guided, self.hint, self.direction, self.gated = guided, hint, direction, gated
        pair = (theirs, ours) if direction == "t2s" else (ours, theirs)
        self.project = fill("adapter", "one_by_one_match")(*pair).to(ours)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Any, progress: float
    ) -> Tensor:
        ours, theirs = student[self.guided], teacher[self.hint].detach()
        if ours.dim() == 4:
            ours, theirs = same_size(ours, theirs)
        a, b = (ours, self.project(theirs)) if self.direction == "t2s" else (self.project(ours), theirs)
        gaps = exact(a - b).square().flatten(1).mean(1)
        return (gaps * self.gate(teacher[""], batch)).mean() if self.gated else gaps.mean()

    def gate(self, logits: Tensor, batch: Any) -> Tensor:
        """1 where the teacher knows the class, else 0.

        Raises:
            BadOption: there is no class for each sample.
        """
        last = batch.get("labels") if isinstance(batch, dict) else batch[-1]
        if not isinstance(last, Tensor) or last.shape != logits.shape[:1] or last.is_floating_point():
            raise BadOption(
                "gated=True asks whether the teacher knows a sample's class: pass batches (inputs, classes)"
            )
        return (rows(logits).argmax(1) == last.to(logits.device)).float()


@recipe(
    paper="Zhang, Ning and He, 2017, arXiv:1710.09505",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"layers": 2, "search_epochs": 0.34, "epochs": 1},
)
def knowledge_projection(
    model: nn.Module,
    task: Task,
    *,
    layers: Count = 3,
    direction: Direction = "t2s",
    gated: bool = False,
    weight: Positive = 1.0,
    search_epochs: Amount = 1,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains every pair of layers for a little, drops the worse half until one is left, then trains that one.

    The loss is `H(y, p_S) + alpha L_proj`, alpha falling to 0; pairs are ranked by it on the validation data.
    Source: Knowledge Projection for Effective Design of Thinner and Faster Deep Neural Networks.

    Departs from the paper: pairs are ranked on held-out data, as the training loss favours shallow ones; each round
    starts from where the pair's last one ended and the final training from the student as it was given; the mean over
    units in place of the sum; maps of unequal size are pooled to the smaller; whether the paper gates samples is not
    settled (off). Projecting the teacher's features has the trivial solution 0, from which the labels keep the student.

    Args:
        layers: how many of each network's layers are tried, evenly spread.
        direction: t2s projects the teacher's features to the student's, s2t the other way round.
        gated: leave out the samples whose class the teacher does not know.
        weight: alpha at the start.
        search_epochs: passes of each pair in each round.
        epochs: passes of the final training.
        lr: learning rate.
        optimizer: as in `fit`.

    Raises:
        BadOption: no two layers can be joined.
    """
    teacher = teacher_of(model, task)
    batch = first(task.calibrating(), "training")
    alive = {pair: copy.deepcopy(model.state_dict()) for pair in candidates(model, teacher, task, batch, layers)}
    start, rounds = copy.deepcopy(model.state_dict()), []
    options: dict[str, Any] = {"lr": lr, "optimizer": optimizer}
    matches = {pair: projection(model, teacher, task, batch, pair, direction, gated) for pair in alive}
    while len(alive) > 1:
        losses = {}
        for pair, state in list(alive.items()):
            model.load_state_dict(state)
            learn(model, task, {"projection": Term(matches[pair], weight, [pair])}, epochs=search_epochs, **options)
            alive[pair] = copy.deepcopy(model.state_dict())
            losses[pair] = held_out(model, teacher, task, matches[pair], pair, weight)
        best = sorted(alive, key=losses.__getitem__)[: len(alive) // 2]
        rounds.append({f"{a} <- {b}": loss for (a, b), loss in losses.items()})
        alive = {pair: alive[pair] for pair in best}
    ((guided, hint),) = alive
    show("knowledge_projection", rounds)
    note(f"of {len(matches)} pairs the teacher's layer {hint} guides the student's layer {guided}")
    model.load_state_dict(start)
    chosen = projection(model, teacher, task, batch, (guided, hint), direction, gated)
    terms = {"projection": Term(chosen, lambda progress: weight * (1 - progress), [(guided, hint)])}
    return learn(model, task, terms, epochs=epochs, **options)


def candidates(model: nn.Module, teacher: nn.Module, task: Task, batch: Batch, count: int) -> list[tuple[str, str]]:
    """Pairs of the networks' layers, `count` of each, evenly spread, that can be joined.

    Raises:
        BadOption: there is none.
    """
    ours, theirs = features(model, task, batch), features(teacher, task.of_teacher(), batch)
    pairs = [(a, b) for a in spread(list(ours), count) for b in spread(list(theirs), count)]
    fit = [
        (a, b) for a, b in pairs if len(ours[a]) == len(theirs[b]) and (len(ours[a]) != 3 or ours[a][1] == theirs[b][1])
    ]
    if not fit:
        raise BadOption(
            "no layer of the student has the shape of one of the teacher's, maps for maps and vectors for vectors: "
            "choose a method that compares samples, such as rkd"
        )
    return fit


def spread(paths: list[str], count: int) -> list[str]:
    """`count` of the paths, evenly spread and with the last.

    >>> spread(["a", "b", "c", "d", "e", "f"], 3)
    ['b', 'd', 'f']
    """
    count = min(count, len(paths))
    return [paths[-1 - round(i * len(paths) / count)] for i in range(count)][::-1]


def projection(
    model: nn.Module,
    teacher: nn.Module,
    task: Task,
    batch: Batch,
    pair: tuple[str, str],
    direction: Direction,
    gated: bool,
) -> Projection:
    """The term of one pair, its projection for the shapes of one batch."""
    named(model, [pair[0]], "student")
    with eval_mode(model), eval_mode(teacher):
        ours = tapped(model, model, task, batch, [pair[0]])[0][pair[0]]
        theirs = tapped(teacher, teacher, task.of_teacher(), batch, [pair[1]])[0][pair[1]]
    return Projection(*pair, ours, to_device(theirs, device_of(model)), direction, gated)


def held_out(
    model: nn.Module, teacher: nn.Module, task: Task, match: Projection, pair: tuple[str, str], weight: float
) -> float:
    """The mean joint loss over the validation batches."""
    losses = []
    with eval_mode(model), eval_mode(teacher):
        for batch in task.valid:
            seen, output, target = tapped(model, model, task, batch, [pair[0]])
            shown = to_device(tapped(teacher, teacher, task.of_teacher(), batch, [pair[1]])[0], device_of(model))
            losses.append(float(loss_of(task, output, target) + weight * match(seen, shown, batch, 1.0)))
    return sum(losses) / max(1, len(losses))
