"""Checkpoints of a chain: the model after every finished method, forms and codes included, as plain data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from featherweight.core.blueprint import blueprint, conform
from featherweight.errors import BadData


class Checkpoints:
    """One file a finished method, in a folder (or nowhere, when the folder is None).

    A file is written under a temporary name, flushed to the disk and renamed: after a kill at any moment the folder
    holds whole files only. It is used again only if its key, made of all that the state depends on, is the same.
    """

    def __init__(self, folder: Path | None, key: Callable[[int], str]) -> None:
        self.folder, self.key = folder, key

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:02d}.safetensors"

    def store(self, index: int, model: nn.Module, record: dict[str, Any]) -> None:
        """Keeps the state after the method at place `index`.

        Raises:
            BadData: the disk is full or the folder read-only.
        """
        if self.folder is None:
            return
        data, tensors = blueprint(model)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        tensors["/random"] = torch.get_rng_state()
        metadata = {"key": self.key(index), "blueprint": json.dumps(data), "record": json.dumps(record, default=float)}
        temporary = self.folder / f".tmp-{index:02d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(self._file(index))
        except (OSError, SafetensorError) as error:
            raise BadData(f"the checkpoint {self._file(index)} cannot be written: {error}") from None

    def latest(self, count: int, fresh: Callable[[], nn.Module]) -> tuple[int, nn.Module, dict[str, Any]] | None:
        """The last of `count` methods that has a checkpoint of this very run: its place, model and record."""
        if self.folder is None:
            return None
        for index in reversed(range(count)):
            if self._file(index).exists() and (found := self._read(index, fresh)) is not None:
                return (index, *found)
        return None

    def _read(self, index: int, fresh: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Any]] | None:
        try:
            with safe_open(self._file(index), "pt") as handle:
                metadata = handle.metadata() or {}
                if metadata.get("key") != self.key(index):
                    return None
                tensors: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None  # damaged: the method before it still counts
        torch.set_rng_state(tensors.pop("/random"))
        return conform(fresh(), json.loads(metadata["blueprint"]), tensors).eval(), json.loads(metadata["record"])

    def clear(self) -> None:
        """Removes the checkpoints of another run."""
        if self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)
