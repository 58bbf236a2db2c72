"""Integers of eight bits on a CPU: signed weights per layer, unsigned activations, sums of 32 bits, lazy outputs."""

from __future__ import annotations

from copy import deepcopy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.allowed import Count
from featherweight.catalogue import recipe
from featherweight.core.calibration import observed, remark
from featherweight.core.forms import Affine, activation_form, attach, bake, codes_of, has_forms
from featherweight.core.grids import ActivationGrid, Place, Seen, covering
from featherweight.core.ledger import note
from featherweight.core.levels import FixedGrid, not_zero, survivors
from featherweight.core.site import sites
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.errors import BadOption

PAIR = 2**15  # sums of two products that a 16-bit integer holds lie in [-PAIR, PAIR)


@recipe(
    paper="Vanhoucke et al., NIPS workshop 2011",
    family="quantize",
    needs={"calibration"},
    shrinks={"bits"},
    small={"calibration_batches": 2},
)
def vanhoucke_int8(
    model: nn.Module,
    task: Task,
    *,
    largest: Literal[127, 64] = 127,
    calibration_batches: Count = 16,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Signed 8-bit weights with one scale a layer, unsigned 8-bit activations, float biases and softmax; no training.

    Vincent Vanhoucke, Andrew Senior, Mark Z. Mao, "Improving the speed of neural networks on CPUs", Deep Learning and
    Unsupervised Feature Learning Workshop, NIPS 2011. Activations of sigmoids become `round(255 a)`, weights
    `round(127 w / max|W|)` of their layer, products are summed in 32 bits. x86 processors of that time add two products
    of such bytes in 16 bits and saturate (`pmaddubsw`); with weights of at most 64 they never do, with 127 they may:
    the number of pairs that could is noted (`saturated_sums` is that arithmetic). `lazy_logits` computes only the
    outputs that are asked for, exactly as all of them together.

    The linear layers of the ONNX file run in integer kernels of ONNX Runtime, sums of 32 bits and float outputs as in
    the paper; where the processor has VNNI instructions these have no such limit. Convolutions run there in float, on
    weights and inputs that are integers: their integer kernel wants integer outputs too (`int8` gives it these).

    Departs from the paper: also for convolutions, and for activations that lie outside of [0, 1], whose range, and
    integer zero point if they are negative, comes from calibration; the network's input is quantized like the rest.
    Batching and memory layout are the runtime's business. Scales are those of the weights that a mask leaves.

    Args:
        largest: the largest integer of a weight: 127, or 64, which no 16-bit sum of two products can overflow.
        calibration_batches: how many batches of the calibration (or training) data to look at.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        BadData: weights are not finite, or the calibration data are empty.
        CompressionError: every chosen layer is zero.
    """
    found = not_zero(sites(model, where, (nn.Linear, nn.Conv2d)))
    seen = observed(model, task, [(path, "input") for path in found], calibration_batches)
    grids = {path: bytes_for(held) for (path, _), held in seen.items()}
    for path, site in found.items():
        scale = survivors(site).abs().max().to(site.weight) / largest
        form = FixedGrid(scale, -largest, largest)
        attach(site.module, form, at=site.name, root=model)
        attach(site.module, grids[path], "input")
        pairs = overflowing_pairs(form.symbols(site.weight).flatten(1))
        if pairs:
            note(f"{path}: {pairs} pairs of weights could exceed 16-bit sums of products on processors without VNNI: "
                 "largest=64 avoids it")  # fmt: skip
    remark([Place(((path, "input"),)) for path in found], seen.values(), grids.values())
    note(f"{len(found)} layers in bytes: weights of at most {largest}, one scale a layer, unsigned activations")
    return model


def bytes_for(seen: Seen) -> ActivationGrid:
    """`round(255 a)` for activations in [0, 1], else the 256 levels that cover what was seen.

    >>> seen = Seen()
    >>> _ = seen(torch.tensor([0.1, 0.7]))
    >>> bytes_for(seen).steps().scale == float(torch.tensor(1 / 255))
    True
    """
    if seen.parts and seen.low >= 0 and 0 < seen.high <= 1:
        return covering(0.0, 1.0)
    return covering(seen.low, seen.high) if seen.parts else covering(0.0, 0.0)


# --- the arithmetic, exactly ------------------------------------------------------------------------------------------


def overflowing_pairs(symbols: Tensor) -> int:
    """How many neighbours in rows of integer weights (out, in) could exceed 16 bits with bytes up to 255.

    >>> overflowing_pairs(torch.tensor([[127, 127, 64, 64], [127, -127, 1, 1]]))
    1
    """
    pairs = paired(symbols.long())
    high, low = pairs.clamp_min(0).sum(-1) * 255, pairs.clamp_max(0).sum(-1) * 255
    return int(((high >= PAIR) | (low < -PAIR)).sum())


def paired(values: Tensor) -> Tensor:
    """The last dimension in twos, a zero added to an odd one."""
    return F.pad(values, (0, values.shape[-1] % 2)).unflatten(-1, (-1, 2))


def saturated_sums(activations: Tensor, symbols: Tensor) -> Tensor:
    """Products of bytes (batch, in) with integer weights (out, in), as `pmaddubsw` and 32-bit additions make them.

    Every two products are added in 16 bits and saturate; what comes out, shape (batch, out), is int64.
    """
    products = paired(activations.long()).unsqueeze(1) * paired(symbols.long()).unsqueeze(0)
    return products.sum(-1).clamp(-PAIR, PAIR - 1).sum(-1)


def integers(layer: nn.Linear) -> tuple[Tensor, float, ActivationGrid]:
    """The integer weights (out, in), their scale, and the grid of the inputs of a quantized linear layer.

    Raises:
        BadOption: the layer is not on such grids.
    """
    codes = codes_of(bake(deepcopy(layer)) if has_forms(layer) else layer)
    grid = activation_form(layer, "input")
    if codes is None or not isinstance(codes.rule, Affine) or codes.rule.scale.numel() > 1:
        raise BadOption("this layer has no integer weights with one scale: quantize it with vanhoucke_int8 first")
    if not isinstance(grid, ActivationGrid):
        raise BadOption("the inputs of this layer are on no grid: quantize it with vanhoucke_int8 first")
    symbols = codes.symbols.view(codes.shape).int() - codes.rule.zero_point.int()
    return symbols, float(codes.rule.scale), grid


def lazy_logits(layer: nn.Linear, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """The outputs (batch, rows) of a quantized linear layer, only those asked for, from 32-bit sums of integers.

    Args:
        layer: a layer that `vanhoucke_int8` has quantized, with its forms or baked.
        x: its float inputs, shape (batch, in).
        rows: which outputs; all of them when left out. What one output is does not depend on which others are asked.

    Raises:
        BadOption: the layer is not on such grids.
    """
    symbols, scale, grid = integers(layer)
    steps = grid.steps()
    rows = torch.arange(len(symbols)) if rows is None else rows
    bytes_ = (x.double() / steps.scale).round().add(steps.zero_point).clamp(steps.low, steps.high).int()
    sums = (bytes_ - steps.zero_point) @ symbols[rows].T  # int32
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()[rows]
    return (sums.double() * (scale * steps.scale) + bias).to(x.dtype)
