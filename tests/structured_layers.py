"""What every structured layer must keep, whatever its structure; the claim tests of the sharing methods use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import featherweight as fw
from featherweight.core.cost import cost
from featherweight.core.layers import build_layer, layer_spec
from featherweight.core.structured import StructuredConv2d, StructuredLayer, from_dense
from featherweight.core.surgery import swap

DENSE = {
    "square": lambda: nn.Linear(12, 12, bias=False),
    "wide": lambda: nn.Linear(15, 8, bias=False),
    "tall": lambda: nn.Linear(6, 20),
    "conv": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
}


def inputs(layer: nn.Module) -> torch.Tensor:
    return torch.randn(3, 4, 7, 7) if isinstance(layer, StructuredConv2d) else torch.randn(3, int(layer.in_features))  # type: ignore[arg-type]


def check_structure(told: tuple[Any, ...], folder: Path, *, kinds: tuple[str, ...] = tuple(DENSE)) -> None:
    """Its product is that of its matrix, its gradients are right, what is counted is there, a file gives it back."""
    for kind in kinds:
        dense = DENSE[kind]()
        layer = from_dense(dense, told)
        check_product(dense, layer)
        check_counts(layer)
        if dense.bias is not None:  # tracing takes time: a linear layer and a convolution are enough
            check_file(dense, layer, folder)


def check_product(dense: nn.Module, layer: StructuredLayer) -> None:
    x = inputs(layer)
    weight, bias = layer.dense(), layer.bias
    assert weight.shape == dense.weight.shape
    plain = F.conv2d(x, weight, bias, 2, 1, 1, 2) if isinstance(layer, StructuredConv2d) else F.linear(x, weight, bias)
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(plain.square().sum(), list(layer.parameters()), retain_graph=True)
    found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def check_counts(layer: StructuredLayer) -> None:
    x = inputs(layer)
    told = cost(nn.Sequential(layer), x)
    bias = 0 if layer.bias is None else layer.bias.numel()
    assert told.params == layer.matrix.size + bias == sum(p.numel() for p in layer.parameters())
    assert told.layers["0"].macs == round(layer.macs(x.shape, layer(x).shape) / len(x))
    assert not list(layer.buffers()), "what follows from the settings is not stored"
    again = build_layer(json.loads(json.dumps(layer_spec(layer))))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def check_file(dense: nn.Module, layer: StructuredLayer, folder: Path) -> None:
    x = inputs(layer)
    model, fresh = nn.Sequential(dense, nn.Tanh()), nn.Sequential(dense, nn.Tanh())
    swap(model, "0", layer)
    fw.save(model, folder / "a.fw", example_inputs=x)
    for loaded in (fw.load(folder / "a.fw"), fw.load(folder / "a.fw", into=fresh)):
        assert torch.equal(loaded.eval()(x), model.eval()(x))
    report = fw.export.onnx(model, folder / "a.onnx", example_inputs=x)
    assert report.difference is not None
    assert report.difference < 1e-5
