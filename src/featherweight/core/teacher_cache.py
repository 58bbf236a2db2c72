"""What a frozen teacher says of every training batch, kept in a folder: asked once, read in every later pass and run.

A batch is known by a digest of its inputs and the teacher by one of its structure and weights, so that the outputs of
another teacher, or for other inputs, are never taken. Files are safetensors and JSON: opening them runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from featherweight.core import processes
from featherweight.core.digests import inputs_digest, portrait
from featherweight.core.draws import undrawn
from featherweight.core.features import Taps
from featherweight.core.ledger import note
from featherweight.core.progress import track
from featherweight.core.task import Batch, Task, first, length
from featherweight.errors import BadData, BadOption, MissingNeed

Ask = Callable[[Batch], Taps]
"""`batch -> taps` of a teacher: outputs of layers by path, the logits under ""."""

INDEX = "teacher.json"
KIND = "featherweight teacher cache 1"
LOGITS = "/logits"  # the name of the tensor; no layer's path has a slash


def cached(folder: str | os.PathLike[str], teacher: nn.Module, task: Task, places: Sequence[str], ask: Ask) -> Ask:
    """`ask`, answered from a folder; where there is none, the teacher is asked about all training batches and it is
    made, under another name until it is whole.

    The answers are those of the teacher bit for bit. Random generators stay where they are. Of several processes the
    main one writes.

    Args:
        places: what is kept: paths of layers, "" for the logits.

    Raises:
        BadData: the folder is damaged, no such folder, of another teacher or other data, or cannot be written; the
            training batches differ from pass to pass.
        BadOption: the teacher answers differently each time.
        MissingNeed: there are no training data.
    """
    path = Path(folder)

    def make() -> bool:
        if not path.exists():
            _same_twice(task, ask)
            _write(path, teacher, task, places, ask)
            return True
        return False

    with undrawn():
        if task.train is None:
            raise MissingNeed("the teacher's outputs for training data are kept, and there are none: pass Task(train=)")
        held = TeacherCache.open(path, portrait(teacher), places, task, made=processes.main_only(make))
        if not held.made:
            batch = first(task.train, "training")
            held.compare(held(batch), ask(batch))
    return held


@final
@dataclass(frozen=True)
class TeacherCache:
    """A folder that was opened: what the teacher says of a batch, from the batch's own file."""

    path: Path
    places: tuple[str, ...]
    batches: Mapping[str, Any]
    task: Task
    made: bool

    @classmethod
    def open(cls, path: Path, teacher: str, places: Sequence[str], task: Task, *, made: bool) -> TeacherCache:
        try:
            index = json.loads((path / INDEX).read_text())
            known, kept, batches = index["teacher"], tuple(index["places"]), dict(index["batches"])
            right = index["kind"] == KIND
        except (OSError, ValueError, KeyError, TypeError):
            right = False
        if not right:
            raise BadData(f"{path} is no folder of a teacher's outputs: pass teacher_cache= a path that is not there")
        if known != teacher:
            raise BadData(f"{path} holds the outputs of another teacher: remove it, or pass another teacher_cache=")
        if missing := [place or "the logits" for place in places if place not in kept]:
            raise BadData(
                f"{path} does not hold the outputs of {', '.join(missing)}: remove it, or pass another teacher_cache="
            )
        return cls(path, tuple(places), batches, task, made)

    def __call__(self, batch: Batch) -> Taps:
        args, kwargs, _ = self.task.split(batch)
        name = inputs_digest(args, kwargs)
        if name not in self.batches and self.made:
            raise BadData(
                "the training batches differ from pass to pass (shuffled, or augmented at random), so that the teacher "
                f"must see each anew: leave teacher_cache out, or fix order and augmentation, and remove {self.path}"
            )
        if name not in self.batches:
            raise BadData(
                f"{self.path} holds no outputs for this training batch: it was made of other data, or of the same in "
                "another order or otherwise augmented; remove it, or pass another teacher_cache="
            )
        return self._read(name)

    def _read(self, name: str) -> Taps:
        facts = self.batches[name]
        try:
            data = (self.path / f"{name}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != facts["sha256"]:
                raise ValueError
            tensors = load(data)
            orders = facts["orders"]
            return {place: _laid(tensors[place or LOGITS], orders.get(place)) for place in self.places}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError):
            raise BadData(f"{self.path} is damaged: remove it, and it is made again") from None

    def compare(self, kept: Taps, said: Taps) -> None:
        """Refuses a teacher that has the same weights and modules, and yet says something else."""
        for place in self.places:
            old, new = kept[place].float(), said[place].detach().cpu().float()
            if old.shape != new.shape or not torch.allclose(old, new, rtol=1e-3, atol=1e-4, equal_nan=True):
                raise BadData(
                    f"{self.path} holds the outputs of a teacher of other code: remove it, or pass another "
                    "teacher_cache="
                )


def _same_twice(task: Task, ask: Ask) -> None:
    """Refuses batches, or a teacher, that two looks at the first batch show to be random."""
    assert task.train is not None  # checked by the caller
    one, two = (first(task.train, "training") for _ in range(2))
    if inputs_digest(*task.split(one)[:2]) != inputs_digest(*task.split(two)[:2]):
        raise BadData(
            "the training batches differ from pass to pass (shuffled, or augmented at random), so that the teacher "
            "must see each anew: leave teacher_cache out, or fix order and augmentation"
        )
    before, after = ask(one), ask(one)
    if any(not torch.equal(before[place], after[place]) for place in before):
        raise BadOption(
            "the teacher answers the same batch differently each time, so that its outputs cannot be kept: leave "
            "teacher_cache out"
        )


def _write(path: Path, teacher: nn.Module, task: Task, places: Sequence[str], ask: Ask) -> None:
    assert task.train is not None  # checked by the caller
    batches: dict[str, Any] = {}
    size = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
    except OSError as error:
        raise BadData(f"the teacher's outputs cannot be kept in {path} ({error.strerror}): choose another") from None
    try:
        for batch in track(task.train, "ask the teacher", length(task.train)):
            args, kwargs, _ = task.split(batch)
            name, said = inputs_digest(args, kwargs), ask(batch)
            laid = {place: _ordered(said[place]) for place in places}
            data = save({place or LOGITS: value for place, (value, _) in laid.items()})
            (fresh / f"{name}.safetensors").write_bytes(data)
            orders = {place: order for place, (_, order) in laid.items() if order != sorted(order)}
            batches[name] = {"sha256": hashlib.sha256(data).hexdigest(), "orders": orders}
            size += len(data)
        index = {"kind": KIND, "teacher": portrait(teacher), "places": list(places), "batches": batches}
        (fresh / INDEX).write_text(json.dumps(index))
        fresh.rename(path)
    except OSError as error:
        raise BadData(f"the teacher's outputs cannot be kept in {path} ({error.strerror}): choose another") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    note(f"the teacher's outputs for {len(batches)} batches are kept: {size:,} bytes")


def _ordered(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """The tensor with its dimensions from the widest stride to the narrowest, and their order.

    Sums go by the layout in memory, so a tensor that comes back in another one has another last digit. A copy: logits
    may be a view of features, and a file holds no tensors that share memory.
    """
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    return tensor.detach().cpu().permute(order).clone(memory_format=torch.contiguous_format), order


def _laid(tensor: Tensor, order: Sequence[int] | None) -> Tensor:
    return tensor if order is None else tensor.permute([order.index(d) for d in range(tensor.dim())])
