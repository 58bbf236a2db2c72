"""Deep mutual learning: students teach one another while they learn, and no teacher is there before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core import processes
from featherweight.core.fit import Optimizers, Step
from featherweight.core.ledger import note
from featherweight.core.peers import fresh, predicted
from featherweight.core.task import Batch, Task, device_of, loss_of, prediction, run, to_device
from featherweight.errors import BadOption
from featherweight.ingredients.match.softened import softened


@recipe(
    paper="Zhang, Xiang, Hospedales and Lu, CVPR 2018, arXiv:1706.00384",
    family="distill",
    needs={"labels", "train"},
    small={"epochs": 1},
)
def dml(
    model: nn.Module,
    task: Task,
    *,
    peers: Sequence[nn.Module] | None = None,
    cohort: Count = 2,
    weight: Amount = 1.0,
    update: Literal["alternating", "simultaneous"] = "alternating",
    spread: Literal["batches", "networks"] = "batches",
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains K networks on `L_k = H(y, p_k) + 1 / (K - 1) sum_{l != k} KL(p_l || p_k)` (eq. 6); the first is returned.

    They take turns at every batch, each with the newest predictions of the others (algorithm 1), or move at once.

    Departs from the paper: the first network starts from the weights given, its peers from new ones; Adam and fewer
    epochs. Networks with the same weights would have nothing to teach one another.

    Args:
        peers: the other networks, trained along and then dropped; copies of the model with new weights when left out.
        cohort: K, where peers are left out; 1 is plain training.
        weight: of the divergence.
        update: in turns, or all at once from the same predictions.
        spread: what is divided among several processes (`accelerate launch`): each has all networks and its part of the
            batches, or each of K processes has one network and all batches, and they send one another predictions
            (then they move at once).
        epochs: passes over the training data.
        lr: learning rate.
        optimizer: as in `fit`.

    Raises:
        BadOption: a peer is the model itself; networks are spread over a number of processes that is not theirs, or
            in turns.
    """
    others = list(peers) if peers is not None else [fresh(model) for _ in range(cohort - 1)]
    if any(peer is model for peer in others):
        raise BadOption(
            "a peer is the very model that is trained: pass peers=[copy.deepcopy(model)] with other weights"
        )
    note(f"{len(others) + 1} networks learn from one another, {update}; the first is kept")
    everyone = [model, *(peer.to(device_of(model)).train() for peer in others)]
    if spread == "networks" and processes.count() > 1:
        if processes.count() != len(everyone) or update == "alternating":
            raise BadOption(
                f"spread='networks' has {processes.count()} processes for {len(everyone)} networks that move {update}: "
                "start one process a network, with update='simultaneous'"
            )
        return each_its_own(everyone, task, weight, epochs=epochs, lr=lr, optimizer=optimizer)
    if update == "simultaneous":
        every = [p for one in everyone for p in one.parameters()]
        return task.fit(
            model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=at_once(everyone, task, weight), params=every
        )
    turns = [in_turn(k, everyone, task, weight) for k in range(len(everyone))]
    also = [(list(peer.parameters()), turn) for peer, turn in zip(others, turns[1:], strict=True)]
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=turns[0], also=also)


def in_turn(k: int, everyone: Sequence[nn.Module], task: Task, weight: float) -> Step:
    """The step of network k: the others' predictions are made anew, and are constants."""

    def step(model: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target = run(model if k == 0 else everyone[k], task, batch)
        shown = [predicted(one, task, batch) for i, one in enumerate(everyone) if i != k]
        return mutual(task, output, target, shown, weight, batch)

    return step


def at_once(everyone: Sequence[nn.Module], task: Task, weight: float) -> Step:
    """One step of all networks from the same predictions; terms are the sums over networks."""

    def step(model: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        runs = [run(model if i == 0 else one, task, batch) for i, one in enumerate(everyone)]
        terms: dict[str, Tensor] = {}
        for k, (output, target) in enumerate(runs):
            shown = [prediction(other).detach() for i, (other, _) in enumerate(runs) if i != k]
            for name, term in mutual(task, output, target, shown, weight, batch).items():
                terms[name] = terms[name] + term if name in terms else term
        return terms

    return step


def each_its_own(
    everyone: Sequence[nn.Module], task: Task, weight: float, *, epochs: float, lr: float, optimizer: Optimizers
) -> nn.Module:
    """Every process trains one network on all batches; all gather what the others predict, and get the first network.

    Before every epoch all draw alike again, so that the data come to all in one order.
    """
    mine = processes.index()
    for i, one in enumerate(everyone):
        processes.same_network(one, source=i)

    def step(model: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target = run(model, task, batch)
        with processes.shared():
            said = processes.gathered(prediction(output))
        return mutual(task, output, target, [one for i, one in enumerate(said) if i != mine], weight, batch)

    def before(epoch: int) -> None:
        with processes.shared():
            processes.same_draws()

    with processes.apart():
        task.fit(everyone[mine], task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, before_epoch=before)
    processes.same_network(everyone[0], source=0)
    processes.same_draws()
    return everyone[0]


def mutual(
    task: Task, output: object, target: object, shown: Sequence[Tensor], weight: float, batch: Batch
) -> dict[str, Tensor]:
    """`H(y, p_k)` and the mean of `KL(p_l || p_k)` over the others."""
    terms = {"labels": loss_of(task, output, target)}
    if shown and weight:
        seen = {"": prediction(output)}
        gaps = [softened(seen, {"": to_device(one, seen[""].device)}, batch, 0.0, temperature=1.0) for one in shown]
        terms["peers"] = weight * sum(gaps) / len(gaps)  # type: ignore[assignment]
    return terms
