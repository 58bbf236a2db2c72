"""Cross-layer equalization: the same range for every channel of neighbouring layers, and the same function.

Markus Nagel, Mart van Baalen, Tijmen Blankevoort, Max Welling, "Data-free quantization through weight equalization and
bias correction", ICCV 2019, arXiv:1906.04721, sec. 4.1 and 4.2. With a positive scale `s_i` per channel and a
positively homogeneous activation `f` between two layers,

    W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1),    s_i = sqrt(r1_i / r2_i)

with `r1_i` the range of what makes channel `i` and `r2_i` of what reads it, gives both the same range in every channel.
`absorb_bias` moves what a ReLU never cuts off into the next layer: `c = max(0, beta - 3 |gamma|)` of the batch norm
behind the first layer, `b1 - c` and `b2 + W2 c`.

Departs from the paper: a range is `max|W|` (zero is on every grid here), and biases are absorbed only into layers that
do not pad, where it is exact for all inputs above `c`. ReLU6 stays as it is unless `relu6="replace"`, since scales do
not commute with its upper end.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.catalogue import recipe
from featherweight.core.fold import fold_batchnorm, norms_behind
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.ledger import note, skip
from featherweight.core.pairs import (
    IDLE,
    SHAPES,
    Pair,
    Weighted,
    equalize_pairs,
    find_pairs,
    incoming,
    layers_of,
    on_grids,
    ranges,
)
from featherweight.core.surgery import swap
from featherweight.core.task import Task
from featherweight.errors import CompressionError

SIGMAS = 3
Normals = dict[str, tuple[Tensor, Tensor]]  # layer -> (beta, |gamma|) of the batch norm that was behind it


@recipe(paper="Nagel et al., ICCV 2019, arXiv:1906.04721", family="quantize", small={"relu6": "keep"})
def equalize(
    model: nn.Module, task: Task, *, absorb_bias: bool = False, relu6: Literal["keep", "replace"] = "keep"
) -> nn.Module:
    """Folds batch norms and gives neighbouring layers the same range in every channel, the function unchanged.

    It saves nothing by itself: grids of few scales, set up afterwards, lose less.

    Args:
        absorb_bias: also move large biases through ReLUs into the next layer, which changes the function where a
            channel falls more than three deviations below its mean.
        relu6: "keep", or "replace" ReLU6 by ReLU, which changes the function where an activation exceeds 6.

    Raises:
        CompressionError: no two layers can be equalized, or the network is on grids already.
        TraceError: the model cannot be traced.
    """
    if on_grids(model):
        raise CompressionError("the network is on grids that fit its present scales: equalize it before quantizing it")
    if relu6 == "replace":
        _replace_relu6(model)
    masked = masked_names(model)
    bake(model)
    normals = _normals(model, task)
    fold_batchnorm(model, task.inputs())
    # 1. Pairs of layers with nothing between them that minds a positive scale.
    pairs, reasons = find_pairs(model, task.inputs())
    for path, why in reasons.items():
        skip(path, f"not equalized with what follows: {why}")
    if not pairs:
        raise CompressionError(
            "no two layers are joined by a ReLU, a pooling or nothing alone, so there is nothing to equalize: leave "
            "equalize out, or replace activations (relu6='replace' makes ReLUs of ReLU6)"
        )
    # 2. Scale them, pair after pair, until all ranges agree.
    before = _spread(model, pairs)
    scales, passes = equalize_pairs(model, pairs)
    note(
        f"{len(pairs)} pairs of layers equalized in {passes} passes: the largest ratio of a channel's two ranges fell "
        f"from {before:.3g} to {_spread(model, pairs):.3g}"
    )
    # 3. What a ReLU lets through for (almost) all inputs needs no range.
    if absorb_bias:
        _absorb(model, pairs, {path: _low(normals[path], scales[path]) for path in normals.keys() & scales.keys()})
    mask_zeros(model, masked)
    return model


def _replace_relu6(model: nn.Module) -> None:
    found = [path for path, module in model.named_modules() if isinstance(module, nn.ReLU6)]
    for path in found:
        swap(model, path, nn.ReLU())
    note(f"{len(found)} ReLU6 were replaced by ReLU: the function differs where an activation exceeds 6")


def _spread(model: nn.Module, pairs: list[Pair]) -> float:
    """The largest ratio between the ranges that one channel has in its two layers."""
    found = [0.0]
    for pair in pairs:
        made, read = ranges(model, pair)
        alive = (made > 0) & (read > 0)
        found += (made[alive] / read[alive]).log().abs().tolist()
    return float(torch.tensor(max(found)).exp())


def _normals(model: nn.Module, task: Task) -> Normals:
    """The mean and deviation that a batch norm gives a layer's outputs, before it is folded."""
    found: Normals = {}
    for path, norm_path in norms_behind(model, task.inputs()).items():
        norm = model.get_submodule(norm_path)
        if isinstance(norm.weight, Tensor) and isinstance(norm.bias, Tensor):
            found[path] = norm.bias.detach().double().clone(), norm.weight.detach().double().abs()
    return found


def _low(normal: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
    """What (almost) every value of a channel exceeds, if that is above zero (channels,)."""
    beta, gamma = normal
    return ((beta - SIGMAS * gamma) / scale.to(beta)).clamp_min(0)


@torch.no_grad()
def _absorb(model: nn.Module, pairs: list[Pair], low: dict[str, Tensor]) -> None:
    """Moves `low` through a ReLU into the next layer's bias."""
    moved = 0
    for pair in pairs:
        first, second = layers_of(model, pair)
        if (
            pair.first not in low
            or first.bias is None
            or "relu" not in pair.through
            or set(pair.through) - SHAPES - IDLE - {"relu"}
        ):
            continue
        if not isinstance(second, nn.Linear) and any(second._reversed_padding_repeated_twice):
            skip(pair.second, f"the biases of {pair.first} are not absorbed: it pads, where there is no bias to absorb")
            continue
        first.bias.copy_(first.bias.double() - low[pair.first])
        _add_bias(second, (incoming(second, 1).double(), low[pair.first].repeat_interleave(pair.columns)))
        moved += int((low[pair.first] > 0).sum())
    note(f"the biases of {moved} channels were absorbed into the next layer")


def _add_bias(layer: Weighted, of: tuple[Tensor, Tensor]) -> None:
    """Adds what constant inputs (channels,) make of a weight (channels, what reads each) to a layer's bias."""
    weight, constants = of
    groups = getattr(layer, "groups", 1)
    outputs = layer.weight.shape[0]
    summed = weight.view(len(weight), outputs // groups, -1).sum(2) * constants[:, None]
    added = summed.view(groups, -1, outputs // groups).sum(1).flatten().to(layer.weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(added)
        layer._fw_swapped = True  # type: ignore[assignment]  # the container rebuilds it with a bias
    else:
        layer.bias.add_(added)
