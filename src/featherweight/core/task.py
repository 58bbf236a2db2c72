"""What a network is for: data, loss, metric and teacher; and `evaluate`, which measures the metric with an interval."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from featherweight.core.progress import track
from featherweight.errors import BadData, BadOption, MissingNeed

Batch = Any
Split = Callable[[Batch], tuple[tuple[Any, ...], dict[str, Any], Any]]

LABEL_KEYS = ("labels", "label", "targets", "target")
IGNORED = -100  # a label that does not count


def split_batch(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional arguments, keyword arguments and target of a batch: `x`, `(x, y)`, `(x1, x2, y)` or a dictionary.

    >>> split_batch((1, 2))
    ((1,), {}, 2)
    >>> split_batch({"input_ids": 1, "labels": 2})
    ((), {'input_ids': 1}, 2)
    """
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        inputs = {key: batch[key] for key in batch if key not in LABEL_KEYS}
        target = next((batch[key] for key in LABEL_KEYS if key in batch), None)
        return (), inputs, target
    if isinstance(batch, (tuple, list)):
        return (tuple(batch), {}, None) if len(batch) == 1 else (tuple(batch[:-1]), {}, batch[-1])
    return (batch,), {}, None


def prediction(output: Any) -> Tensor:
    """The tensor that losses and metrics look at: the output itself, its `logits`, or the first of several.

    Raises:
        BadData: the output holds no tensor.
    """
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return prediction(output.logits)
    if isinstance(output, dict):
        return prediction(next(iter(output.values())))
    if isinstance(output, (tuple, list)) and output:
        return prediction(output[0])
    raise BadData(f"the model returned a {type(output).__name__}: pass Task(loss=..., metric=...) that understand it")


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits, shape (batch, classes, ...), against class indices; -100 does not count.

    A batch in which no label counts has nothing to teach: its loss is 0, where the mean of nothing would be no number.
    """
    scores = prediction(output)
    if target.dtype == torch.int64 and target.numel() and bool((target == IGNORED).all()):
        return F.cross_entropy(scores, target, reduction="sum")
    return F.cross_entropy(scores, target)


def _correct(output: Any, target: Tensor) -> Tensor:
    right = (prediction(output).argmax(1) == target).float()
    return right.flatten(1).mean(1) if right.dim() > 1 else right  # the positions of one sample are not independent


@dataclass(frozen=True)
class Metric:
    """A figure of merit.

    Args:
        name: how it is called in reports.
        per_sample: `(output, target) -> (batch,)` values; zeros and ones get a Wilson interval, others a bootstrap.
        aggregate: values of all samples -> float (the mean when left out); without `per_sample` it is given all outputs
            and all targets instead, and there is no interval.
        higher_is_better: False for an error.

    Raises:
        BadOption: neither `per_sample` nor `aggregate` was given.
    """

    name: str
    per_sample: Callable[[Any, Any], Tensor] | None = None
    aggregate: Callable[..., float] | None = None
    higher_is_better: bool = True

    def __init__(
        self,
        name: str,
        *,
        per_sample: Callable[[Any, Any], Tensor] | None = None,
        aggregate: Callable[..., float] | None = None,
        higher_is_better: bool = True,
    ) -> None:
        if per_sample is None and aggregate is None:
            raise BadOption(f"metric {name!r}: pass per_sample=..., aggregate=..., or both")
        for key, value in (
            ("name", name),
            ("per_sample", per_sample),
            ("aggregate", aggregate),
            ("higher_is_better", higher_is_better),
        ):
            object.__setattr__(self, key, value)


accuracy = Metric("accuracy", per_sample=_correct)


@dataclass(frozen=True)
class Score:
    """A measured metric: `value`, the number of samples `n`, correct `k` where that has a meaning, a 95 % interval.

    `per_sample` holds the values of the samples in order, `targets` a hash of what they were compared with, so that two
    scores are paired only where both saw the same samples in the same order.
    """

    name: str
    value: float
    n: int
    higher_is_better: bool = True
    k: int | None = None
    low: float | None = None
    high: float | None = None
    interval: str = "no interval"
    per_sample: Tensor | None = None
    targets: str | None = None

    def __str__(self) -> str:
        counted = f" ({self.k}/{self.n})" if self.k is not None else ""
        span = f" [{self.low:.4f}, {self.high:.4f}]" if self.low is not None else ""
        return f"{self.name} {self.value:.4f}{counted}{span}"


class Fit(Protocol):
    """The training loop: `featherweight.fit`, or the user's own."""

    def __call__(self, model: nn.Module, task: Task, *, epochs: float, **options: Any) -> nn.Module: ...


def _fit(model: nn.Module, task: Task, *, epochs: float, **options: Any) -> nn.Module:
    from featherweight.core.fit import fit  # the loop needs Task, Task names the loop

    return fit(model, task, epochs=epochs, **options)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a network is for. Only `valid` is required; what a method needs beyond it is checked before it starts.

    Args:
        valid: batches on which choices are made.
        train: batches to train on.
        calibration: batches for ranges and statistics; the training batches stand in when left out.
        test: batches on which the result is told, once.
        split: batch -> (arguments, keyword arguments, target).
        loss: (output, target) -> scalar.
        metric: the figure of merit.
        teacher: the network whose outputs guide training; in a chain, the frozen original.
        teacher_split: as `split`, for the teacher, where it is shown something else than the model: another modality of
            the same scene, a larger image.
        example_inputs: a tensor, tuple or dictionary of inputs; taken from the first batch when left out.
        fit: the training loop.
        evaluate: model -> float in place of `metric`, for models that need a procedure of their own.
    """

    valid: Iterable[Batch]
    train: Iterable[Batch] | None = None
    calibration: Iterable[Batch] | None = None
    test: Iterable[Batch] | None = None
    split: Split = split_batch
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    metric: Metric = accuracy
    teacher: nn.Module | None = None
    teacher_split: Split | None = None
    example_inputs: Any = None
    fit: Fit = _fit
    evaluate: Callable[[nn.Module], float] | None = None

    def of_teacher(self) -> Task:
        """The task as the teacher sees it: with its own `split`, where it has one."""
        return self if self.teacher_split is None else replace(self, split=self.teacher_split)

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Example arguments and keyword arguments of the model, at most two samples of the first batch."""
        if self.example_inputs is not None:
            return as_call(self.example_inputs)
        args, kwargs, _ = self.split(first(self.valid, "valid"))
        return tuple(head(a) for a in args), {k: head(v) for k, v in kwargs.items()}

    def calibrating(self) -> Iterable[Batch]:
        """The calibration batches, or the training batches.

        Raises:
            MissingNeed: the task has neither.
        """
        data = self.calibration if self.calibration is not None else self.train
        if data is None:
            raise MissingNeed("this method needs calibration data: pass Task(calibration=...) or Task(train=...)")
        return data


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as arguments and keyword arguments: a tensor, a tuple or list of arguments, a dictionary.

    >>> as_call({"x": 1})
    ((), {'x': 1})
    """
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs
    if isinstance(inputs, dict) or hasattr(inputs, "keys"):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def head(value: Any, count: int = 2) -> Any:
    """At most `count` samples of a batched tensor; anything else as it is."""
    return value[:count] if isinstance(value, Tensor) and value.dim() > 0 else value


def first(batches: Iterable[Batch], name: str) -> Batch:
    """The first batch.

    Raises:
        BadData: there is none.
    """
    for batch in batches:
        return batch
    raise BadData(f"the {name} data are empty: at least one batch is needed")


def check_needs(needs: Iterable[str], task: Task, name: str) -> None:
    """Checks that the task has what a method needs.

    Raises:
        MissingNeed: it does not; the message names the argument of `Task` to pass.
    """
    needs = set(needs)
    if "train" in needs and task.train is None:
        raise MissingNeed(f"{name} needs training data, which this task does not have: pass Task(train=...)")
    if "calibration" in needs and task.calibration is None and task.train is None:
        raise MissingNeed(f"{name} needs calibration data, which this task does not have: pass Task(calibration=...)")
    if "teacher" in needs and task.teacher is None:
        raise MissingNeed(f"{name} needs a teacher, which this task does not have: pass Task(teacher=...)")
    if "labels" in needs:
        batches = task.train if task.train is not None else task.valid
        if task.split(first(batches, "training"))[2] is None:
            raise MissingNeed(f"{name} needs labels, which the batches do not have: yield (inputs, labels)")


def length(batches: Iterable[Batch]) -> int | None:
    """How many batches there are, where that is known without going through them."""
    return len(batches) if isinstance(batches, Sized) else None


def to_device(value: Any, device: torch.device) -> Any:
    """Moves every tensor of a nested structure; everything else is left as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, device) for v in value)
    return value


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def run(model: nn.Module, task: Task, batch: Batch) -> tuple[Any, Any]:
    """Output of the model on one batch, and the batch's target."""
    args, kwargs, target = task.split(to_device(batch, device_of(model)))
    return model(*args, **kwargs), target


def loss_of(task: Task, output: Any, target: Any) -> Tensor:
    """The task's loss of one batch.

    Raises:
        MissingNeed: the loss needs a target, and the batch has none.
    """
    try:
        return task.loss(output, target)
    except (TypeError, AttributeError) as error:
        if target is not None:
            raise
        raise MissingNeed("the loss needs labels, which the batches do not have: yield (inputs, labels)") from error


class eval_mode:  # noqa: N801 - used like a function: `with eval_mode(model):`
    """A block in which the model is in evaluation mode and nothing records gradients; modes are put back after it."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = {module: module.training for module in model.modules()}
        self.model = model
        self.no_grad = torch.no_grad()

    def __enter__(self) -> nn.Module:
        self.model.eval()
        self.no_grad.__enter__()
        return self.model

    def __exit__(self, *error: Any) -> None:
        self.no_grad.__exit__(*error)
        for module, training in self.modes.items():
            module.training = training


def evaluate(model: nn.Module | Callable[..., Any], task: Task, split: str = "valid", label: str = "evaluate") -> Score:
    """Measures the task's metric on `valid`, `test`, `train` or `calibration`.

    `model` may also be a plain callable with a module's arguments (an ONNX session, say).

    Raises:
        BadData: the split is absent or empty, or labels are missing.
    """
    batches = getattr(task, split)
    if batches is None:
        raise BadData(f"the task has no {split} data: pass Task({split}=...)")
    if task.evaluate is not None and isinstance(model, nn.Module):
        value = float(task.evaluate(model))
        return Score(task.metric.name, value, 0, task.metric.higher_is_better)
    if not isinstance(model, nn.Module):
        return score(task.metric, _outputs(model, task, batches, label))
    with eval_mode(model):
        return score(task.metric, _outputs(model, task, batches, label))


def _outputs(model: Any, task: Task, batches: Iterable[Batch], label: str) -> Iterator[tuple[Any, Any]]:
    for batch in track(batches, label, length(batches)):
        if isinstance(model, nn.Module):
            yield run(model, task, batch)
        else:
            args, kwargs, target = task.split(batch)
            yield model(*args, **kwargs), target


def score(metric: Metric, outputs: Iterable[tuple[Any, Any]]) -> Score:
    """Reduces (output, target) pairs to a `Score`.

    Raises:
        BadData: there are no pairs.
    """
    if metric.per_sample is None:
        pairs = list(outputs)
        if not pairs or metric.aggregate is None:
            raise BadData("the data are empty: at least one batch is needed")
        value = float(metric.aggregate([o for o, _ in pairs], [t for _, t in pairs]))
        return Score(metric.name, value, len(pairs), metric.higher_is_better)
    parts, seen = [], hashlib.sha256()
    for output, target in outputs:
        parts.append(metric.per_sample(output, target).detach().flatten().float().cpu())
        _hash(seen, target)
    if not parts or sum(len(p) for p in parts) == 0:
        raise BadData("the data are empty: at least one batch is needed")
    values = torch.cat(parts)
    aggregate = metric.aggregate or (lambda v: float(v.double().mean()))
    value = float(aggregate(values))
    counted = metric.aggregate is None and bool(((values == 0) | (values == 1)).all())
    low, high = wilson(int(values.sum()), len(values)) if counted else bootstrap(values, aggregate)
    return Score(
        metric.name,
        value,
        len(values),
        metric.higher_is_better,
        int(values.sum()) if counted else None,
        low,
        high,
        "wilson" if counted else "bootstrap",
        values,
        seen.hexdigest(),
    )


def _hash(seen: Any, target: Any) -> None:
    """Adds the values of a batch's target to a hash, however the target is nested and wherever its tensors are."""
    for leaf in tree_leaves(target):
        values = (
            leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() if isinstance(leaf, Tensor) else leaf
        )
        if isinstance(values, np.ndarray):
            seen.update(np.ascontiguousarray(values).tobytes())
        elif isinstance(values, (str, bytes, int, float)):
            seen.update(repr(values).encode())


def wilson(k: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % Wilson score interval of `k` out of `n` (Wilson, JASA 1927).

    >>> tuple(round(v, 4) for v in wilson(95, 100))
    (0.8882, 0.9785)
    """
    p, z2 = k / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Tensor, aggregate: Callable[[Tensor], float], rounds: int = 400) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of an aggregate, with a generator of its own (seeded, repeatable)."""
    generator = torch.Generator().manual_seed(0)
    draws = [
        float(aggregate(values[torch.randint(len(values), (len(values),), generator=generator)])) for _ in range(rounds)
    ]
    low, high = torch.tensor(draws, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def drop(before: Score, after: Score) -> float:
    """How much worse `after` is, in points of the metric (0.01 is one point of a percentage); negative is better."""
    return before.value - after.value if before.higher_is_better else after.value - before.value


def pairs(before: Score, after: Score) -> tuple[Tensor, Tensor] | None:
    """The values of two scores, sample by sample; None where they have none, or did not see the same samples in order.

    A loader that shuffles gives every model another order: such scores cannot be paired.
    """
    if before.per_sample is None or after.per_sample is None or before.targets != after.targets:
        return None
    return (before.per_sample, after.per_sample) if len(before.per_sample) == len(after.per_sample) else None


def paired_drop(before: Score, after: Score, metric: Metric | None = None) -> tuple[float, float] | None:
    """The 95 % interval of the drop, from the samples that both models saw; None without samples.

    Normal and paired for a mean. A metric with an aggregate of its own must be passed, and gets a paired bootstrap of
    the difference of the aggregates (with a seeded generator of its own); without it there is no interval.
    """
    found = pairs(before, after)
    if found is None or len(found[0]) < 2:
        return None
    old, new = found
    sign = 1 if before.higher_is_better else -1
    if metric is not None and metric.aggregate is not None:
        aggregate = metric.aggregate
        places = torch.arange(len(old))
        return bootstrap(places, lambda at: sign * (float(aggregate(old[at])) - float(aggregate(new[at]))))
    if not (_is_mean(before) and _is_mean(after)):
        return None  # differences of samples say nothing about another aggregate
    difference = (old - new).double() * sign
    half = 1.959963984540054 * float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) - half, float(difference.mean()) + half


def _is_mean(found: Score) -> bool:
    return found.per_sample is not None and math.isclose(
        found.value, float(found.per_sample.double().mean()), rel_tol=1e-6, abs_tol=1e-9
    )
