"""Teachers of several streams of a clip (frames, motion vectors, residuals) teach one small student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.ensemble import Ensemble, members_of
from featherweight.core.features import matched
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.surgery import Layer
from featherweight.core.task import Task, evaluate, first
from featherweight.core.taught import teacher_of
from featherweight.distill import Term, learn
from featherweight.errors import BadOption
from featherweight.ingredients.match.feature_distance import feature_distance
from featherweight.ingredients.match.softened import softened


def learns(options: Mapping[str, Any]) -> None:
    """Refuses a loss without terms."""
    if not any(options[name] for name in ("labels", "alpha", "hints")):
        raise BadOption("labels=0, alpha=0 and hints=0 leave nothing to learn from: raise one of them")


@recipe(
    paper="Wu, Chiu and Wu, ICASSP 2019",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
    rules=(learns,),
)
def multi_teacher_video(
    model: nn.Module,
    task: Task,
    *,
    weights: Literal["metric", "equal"] | Sequence[float] = "metric",
    temperature: Positive = 4.0,
    labels: Amount = 1.0,
    alpha: Amount = 1.0,
    hints: Amount = 0.0,
    guided: Annotated[str, Layer("student")] | None = None,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains on `H(y, p_S) + alpha t^2 KL(sum_m w_m p_m^t || p_S^t) + hints sum_m w_m mean (F_m - r_m(F_S))^2`.

    The teachers are the members of the task's ensemble. Which stream each looks at is said by wrapping it,
    `OnStream("motion", network)` (`core.streams`), and by `task.teacher_split`, which hands all streams over. Their
    probabilities are averaged, not their logits, whose scales differ; the divergence has the gradient of
    `alpha t^2 sum_m w_m KL(p_m^t || p_S^t)`. One teacher alone is `kd`.
    Source: Multi-teacher Knowledge Distillation for Compressed Video Action Recognition on Deep Neural Networks.

    Departs from the paper: only its abstract was available: the loss, weights from the teachers' metric on the
    validation data and all constants are inferred; it is off-line and for any aligned streams, decoding of compressed
    video is the user's; hints compare the last maps of student and teachers, through 1x1 convolutions; Adam.

    Args:
        weights: w_m, as the teachers' metric on the validation data has them, equal ones, or numbers in the order of
            the members; their sum is made 1.
        temperature: t.
        labels: weight of the labels' loss.
        alpha: weight of the teachers' averaged probabilities.
        hints: weight of the features.
        guided: the student's layer that hints guide; its last maps, or last layer, when left out.
        epochs: passes over the training data.
        lr: learning rate.
        optimizer: as in `fit`.

    Raises:
        BadOption: weights that are negative, all 0, or not one for each teacher; a metric that is an error; nothing to
            learn from.
    """
    members = members_of(teacher_of(model, task))
    shares = normalised(members, task, weights)
    told = ", ".join(f"{share:.3f}" for share in shares.tolist())
    note(f"{len(members)} teacher(s), with weights {told}" + ("" if len(members) > 1 else ": this is kd"))
    if len(members) > 1:
        task = replace(task, teacher=Ensemble(members, lambda count: shares, temperature))
    terms = {"teachers": Term(partial(softened, temperature=temperature), alpha)} if alpha else {}
    if hints:
        terms |= hinted(model, members, task, guided, [hints * share for share in shares.tolist()])
    return learn(model, task, terms, labels=labels, epochs=epochs, lr=lr, optimizer=optimizer)


def normalised(members: Sequence[nn.Module], task: Task, weights: str | Sequence[float]) -> Tensor:
    """The weights of the teachers, (teachers,), with the sum 1.

    Raises:
        BadOption: as the method.
    """
    if weights == "equal" or (len(members) == 1 and isinstance(weights, str)):
        return torch.full((len(members),), 1 / len(members))
    if weights == "metric" and not task.metric.higher_is_better:
        raise BadOption(f"the metric {task.metric.name} is an error, no weight: pass weights=equal, or numbers")
    found = [evaluate(m, task.of_teacher()).value for m in members] if isinstance(weights, str) else list(weights)
    if len(found) != len(members):
        raise BadOption(f"weights={found} for {len(members)} teachers: pass one number for each")
    if min(found) < 0 or sum(found) == 0:
        raise BadOption(f"teachers' weights {found} must be at least 0, and one of them more: pass weights=equal")
    return torch.tensor(found) / sum(found)


def hinted(
    model: nn.Module, members: Sequence[nn.Module], task: Task, guided: str | None, weights: Sequence[float]
) -> dict[str, Term]:
    """A term for each teacher: the student's layer matches its last maps."""
    batch, terms = first(task.calibrating(), "training"), {}
    for index, (member, weight) in enumerate(zip(members, weights, strict=True)):
        ours, theirs = matched(model, member, task, batch, "deep")[0]
        path = f"members.{index}.{theirs}" if len(members) > 1 else theirs
        terms[f"hint {index}"] = Term(feature_distance, weight, [(guided or ours, path)])
    return terms
