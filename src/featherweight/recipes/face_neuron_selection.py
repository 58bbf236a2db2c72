"""Knowledge from neurons: those of the teacher's top layer are learned that tell identities and not nuisances.

A face model is asked for attributes of identity (gender, shape of the nose) and others (smiling, pose). Of any
classifier the classes are its identities, and a brighter or shifted input is a nuisance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, final

import torch
from annotated_types import Interval
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.ensemble import members_of
from featherweight.core.features import Taps, exact, matched
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.surgery import Layer
from featherweight.core.task import Batch, Split, Task, eval_mode, first
from featherweight.core.taught import teacher_of
from featherweight.distill import Term, below, learn, tapped
from featherweight.errors import BadData, BadOption
from featherweight.ingredients.adapter.one_by_one_match import one_by_one_match

Attributes = Callable[[Batch], tuple[Tensor, Tensor]]
"""`batch -> (identity, other)`: attributes of every sample, yes or no, (samples, attributes) each."""


@recipe(
    paper="Luo, Zhu, Liu, Wang and Tang, AAAI 2016",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1, "head_epochs": 1},
)
def face_neuron_selection(
    model: nn.Module,
    task: Task,
    *,
    attributes: Attributes | None = None,
    keep: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    redundancy: Amount = 0.5,
    solver: Literal["greedy", "mean_field"] = "greedy",
    guided: Annotated[str, Layer("student")] | None = None,
    epochs: Amount = 10,
    head_epochs: Amount = 5,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Chooses neurons of the teacher's last layer, fits `1 / (2M) sum ||f - g||^2` to them, then trains what is above.

    x_i(j) is how well neuron i alone tells attribute j. The chosen set S has a low energy `sum_S Phi_i + lambda / N
    sum_{i != j in S} Psi_ij`, `Phi = (max x - mean x over other attributes) / (max x - mean x over those of identity)`,
    `Psi_ij = exp(-||x_i - x_j||^2 / 2)`. The teacher may be an ensemble, whose neurons stand side by side.
    Source: Face Model Compression by Distilling Knowledge from Neurons.

    Departs from the paper: only secondary sources were available, and the unary energy is not settled. Without
    attributes the classes stand for identity, six changes of the input (brighter, darker, shifts by an eighth) for the
    others. S has a given size and is chosen greedily; the paper's mean field, here sequential and at temperature 0.1,
    gives redundant neurons the same probability if it is not. x is standardised for Psi, lambda divided by the number
    of neurons, 1e-3 added to Phi's denominator; neurons that never change are not chosen. A map's neuron is the mean of
    its channel. A linear layer without bias, trained along and dropped, joins a student of another width. The paper's
    student has no classes: here the layers above the guided one learn the labels afterwards, with features fixed. Adam.

    Args:
        attributes: batch -> (identity, other), yes or no for every sample, (samples, attributes) each.
        keep: the part of the neurons that is chosen.
        redundancy: lambda.
        solver: how the energy is made small.
        guided: the student's layer; the last one before the logits when left out.
        epochs: passes over the training data that fit the neurons, without labels.
        head_epochs: passes over them for the layers above, with labels.
        lr: learning rate.
        optimizer: as in `fit`.

    Raises:
        BadOption: the labels are no classes, or no input has real numbers, and there are no attributes.
        BadData: less than two attributes of a kind that differ among the samples.
    """
    members = members_of(teacher_of(model, task))
    batch = first(samples(task, attributes), "training")
    found = [matched(model, member, task, batch, "last")[0] for member in members]
    guided = guided or found[0][0]
    hints = [f"members.{m}.{hint}" if len(members) > 1 else hint for m, (_, hint) in enumerate(found)]
    identity, other = told_by_neurons(task, hints, attributes)
    chosen = select(identity, other, keep, redundancy, solver)
    note(f"{len(chosen)} of {len(identity)} neurons of {len(members)} teacher(s) chosen, learned by layer {guided}")
    lower = below(model, task, batch, guided)
    with eval_mode(model):
        ours = pooled(tapped(model, model, task, batch, [guided], whole=False)[0][guided])
    wanted = Term(Selected(guided, hints, chosen, ours), 1.0, [(guided, hint) for hint in hints])
    learn(
        model, task, {"neurons": wanted}, labels=0, whole=False, epochs=epochs, lr=lr, optimizer=optimizer,
        params=lower,
    )  # fmt: skip
    return head(model, task, lower, epochs=head_epochs, lr=lr, optimizer=optimizer)


@final
class Selected(nn.Module):
    """`1 / (2M) sum ||f - r(g)||^2` over M samples, f the chosen neurons and g the student's features.

    Args:
        guided, hints: the student's layer, and each teacher's.
        chosen: numbers of neurons, of all teachers side by side.
        ours: one batch of the student's features, (batch, d).
    """

    def __init__(self, guided: str, hints: Sequence[str], chosen: Tensor, ours: Tensor) -> None:
        super().__init__()
        self.guided, self.hints, self.chosen = guided, list(hints), chosen
        wanted = ours.new_zeros(len(ours), len(chosen))
        self.join = nn.Identity() if ours.shape == wanted.shape else one_by_one_match(ours, wanted).to(ours)

    def forward(self, student: Taps, teacher: Taps, batch: Any, progress: float) -> Tensor:
        neurons = torch.cat([pooled(teacher[hint]) for hint in self.hints], 1).detach()
        guess = self.join(pooled(student[self.guided]))
        return 0.5 * (neurons[:, self.chosen.to(neurons.device)] - guess).square().sum(1).mean()


def pooled(features: Tensor) -> Tensor:
    """Features as (batch, neurons): the mean of a map over its places, of tokens over the sentence.

    >>> pooled(torch.ones(2, 3, 4, 4)).shape, pooled(torch.ones(2, 5, 3)).shape
    (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    values = exact(features)
    return values.flatten(2).mean(2) if values.dim() > 3 else values.mean(1) if values.dim() == 3 else values


def samples(task: Task, attributes: Attributes | None) -> Iterable[Batch]:
    """By what neurons are chosen: classes are labels, which training batches have and calibration batches may not."""
    return task.calibrating() if attributes else task.train or ()


def told_by_neurons(task: Task, hints: Sequence[str], attributes: Attributes | None) -> tuple[Tensor, Tensor]:
    """How well each neuron tells each attribute of identity, and each other one: (neurons, attributes) twice.

    Raises:
        BadOption, BadData: as the method.
    """
    teacher = teacher_of(nn.Identity(), task)
    splits = [task.of_teacher().split, *(() if attributes else nuisances(task))]
    values: list[list[Tensor]] = [[] for _ in splits]
    kinds: list[tuple[Tensor, ...]] = []
    for batch in samples(task, attributes):  # once: a loader may shuffle
        for rows, split in zip(values, splits, strict=True):
            rows.append(neurons(teacher, replace(task, split=split), batch, hints))
        kinds.append(attributes(batch) if attributes else (classes(task, batch),))
    plain, *changed = (torch.cat(rows) for rows in values)
    given = [torch.cat(parts).cpu() for parts in zip(*kinds, strict=True)]
    if attributes:
        found = [told(plain, yes.bool()) for yes in given]
    else:
        yes = torch.arange(2 * len(plain)) >= len(plain)
        other = [told(torch.cat([plain, each]), yes[:, None]) for each in changed]
        found = [told(plain, given[0][:, None] == given[0].unique()), torch.cat(other, 1)]
    for x, kind in zip(found, ("identity", "other"), strict=True):
        if x.shape[1] < 2:
            raise BadData(
                f"{x.shape[1]} {kind} attributes differ among the samples: neurons are chosen by at least two"
            )
    return found[0], found[1]


def neurons(teacher: nn.Module, task: Task, batch: Batch, hints: Sequence[str]) -> Tensor:
    """The neurons' values for a batch, all teachers' side by side, (samples, neurons)."""
    with eval_mode(teacher):
        seen = tapped(teacher, teacher, task, batch, hints, whole=False)[0]
    return torch.cat([pooled(seen[hint]) for hint in hints], 1).cpu()


def classes(task: Task, batch: Batch) -> Tensor:
    """The label of every sample.

    Raises:
        BadOption: they are no classes of whole samples.
    """
    y = task.split(batch)[2]
    if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
        raise BadOption("neurons are chosen by the classes of samples, which these labels are not: pass attributes=")
    return y


def nuisances(task: Task) -> Iterator[Split]:
    """Splits for the teacher whose first input of real numbers is brighter, darker or, of images, shifted.

    Raises:
        BadOption: there is no such input.
    """
    split = task.of_teacher().split
    args, kwargs, _ = split(first(samples(task, None), "training"))
    given = [*args, *kwargs.values()]
    at = next((i for i, v in enumerate(given) if isinstance(v, Tensor) and v.is_floating_point()), None)
    if at is None:
        raise BadOption("inputs without real numbers have no brighter version to choose neurons by: pass attributes=")
    changes: list[Callable[[Tensor], Tensor]] = [lambda x: x + x.std() / 2, lambda x: x - x.std() / 2]
    if given[at].dim() == 4:
        steps = [(dim, sign * max(given[at].shape[dim] // 8, 1)) for dim in (2, 3) for sign in (-1, 1)]
        changes += [lambda x, dim=dim, step=step: x.roll(step, dim) for dim, step in steps]  # type: ignore[misc]
    for change in changes:
        yield lambda batch, change=change: with_input(split(batch), at, change)  # type: ignore[misc]


def with_input(call: Any, at: int, change: Callable[[Tensor], Tensor]) -> Any:
    """A split batch whose input number `at` is changed."""
    args, kwargs, target = call
    held = [change(v) if i == at else v for i, v in enumerate([*args, *kwargs.values()])]
    return tuple(held[: len(args)]), dict(zip(kwargs, held[len(args) :], strict=True)), target


def told(values: Tensor, yes: Tensor) -> Tensor:
    """x_i(j) = (TPR + TNR) / 2 of the best threshold on a neuron, of either direction: (neurons, attributes).

    From values (samples, neurons) and attributes (samples, m); attributes that all samples have, or none, are left out.

    >>> told(torch.tensor([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]]), torch.tensor([[True], [False], [False]])).tolist()
    [[1.0], [0.5]]
    """
    ordered, order = values.double().sort(0)
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones_like(ordered[:1], dtype=torch.bool)])
    columns = []
    for attribute in (a for a in yes.T if a.any() and not a.all()):
        hit = attribute[order].double()
        gap = hit.cumsum(0) / hit.sum(0) - (1 - hit).cumsum(0) / (1 - hit).sum(0)
        columns.append((1 + (gap.abs() * last).amax(0)) / 2)  # equal values lie on one side of every threshold
    return torch.stack(columns, 1) if columns else values.new_zeros(values.shape[1], 0).double()


def select(identity: Tensor, other: Tensor, keep: float, redundancy: float, solver: str) -> Tensor:
    """Numbers of the chosen neurons, ascending, from how well each tells attributes, (neurons, attributes) each.

    Raises:
        BadData: no neuron tells anything.
    """
    alive = ((identity > 0.5).any(1) | (other > 0.5).any(1)).nonzero().flatten()
    if not len(alive):
        raise BadData("no neuron of the teacher changes with any attribute: pass a trained teacher, or more data")
    phi, psi = energies(identity[alive], other[alive])
    count = min(max(round(keep * len(identity)), 1), len(alive))
    weight = redundancy / len(alive)
    if solver == "greedy":
        return alive[greedy(phi, psi, weight, count)].sort().values
    likely = mean_field(phi, psi, weight, float(phi.sort().values[count - 1]))[0]
    return alive[likely.sort(descending=True, stable=True).indices[:count]].sort().values


def energies(identity: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Phi (neurons,) and Psi (neurons, neurons), whose diagonal is 0."""
    (wanted, unwanted) = (x.amax(1) - x.mean(1) for x in (identity, other))
    x = torch.cat([identity, other], 1)
    z = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-6)
    psi = (-0.5 * (z[:, None] - z[None]).square().sum(2)).exp()
    return unwanted / (wanted + 1e-3), psi.fill_diagonal_(0)


def greedy(phi: Tensor, psi: Tensor, weight: float, count: int) -> Tensor:
    """So many neurons, each the one that adds least to the energy of those before it.

    >>> greedy(torch.tensor([0.0, 0.0, 0.1]), torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]]), 0.1, 2).tolist()
    [0, 2]
    """
    cost, chosen = phi.clone(), []
    for _ in range(count):
        i = int(cost.argmin())
        chosen.append(i)
        cost += 2 * weight * psi[i]
        cost[i] = torch.inf
    return torch.tensor(chosen)


def mean_field(
    phi: Tensor, psi: Tensor, weight: float, bias: float, temperature: float = 0.1, sweeps: int = 50
) -> tuple[Tensor, list[float]]:
    """The probabilities q of being chosen, one after another, and the free energy after every sweep.

    `q_i = sigmoid((bias - Phi_i - 2 weight sum_j q_j Psi_ij) / t)` is the least of the free energy in q_i alone.
    """
    q, values = torch.rand(len(phi)).to(phi), []
    for _ in range(sweeps):
        for i in range(len(phi)):
            q[i] = torch.sigmoid((bias - phi[i] - 2 * weight * (psi[i] @ q)) / temperature)
        values.append(free_energy(q, phi - bias, psi, weight, temperature))
    return q, values


def free_energy(q: Tensor, phi: Tensor, psi: Tensor, weight: float, temperature: float) -> float:
    """`E(q) - t H(q)` of independent neurons."""
    entropy = -(torch.special.xlogy(q, q) + torch.special.xlogy(1 - q, 1 - q)).sum()
    return float(q @ phi + weight * (q @ psi @ q) - temperature * entropy)


def head(
    model: nn.Module, task: Task, lower: Sequence[nn.Parameter], *, epochs: float, lr: float, optimizer: Optimizers
) -> nn.Module:
    """Trains all parameters but these on the labels; no statistics change meanwhile."""
    fixed = {id(param) for param in lower}
    params = [param for param in model.parameters() if id(param) not in fixed]
    if not params or not epochs:
        return model
    modes = {module: module.training for module in model.modules()}
    model.eval()
    model.training = True  # what is in evaluation mode beneath a model in training mode stays in it
    task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, params=params, label="head")
    for module, training in modes.items():
        module.training = training
    return model
