"""Checkpoints of a chain: the model after every finished method, forms and codes included, as plain data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from featherweight.core.blueprint import blueprint, conform
from featherweight.errors import BadData


class Checkpoints:
    """One file a finished method, in a folder.

    A file is written under a temporary name, flushed to the disk and renamed: after a kill at any moment the folder
    holds whole files only. It is used again only if its key, made of all that the state depends on, is the same.
    """

    def __init__(self, folder: Path, keys: Sequence[str]) -> None:
        self.folder, self.keys = folder, keys

    def file(self, index: int, kind: str = "safetensors") -> Path:
        """Where the state after the method at place `index` stands, or (`fw`) its file: the best is always on disk."""
        return self.folder / f"{index:02d}.{kind}"

    def store(self, index: int, model: nn.Module, record: dict[str, Any]) -> None:
        """Keeps the state after the method at place `index`.

        Raises:
            BadData: the disk is full or the folder read-only.
        """
        data, tensors = blueprint(model)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        tensors["/random"] = torch.get_rng_state()
        metadata = {"key": self.keys[index], "blueprint": json.dumps(data), "record": json.dumps(record, default=float)}
        temporary = self.folder / f".tmp-{index:02d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(self.file(index))
        except (OSError, SafetensorError) as error:
            raise BadData(f"the checkpoint {self.file(index)} cannot be written: {error}") from None

    def latest(self, fresh: Callable[[], nn.Module]) -> tuple[int, nn.Module, dict[str, Any]] | None:
        """The last method that has a checkpoint of this very run: its place, model and record."""
        for index in reversed(range(len(self.keys))):
            if (found := self.read(index, fresh)) is not None:
                return (index, *found)
        return None

    def read(self, index: int, fresh: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Any]] | None:
        """The model and record after one method; None if they are not there, damaged, or of another run."""
        try:
            with safe_open(self.file(index), "pt") as handle:
                metadata = handle.metadata() or {}
                if metadata.get("key") != self.keys[index]:
                    return None
                tensors: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None  # damaged: the method before it still counts
        torch.set_rng_state(tensors.pop("/random"))
        return conform(fresh(), json.loads(metadata["blueprint"]), tensors).eval(), json.loads(metadata["record"])

    def clear(self) -> None:
        """Removes the checkpoints of another run, and nothing else."""
        for left in [*self.folder.glob("[0-9][0-9].safetensors"), *self.folder.glob("[0-9][0-9].fw")]:
            left.unlink()
