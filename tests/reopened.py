"""Files in a fresh process that cannot import transformers: `python reopened.py folder ...` fills `found.json`.

A folder holds `model.fw`, and `call.pt` with inputs and the outputs that are expected.
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
    steps = [(p, p.detach().clone(), p.grad / square) for p in parameters if p.grad is not None]
    with torch.no_grad():
        for share in (1e-2, 1e-3, 1e-4):  # by which the loss falls to first order, where the step is short enough
            for p, old, direction in steps:
                p.copy_(old - share * before.detach() * direction)
            after = loss()
            if after < before:
                break
    return float(before), float(after), sum(p.grad is None for p in parameters)


def found(folder: Path) -> dict[str, Any]:
    """Opens the file, compares, exports, trains."""
    call = torch.load(folder / "call.pt", weights_only=True)
    model = fw.load(folder / "model.fw")
    if not isinstance(model, Wired):
        return {"failed": f"the file opens as a {type(model).__name__}, a Wired was expected"}
    args, kwargs = as_call(call["inputs"])
    with torch.no_grad():
        facts: dict[str, Any] = {"moved": difference(model(*args, **kwargs), call["outputs"])}
    try:
        report = onnx(model, folder / "model.onnx", example_inputs=call["inputs"])
        facts |= {"onnx_difference": report.difference, "onnx_dynamic_batch": report.dynamic_batch}
    except fw.FeatherweightError as error:
        facts["onnx_failed"] = str(error)
    facts["loss_before"], facts["loss_after"], facts["without_gradient"] = training_step(model, call["inputs"])
    return facts


def main(folders: list[str]) -> None:
    """One after the other; an error ends one of them only."""
    if "transformers" in sys.modules:
        raise RuntimeError("transformers is imported already: nothing would be proved")
    sys.modules["transformers"] = None  # type: ignore[assignment] # whoever imports it gets an ImportError
    for folder in map(Path, folders):
        try:
            facts = found(folder)
        except Exception as error:  # whatever it is, it is what did not work
            facts = {"failed": f"the file: {type(error).__name__}: {error}"}
        (folder / "found.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1:])
