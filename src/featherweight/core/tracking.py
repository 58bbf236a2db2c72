"""Trackers (TensorBoard, Weights & Biases, MLflow) through Accelerate: losses of every step, figures of every method.

The loop and `compress` record freely; outside of `tracking` that does nothing. All that is recorded inside one block is
one run of the tracker, its steps counted on, however many loops and methods there are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, final, get_args

from featherweight.errors import BadOption, MissingNeed, unknown

Name = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
"""What Accelerate can log with; the module and the package that it needs have the same name."""

Tracker = Any
"""A `Name`, an object of Accelerate's class `GeneralTracker`, or a list of them."""

RUN = "featherweight"  # the name of the run or project, and of the folder of those that write files


@dataclass
class _Run:
    log: Callable[..., None]
    step: int = 0


_open: ContextVar[_Run | None] = ContextVar("tracking", default=None)


def check_tracker(tracker: Tracker, folder: object = ".") -> list[Any]:
    """The trackers as a list.

    Raises:
        UnknownName: there is no tracker of that name.
        MissingNeed: its package is not installed.
        BadOption: it is neither a name nor a tracker, or writes files and has no folder.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

    wanted = [tracker] if isinstance(tracker, (str, GeneralTracker)) else tracker
    if not isinstance(wanted, Sequence) or not wanted:
        raise BadOption(
            f"tracker={tracker!r}: must be a name such as 'tensorboard', a GeneralTracker, or a list of them"
        )
    for one in wanted:
        if isinstance(one, GeneralTracker):
            continue
        if one not in get_args(Name):
            raise unknown("tracker", str(one), get_args(Name))
        if find_spec(one) is None:
            raise MissingNeed(f"the tracker {one!r} needs a package that is not installed: pip install {one}")
        if folder is None and LOGGER_TYPE_TO_CLASS[one].requires_logging_directory:
            raise BadOption(f"the tracker {one!r} writes files: say where, with out= or tracker_dir=")
    return list(wanted)


@contextmanager
def tracking(
    tracker: Tracker | None, folder: str | os.PathLike[str] | None = None, config: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Hands what is recorded inside the block to the trackers; those that write files do it in `folder`.

    Without a tracker, the block around this one, if any, stays in charge.

    Raises:
        UnknownName, MissingNeed, BadOption: as `check_tracker`.
    """
    if tracker is None:
        yield
        return
    from accelerate import Accelerator

    wanted = check_tracker(tracker, folder)
    accelerator = Accelerator(log_with=wanted, project_dir=None if folder is None else os.fspath(folder))
    accelerator.init_trackers(RUN, config=dict(config or {}))
    token = _open.set(_Run(accelerator.log))
    try:
        yield
    finally:
        _open.reset(token)
        for one in accelerator.trackers:  # not end_training, which would also end the group of processes
            one.finish()


def record(values: Mapping[str, Any]) -> None:
    """Logs numbers at the current step; what is no finite number is left out."""
    if (run := _open.get()) is not None:
        plain = {name: float(value) for name, value in values.items() if value is not None}
        run.log({name: value for name, value in plain.items() if math.isfinite(value)}, step=run.step)


@final
@dataclass
class Losses:
    """The losses of one training loop: every step's under `loss`, every epoch's mean under `epoch`."""

    epoch: int = 0
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def step(self, terms: Mapping[str, Any], epoch: int, lr: float) -> None:
        """Records the loss terms (scalars without gradients) of one step; their sum is the loss."""
        if (run := _open.get()) is None:
            return
        if epoch != self.epoch:
            self.close()
            self.epoch = epoch
        values = {name: float(term) for name, term in terms.items()}
        values = {
            "loss": sum(values.values()),
            **({f"loss/{n}": v for n, v in values.items()} if len(values) > 1 else {}),
        }
        run.step, self.steps = run.step + 1, self.steps + 1
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        record({**values, "lr": lr})

    def close(self) -> None:
        """Records the means of the epoch."""
        if self.steps:
            record({f"epoch/{name}": total / self.steps for name, total in self.sums.items()})
        self.steps, self.sums = 0, {}


def is_open() -> bool:
    """Whether anybody records."""
    return _open.get() is not None


def step() -> int:
    """How many training steps the open run has seen."""
    return 0 if (run := _open.get()) is None else run.step


def resume_at(reached: int) -> None:
    """Lets the open run count on from the steps of the run that it resumes."""
    if (run := _open.get()) is not None:
        run.step = reached
