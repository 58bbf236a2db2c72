"""What every architecture must pass: it is wired, loses three channels in ten, and still computes what masking does.

`python gate.py file.json name ...` does all of it: also the files in a fresh process, training and ONNX.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import featherweight as fw
from architectures import ARCHITECTURES, REAL, Architecture
from architectures_text import TEXT
from featherweight.core.channels import Channels, channel_groups, masked_outputs, remove_channels
from featherweight.core.double import Double
from featherweight.core.task import as_call
from featherweight.core.wired import Wired
from featherweight.core.wiring import wire
from removal import gap, randomise
from reopened import floats

OUTPUT = "output of the model"


@dataclass(frozen=True)
class Found:
    """A wired network, its channels, and how many seconds of processor time both took."""

    wired: Wired
    inputs: Any
    channels: Channels
    wiring_seconds: float
    groups_seconds: float


def settle(model: nn.Module, inputs: Any) -> None:
    """Gives batch norms the statistics of the inputs, which would otherwise be lost behind many small weights."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(module.weight)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    args, kwargs = as_call(inputs)
    for norm in norms:
        norm.momentum = 0.9
    if norms:
        with torch.no_grad():
            model.train()(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def found(architecture: Architecture, seed: int = 0) -> Found:
    """Builds, wires and traces an architecture with random weights."""
    torch.manual_seed(seed)
    model, inputs = randomise(architecture.build().eval(), seed), architecture.inputs()  # what it needs is imported
    settle(model, inputs)
    start = time.process_time()
    wired = wire(model, inputs)
    middle = time.process_time()
    channels = channel_groups(wired, inputs)
    return Found(wired, inputs, channels, middle - start, time.process_time() - middle)


def prunable(channels: Channels) -> float:
    """The share of layer outputs that can be removed, of those that do not feed an output of the model."""
    inner = {p: ids for p, ids in channels.outputs.items() if channels.pinned.get(p) != OUTPUT}
    total = sum(len(ids) for ids in inner.values())
    return sum(int((ids >= 0).sum()) for ids in inner.values()) / total if total else math.nan


def pins(channels: Channels) -> dict[str, int]:
    """How many layers hold channels that stay, by the reason; outputs of the model aside."""
    return dict(Counter(reason for reason in channels.pinned.values() if reason != OUTPUT).most_common())


def doomed(channels: Channels, fraction: float = 0.3, seed: int = 0) -> Tensor:
    """A random part of the channels, as far as it can go."""
    order = torch.randperm(channels.count, generator=torch.Generator().manual_seed(seed))
    return channels.legal(order[: int(channels.count * fraction)])


def widened(one: Found) -> Found:
    """The same in double precision, on the inputs with which the channels were found."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    inputs = pytree.tree_map(double, one.channels.example_inputs)
    channels = replace(one.channels, example_inputs=inputs)
    return replace(one, wired=copy.deepcopy(one.wired).double(), inputs=inputs, channels=channels)


def removal_error(one: Found) -> float:
    """Removes three channels in ten, in place; how far that is from masking, relative to the largest output."""
    gone = doomed(one.channels)
    with torch.no_grad(), Double():
        expected = masked_outputs(one.wired, one.channels, gone)
        remove_channels(one.wired, gone, channels=one.channels)
        args, kwargs = as_call(one.inputs)
        return gap(pytree.tree_leaves(one.wired(*args, **kwargs)), expected)


def stale(model: nn.Module) -> list[str]:
    """Layers whose attributes disagree with the sizes of their weights."""
    found = []
    for path, m in model.named_modules():
        shape = tuple(m.weight.shape) if isinstance(getattr(m, "weight", None), Tensor) else ()
        match m:
            case nn.Linear():
                said: tuple[int, ...] = (m.out_features, m.in_features)
            case nn.modules.conv._ConvTransposeNd():
                said, shape = (m.in_channels, m.out_channels // m.groups), shape[:2]
            case nn.modules.conv._ConvNd():
                said, shape = (m.out_channels, m.in_channels // m.groups), shape[:2]
            case nn.LayerNorm() | nn.RMSNorm():
                said = tuple(m.normalized_shape)
            case nn.modules.batchnorm._BatchNorm():
                said = (m.num_features,)
            case nn.GroupNorm():
                said = (m.num_channels,)
            case nn.Embedding():
                said = (m.num_embeddings, m.embedding_dim)
            case _:
                continue
        if shape and said != shape:
            found.append(path)
    return found


def cut(name: str, folder: Path) -> dict[str, Any]:
    """The first half, JSON-able: the network is written down, loses channels, and is saved for `reopened.py`."""
    architecture = (ARCHITECTURES | TEXT | REAL)[name]
    one = found(architecture)
    facts = {
        "wiring_seconds": one.wiring_seconds,
        "groups_seconds": one.groups_seconds,
        "steps": len(one.wired.wiring.steps),
        "free_sizes": [[d in i.free for d in range(len(i.shape))] for i in one.wired.wiring.inputs],
        "channels": one.channels.count,
        "outputs": sum(len(ids) for ids in one.channels.outputs.values()),
        "prunable": prunable(one.channels),
        "pins": pins(one.channels),
        "parameters": sum(p.numel() for p in one.wired.parameters()),
    }
    if name in REAL:
        return facts
    facts["removal_error"] = removal_error(widened(one))
    remove_channels(one.wired, doomed(one.channels), channels=one.channels)
    facts |= {"parameters_left": sum(p.numel() for p in one.wired.parameters()), "stale": stale(one.wired)}
    folder.mkdir()
    facts["bytes"] = fw.save(one.wired, folder / "model.fw", example_inputs=one.inputs).bytes
    args, kwargs = as_call(one.inputs)
    with torch.no_grad():
        outputs = floats(one.wired.eval()(*args, **kwargs))
    torch.save({"inputs": one.inputs, "outputs": outputs}, folder / "call.pt")
    return facts


def passed(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Everything about each of these architectures, JSON-able; `failed` says what did not work."""
    facts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as parent:
        folders = {name: Path(parent) / str(i) for i, name in enumerate(names)}
        for name, folder in folders.items():
            try:
                facts[name] = cut(name, folder)
            except Exception as error:  # whatever it is, it is what did not work
                facts[name] = {"failed": f"{type(error).__name__}: {error}"}
        saved = [str(folder) for folder in folders.values() if (folder / "call.pt").exists()]
        script = [sys.executable, str(Path(__file__).with_name("reopened.py")), *saved]
        said = (
            subprocess.run(script, capture_output=True, text=True, check=False, env=os.environ).stderr if saved else ""
        )
        for name, folder in folders.items():
            if str(folder) in saved:
                ended = folder / "found.json"
                facts[name] |= (
                    json.loads(ended.read_text()) if ended.exists() else {"failed": f"the file: {said[-300:]}"}
                )
    return facts


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(passed(sys.argv[2:])))
