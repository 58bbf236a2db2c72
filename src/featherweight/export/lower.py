"""Declared grids as two operators of our own, which torch.export keeps whole and which become one ONNX node each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.core.forms import ACTIVATIONS, Affine, Codes, Product, Table, activation_form, along, codes_of
from featherweight.core.grids import ActivationGrid, Steps
from featherweight.core.structured import StructuredLayer

NODES = 16_384  # bytes that the operators take which make a structured weight, at most about
FREE = "structured_"  # what buffers of free parameters are called, and only they
STORED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Embedding)


@dataclass
class Lowered:
    """A model whose grids are operators, how many there are, and what has to be said about the rest."""

    model: nn.Module
    weights: int = 0
    blocked: int = 0
    shifted: int = 0
    looked_up: int = 0
    halves: int = 0
    grids: int = 0
    notes: list[str] = field(default_factory=list)


def lower(model: nn.Module) -> Lowered:
    """Puts operators in place of the grids of a baked model, in place."""
    lowered = Lowered(model)
    for path, module in model.named_modules():
        _lower_weight(lowered, path, module)
        if isinstance(module, StructuredLayer):
            _lower_structure(lowered, path, module)
        for at in ACTIVATIONS:
            form = activation_form(module, at)
            if at == "grad" and form is not None:
                module._modules[f"fw_{at}"] = nn.Identity()
            elif isinstance(form, ActivationGrid):
                module._modules[f"fw_{at}"] = OnGrid(form.steps())
                lowered.grids += 1
            elif form is not None:
                lowered.notes.append(f"{path}: the {type(form).__name__} on its {at} is exported as float operators")
    return lowered


def _lower_weight(lowered: Lowered, path: str, module: nn.Module) -> None:
    if not isinstance(module, STORED):
        return
    codes = codes_of(module)
    stored: nn.Module | None
    if codes is not None and (found := int8(codes)) is not None:
        stored = Stored(*found)
        lowered.weights += 1
    elif codes is not None and (stored := blocked(codes)) is not None:
        lowered.blocked += 1
    elif codes is not None and (stored := shifted(codes)) is not None:
        lowered.shifted += 1
    elif codes is not None and (stored := looked_up(codes)) is not None:
        lowered.looked_up += 1
    elif (half := _half(module.weight.detach())) is not None:
        stored = Halved(half)
        lowered.halves += 1
    elif codes is not None:
        kind = type(codes.rule).__name__.lower()
        lowered.notes.append(f"{path}: weights stay float, exact (their {kind} codes are no short grid or table)")
        return
    else:
        return
    parametrize.register_parametrization(module, "weight", stored, unsafe=True)


def _half(weight: Tensor) -> Tensor | None:
    """A float32 weight in the type of 16 bits that holds it exactly, if one does."""
    if weight.dtype != torch.float32:
        return None
    halves = (weight.to(kind) for kind in (torch.float16, torch.bfloat16))
    return next((half for half in halves if torch.equal(half.float(), weight)), None)


def _lower_structure(lowered: Lowered, path: str, module: StructuredLayer) -> None:
    """A structured layer becomes the plain layer with the weight that it makes; hooks on it stay."""
    word, matrix = module.structure[0], module.matrix
    one = torch.ones(1, dtype=torch.int64)
    longer = 4 * matrix.size + NODES >= 4 * matrix.rows * matrix.columns
    if longer or matrix.portable(module.free, one) is None:
        module.register_buffer("made", module.dense().detach())
        module.forward = lambda x: module.through(x, module.get_buffer("made"), module.biases)
        lowered.notes.append(f"{path}: its {word} weight is written out whole, the ONNX file is no smaller")
        return
    for name, value in {**module.free, "one": one}.items():
        module.register_buffer(f"{FREE}{name}", value.detach())
    names = tuple(module.free)

    def forward(x: Tensor) -> Tensor:
        free = {name: module.get_buffer(f"{FREE}{name}") for name in names}
        made = cast(Tensor, matrix.portable(free, module.get_buffer(f"{FREE}one")))
        return module.through(x, made.view(module.weight_shape), module.biases)

    module.forward = forward
    lowered.notes.append(f"{path}: its {word} weight is made from its free parameters when the ONNX file is loaded")


def int8(codes: Codes) -> tuple[Tensor, Tensor, int] | None:
    """Codes as (int8 symbols around zero, scale, axis), equal to the weight bit for bit; None where int8 cannot.

    A zero point between two integers (DoReFa's levels) is absorbed by half the scale and odd symbols; a table may be a
    grid too (DoReFa's levels and the zero of a mask).
    """
    rule = codes.rule
    if isinstance(rule, Table):
        return _even(codes, rule)
    if not isinstance(rule, Affine) or rule.block is not None:
        return None
    centred = codes.symbols.view(codes.shape) - along(rule.zero_point, rule.axis, len(codes.shape)).double()
    half = 1 if bool((centred == centred.round()).all()) else 2
    symbols, scale = centred * half, rule.scale / half
    if not bool(((symbols == symbols.round()) & (symbols.abs() <= 127)).all()):
        return None
    found = symbols.to(torch.int8), scale.contiguous(), rule.axis or 0
    return found if torch.equal(dequantize(*found), codes.decode()) else None


def _even(codes: Codes, table: Table) -> tuple[Tensor, Tensor, int] | None:
    """A table whose values are whole multiples of the smallest."""
    sizes = table.values.abs()
    if not bool((sizes > 0).any()):
        return None
    step = sizes[sizes > 0].min()
    symbols = (codes.decode() / step).round()
    if not bool((symbols.abs() <= 127).all()) or not torch.equal(symbols * step, codes.decode()):
        return None
    return symbols.to(torch.int8), step.clone(), 0


def blocked(codes: Codes) -> Blocked | None:
    """Codes with a scale a block as integers in the rows of a matrix, equal to the weight bit for bit; None if not."""
    rule = codes.rule
    if not isinstance(rule, Affine) or rule.block is None or bool(rule.zero_point.any()):
        return None
    rows = codes.shape[0]
    symbols = codes.symbols.reshape(rows, -1)
    if symbols.shape[1] % rule.block or bool((symbols < -128).any() | (symbols > 127).any()):
        return None
    stored = Blocked(symbols.to(torch.int8), rule.scale.reshape(rows, -1), rule.block, codes.shape)
    return stored if torch.equal(stored(torch.empty(0)), codes.decode()) else None


class Blocked(nn.Module):
    """A weight of integers with a scale for each run of them within a row."""

    symbols: Tensor
    scale: Tensor

    def __init__(self, symbols: Tensor, scale: Tensor, block: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("symbols", symbols)
        self.register_buffer("scale", scale.contiguous())
        self.block, self.shape = block, shape

    def forward(self, weight: Tensor) -> Tensor:
        return dequantize_blocks(self.symbols, self.scale, self.block).reshape(self.shape)


def shifted(codes: Codes) -> Shifted | None:
    """Integers of one or two bytes around any zero point, one scale for each channel or block; None where too long."""
    rule = codes.rule
    if not isinstance(rule, Affine):
        return None
    low, high = (int(v) for v in codes.symbols.aminmax())
    kinds = (torch.uint8, torch.int8, torch.int16)
    kind = next((k for k in kinds if torch.iinfo(k).min <= low and high <= torch.iinfo(k).max), None)
    rows, axis = (codes.shape, rule.axis) if rule.block is None else ((-1, rule.block), 0)
    scale, zero = (along(v, axis if v.numel() > 1 else None, len(rows)) for v in (rule.scale, rule.zero_point))
    side = 4 * (scale.numel() + zero.numel())
    if kind is None or codes.symbols.numel() * kind.itemsize + side >= 4 * codes.symbols.numel():
        return None
    found = Shifted(codes.symbols.view(codes.shape).reshape(rows).to(kind), zero.to(scale.dtype), scale, codes.shape)
    return found if torch.equal(found(codes.decode()), codes.decode()) else None


class Shifted(nn.Module):
    """A weight that is computed from integers, zero points and scales: `(symbols - zero) * scale`, seen as `shape`."""

    symbols: Tensor
    zero: Tensor
    scale: Tensor

    def __init__(self, symbols: Tensor, zero: Tensor, scale: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("symbols", symbols)
        self.register_buffer("zero", zero)
        self.register_buffer("scale", scale)
        self.shape = shape

    def forward(self, weight: Tensor) -> Tensor:
        return ((self.symbols.to(self.scale.dtype) - self.zero) * self.scale).reshape(self.shape)


def looked_up(codes: Codes) -> LookedUp | None:
    """Codes as bytes that point into tables, equal to the weight bit for bit; None where they would be longer."""
    rule, symbols, shape = codes.rule, codes.symbols.long(), codes.shape
    offset, axis = torch.zeros((), dtype=torch.int64), None
    if isinstance(rule, Product):
        vectors = rule.codebooks.reshape(-1, rule.codebooks.shape[-1])
        books, size = rule.codebooks.shape[-3], rule.codebooks.shape[-2]
        offset = size * torch.arange(len(vectors) // size).view(-1, 1, books)
        symbols, axis = symbols.view(-1, rule.rows(shape), books), rule.axis
    elif isinstance(rule, Table):
        vectors, size = rule.values.reshape(-1, 1), rule.values.shape[-1]
        symbols = symbols.view(shape)
        if rule.axis is not None:
            offset = along(size * torch.arange(len(rule.values)), rule.axis, len(shape))
        symbols = symbols.unsqueeze(0)
    else:
        return None
    held = symbols.numel() + 8 * offset.numel() + 4 * vectors.numel()  # bytes, integers of 64 bits, floats
    short = size <= 256 and held < 4 * codes.decode().numel()
    return LookedUp(symbols.to(torch.uint8), offset, vectors, shape, axis) if short else None


class LookedUp(nn.Module):
    """A weight whose values stand in tables: `sum over stages of vectors[symbols + offset]`, seen as `shape`.

    With `axis` that dimension of the weight is the last of what was looked up.
    """

    symbols: Tensor
    offset: Tensor
    vectors: Tensor

    def __init__(
        self, symbols: Tensor, offset: Tensor, vectors: Tensor, shape: tuple[int, ...], axis: int | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("symbols", symbols)
        self.register_buffer("offset", offset)
        self.register_buffer("vectors", vectors)
        self.shape, self.axis = shape, axis

    def forward(self, weight: Tensor) -> Tensor:
        stages = self.vectors[self.symbols.to(torch.int64) + self.offset]
        total = stages[0]
        for stage in stages[1:]:
            total = total + stage
        return Product(self.vectors, self.axis).placed(total, self.shape)


class Halved(nn.Module):
    """A float32 weight that float16 or bfloat16 holds exactly."""

    half_precision: Tensor

    def __init__(self, half: Tensor) -> None:
        super().__init__()
        self.register_buffer("half_precision", half)

    def forward(self, weight: Tensor) -> Tensor:
        return self.half_precision.to(torch.float32)


class Stored(nn.Module):
    """A weight that is computed from int8 symbols."""

    def __init__(self, symbols: Tensor, scale: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("symbols", symbols)
        self.register_buffer("scale", scale)
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        return dequantize(self.symbols, self.scale, self.axis)


class OnGrid(nn.Module):
    """An activation that is rounded to a grid of constants."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, value: Tensor) -> Tensor:
        s = self.steps
        return on_grid(value, s.scale, s.zero_point, s.low, s.high)


@torch.library.custom_op("featherweight::dequantize", mutates_args=())
def dequantize(symbols: Tensor, scale: Tensor, axis: int) -> Tensor:
    """`symbols * scale`, one scale in all or one per index of `axis`."""
    return symbols.to(scale.dtype) * along(scale, axis, symbols.dim())


@dequantize.register_fake
def _(symbols: Tensor, scale: Tensor, axis: int) -> Tensor:
    return symbols.new_empty(symbols.shape, dtype=scale.dtype)


@torch.library.custom_op("featherweight::dequantize_blocks", mutates_args=())
def dequantize_blocks(symbols: Tensor, scale: Tensor, block: int) -> Tensor:
    """`symbols * scale`, both matrices, one scale for each run of `block` symbols of a row."""
    return symbols.to(scale.dtype) * scale.repeat_interleave(block, 1)


@dequantize_blocks.register_fake
def _(symbols: Tensor, scale: Tensor, block: int) -> Tensor:
    return symbols.new_empty(symbols.shape, dtype=scale.dtype)


@torch.library.custom_op("featherweight::on_grid", mutates_args=())
def on_grid(value: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """`value` rounded to a grid."""
    return torch.fake_quantize_per_tensor_affine(value, scale, zero_point, low, high)


@on_grid.register_fake
def _(value: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(value)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ONNX nodes of our operators, as torch.onnx takes them."""
    import numpy
    from onnx import numpy_helper
    from onnxscript import opset18 as op
    from onnxscript import opset21

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=numpy_helper.from_array(numpy.asarray(value, dtype=dtype)))

    def store(symbols: Any, scale: Any, axis: int) -> Any:
        return op.DequantizeLinear(symbols, scale, axis=axis)

    def store_blocks(symbols: Any, scale: Any, block: int) -> Any:
        return opset21.DequantizeLinear(symbols, scale, axis=1, block_size=block)

    def grid(value: Any, scale: float, zero_point: int, low: int, high: int) -> Any:
        dtype = numpy.int8 if low < 0 else numpy.uint8
        limits = numpy.iinfo(dtype)
        step = constant(scale, numpy.float32)
        if (low, high) != (limits.min, limits.max):
            edges = ((low - zero_point) * scale, (high - zero_point) * scale)
            value = op.Clip(value, constant(edges[0], numpy.float32), constant(edges[1], numpy.float32))
        if low < limits.min or high > limits.max:  # too many levels for eight bits: the same arithmetic in float
            return op.Mul(op.Round(op.Div(value, step)), step)
        zero = constant(zero_point, dtype)
        return op.DequantizeLinear(op.QuantizeLinear(value, step, zero), step, zero)

    return {
        torch.ops.featherweight.dequantize.default: store,
        torch.ops.featherweight.dequantize_blocks.default: store_blocks,
        torch.ops.featherweight.on_grid.default: grid,
    }
