"""A file in a fresh process that cannot import transformers: `python reopened.py folder` writes what it found there.

The folder holds `model.fw`, and `call.pt` with inputs and the outputs that are expected.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import featherweight as fw
from featherweight.core.task import as_call
from featherweight.core.wired import Wired
from featherweight.export.onnx_file import onnx


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def difference(found: Any, expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest of each output."""
    gaps = [
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
        for a, b in zip(floats(found), expected, strict=True)
    ]
    return max(gaps)


def training_step(model: nn.Module, inputs: Any) -> tuple[float, float, int]:
    """The loss before and after one step against targets beside the outputs; how many parameters got no gradient."""
    args, kwargs = as_call(inputs)
    model.train()
    torch.manual_seed(1)
    with torch.no_grad():
        targets = [t + torch.randn_like(t) * t.std().clamp_min(0.1) for t in floats(model(*args, **kwargs))]

    def loss() -> Tensor:
        torch.manual_seed(2)  # the same dropout
        return sum(
            (
                nn.functional.mse_loss(t, wanted)
                for t, wanted in zip(floats(model(*args, **kwargs)), targets, strict=True)
            ),
            torch.zeros(()),
        )

    before = loss()
    before.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    square = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p.sub_(0.05 * before.detach() / square * p.grad)  # to first order the loss falls by a twentieth
        after = loss()
    return float(before), float(after), sum(p.grad is None for p in parameters)


def main(folder: Path) -> None:
    """Opens the file, compares, exports, trains."""
    if "transformers" in sys.modules:
        raise RuntimeError("transformers is imported already: nothing would be proved")
    sys.modules["transformers"] = None  # type: ignore[assignment] # whoever imports it gets an ImportError
    call = torch.load(folder / "call.pt", weights_only=True)
    model = fw.load(folder / "model.fw")
    if not isinstance(model, Wired):
        raise TypeError(f"the file opens as a {type(model).__name__}, a Wired was expected")
    args, kwargs = as_call(call["inputs"])
    with torch.no_grad():
        found: dict[str, Any] = {"moved": difference(model(*args, **kwargs), call["outputs"])}
    try:
        report = onnx(model, folder / "model.onnx", example_inputs=call["inputs"])
        found |= {"onnx_difference": report.difference, "onnx_dynamic_batch": report.dynamic_batch}
    except fw.FeatherweightError as error:
        found["onnx_failed"] = str(error)
    found["loss_before"], found["loss_after"], found["without_gradient"] = training_step(model, call["inputs"])
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
