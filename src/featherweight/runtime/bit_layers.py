"""Linear and Conv2d layers whose weights and inputs are packed bits: exact integers, then one scale for each output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.core.binary import SignInput, SizedSignInput, channel_dim, spread
from featherweight.core.forms import activation_form
from featherweight.core.thresholds import integer_thresholds
from featherweight.errors import BadData
from featherweight.runtime import bit_kernels
from featherweight.runtime.bit_kernels import Numbers, Quantizer, Taps
from featherweight.runtime.integers import Digits, Levels
from featherweight.runtime.popcounts import LANES
from featherweight.runtime.threads import divided

WORD = 64
BUFFER = 1 << 15  # words of patches that one thread works on: 256 kB, so that they stay in the second cache
COUNTED = 1000.0  # pairs of words of which one thread counts the bits in a microsecond, at least
PACKED = 1000.0  # values that one thread packs in a microsecond


def planes(q: Tensor, bits: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Integers (rows, k) as words (rows, bits, ceil(k / 64)); bit c % 64 of word c // 64 of plane i is of q[:, c]."""
    rows, width = q.shape
    split = (q[:, None, :] >> torch.arange(bits).view(1, -1, 1)) & 1
    spread = F.pad(split.to(torch.uint8), (0, -width % WORD))
    return np.packbits(spread.numpy(), axis=-1, bitorder="little").view(np.uint64).reshape(rows, bits, -1)


def inference_only(x: Tensor, module: nn.Module) -> Tensor:
    """The values as the kernels read them: float32, contiguous, on the CPU.

    Raises:
        BadData: the input is on another device, no float, or wants a gradient.
    """
    name = type(module).__name__
    if x.device.type != "cpu" or not x.is_floating_point():
        raise BadData(
            f"a {name} takes floats on the CPU, given {x.dtype} on {x.device}: use the model before accelerate"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise BadData(f"a {name} has no gradient: call it under torch.no_grad(), or train the model before accelerate")
    return x.detach()


def as_float32(x: Tensor, levels: Levels, shift: Tensor) -> Tensor:
    """float32 values with the same levels: wider numbers are compared before they are rounded."""
    if x.dtype == torch.float64 and levels.sign:
        x = torch.where(x - shift >= 0, torch.inf, -torch.inf)
    return x.float().contiguous()


@final
class BitLinear(nn.Module):
    """`y = products * scale + bias`, the products exact integers; x (..., in) is packed at every call.

    Args:
        digits: the integers of the weight (out, in).
        levels: the levels of the input.
        bias: of shape (out,), or None.
    """

    lanes: Tensor
    base: Tensor
    shift: Tensor

    def __init__(self, digits: Digits, levels: Levels, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = digits.q.shape
        self.levels, self.bits = levels, digits.bits
        self.sized: SizedSignInput | None = None
        self.register_buffer("shift", torch.zeros(self.in_features))
        whole = -self.out_features % LANES  # outputs that fill the last block, and are left out when it is written
        digits = Digits(
            F.pad(digits.q, (0, 0, 0, whole)),
            F.pad(digits.z, (0, whole), value=int(digits.z[0])),
            F.pad(digits.half, (0, whole)),
            digits.bits,
        )
        bias = None if bias is None else F.pad(bias, (0, whole))
        rows = planes(digits.q, digits.bits)
        lanes = rows.reshape(-1, LANES, *rows.shape[1:]).transpose(0, 2, 3, 1)  # (blocks, planes, words, LANES)
        self.register_buffer("lanes", _stored(lanes))
        self.ends = Ends(digits, levels, bias)
        ones = torch.ones(1, 1, dtype=torch.bool)
        base = _base(self.ends.xor, digits.q.sum(1, keepdim=True), ones, self.in_features, digits.z, levels.z)
        self.register_buffer("base", base[:, 0])

    def fold(self, value: Callable[[Tensor], Tensor]) -> None:
        """Signs of values of the outputs leave the layer from now on, see `Ends.fold`."""
        self.ends.fold(value, self.out_features, most(self.in_features, self.bits, self.levels.bits))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weight {self.bits} bit, input {self.levels.bits} bit"

    def forward(self, x: Tensor) -> Tensor:
        plain = inference_only(x, self)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise BadData(f"a BitLinear of {self.in_features} inputs was given a tensor of shape {tuple(x.shape)}")
        _put_aside(self, plain)
        flat = as_float32(plain, self.levels, self.shift).reshape(-1, self.in_features)
        out = torch.empty(len(flat), self.out_features)
        if out.numel():
            self._multiply(self._packed(flat), out.numpy())
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _packed(self, x: Tensor) -> Any:
        words = np.empty((len(x), self.levels.bits, self.lanes.shape[2]), dtype=np.uint64)
        work = partial(bit_kernels.pack_rows, x.numpy(), quantizer(self.levels, self.shift), words)
        divided(work, len(x), x.numel() * self.levels.bits / PACKED)
        return words

    def _multiply(self, words: Any, out: Any) -> None:
        lanes, numbers = _words(self.lanes).reshape(-1), self.ends.numbers(self.base)
        work = partial(bit_kernels.linear, words, lanes, self.bits, numbers, out)
        divided(work, len(self.lanes), len(words) * self.levels.bits * self.lanes.numel() / COUNTED)


@final
class BitConv2d(nn.Module):
    """A convolution as `products * scale + bias`, the products exact integers; x (n, in, h, w) is packed at every call.

    Padding with zeros is exact also where zero is no level: taps beside the image count for nothing.

    Args:
        digits: the integers of the weight (out, in / groups, kh, kw).
        levels: the levels of the input.
        layer: whose bias, groups, stride, padding and dilation these are.
    """

    rows: Tensor
    totals: Tensor
    z: Tensor
    shift: Tensor

    def __init__(self, digits: Digits, levels: Levels, layer: nn.Conv2d) -> None:
        super().__init__()
        self.out_channels, self.in_channels, self.groups = layer.out_channels, layer.in_channels, layer.groups
        self.levels, self.bits, self.padding_mode = levels, digits.bits, layer.padding_mode
        self.sized: SizedSignInput | None = None
        self.register_buffer("shift", torch.zeros(self.in_channels))
        around = tuple(layer._reversed_padding_repeated_twice)  # (left, right, top, bottom)
        self.padding, self.kernel = (around if any(around) else (0, 0, 0, 0)), tuple(layer.kernel_size)
        self.stride, self.dilation = tuple(layer.stride), tuple(layer.dilation)
        by_tap = digits.q.permute(0, 2, 3, 1)  # (out, kh, kw, in / groups): channels of a tap lie together
        self.register_buffer("rows", _stored(planes(by_tap.flatten(1), digits.bits)))
        self.register_buffer("totals", by_tap.sum(3).flatten(1))
        self.register_buffer("z", digits.z.clone())
        self.ends = Ends(digits, levels, layer.bias)

    def fold(self, value: Callable[[Tensor], Tensor]) -> None:
        """Signs of values of the outputs leave the layer from now on, see `Ends.fold`."""
        terms = self.in_channels // self.groups * self.totals.shape[1]
        self.ends.fold(value, self.out_channels, most(terms, self.bits, self.levels.bits))

    def extra_repr(self) -> str:
        shape = f"{self.in_channels}, {self.out_channels}, kernel {self.kernel}, groups {self.groups}"
        return f"{shape}, weight {self.bits} bit, input {self.levels.bits} bit"

    def forward(self, x: Tensor) -> Tensor:
        plain = inference_only(x, self)
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise BadData(f"a BitConv2d of {self.in_channels} channels was given a tensor of shape {tuple(x.shape)}")
        _put_aside(self, plain)
        images = plain if x.dim() == 4 else plain[None]
        around = self.padding
        if self.padding_mode != "zeros":
            images, around = F.pad(images, around, mode=self.padding_mode), (0, 0, 0, 0)
        places = places_of(tuple(images.shape[2:]), self.kernel, self.stride, around, self.dilation)
        out = torch.empty(len(images), self.out_channels, *places.shape)
        if out.numel():
            packed = self._packed(as_float32(images, self.levels, spread(self.shift, -3)), around)
            self._multiply(packed, places, out.view(len(out), self.out_channels, -1).numpy())
        return (out if x.dim() == 4 else out[0]).to(x.dtype)

    def _packed(self, x: Tensor, around: tuple[int, ...]) -> Any:
        n, _, height, width = x.shape
        channels = self.in_channels // self.groups
        left, right, top, bottom = around
        deep = -(-channels // WORD)
        shape = (n, self.groups, self.levels.bits, deep, height + top + bottom, width + left + right)
        words = np.zeros(shape, dtype=np.uint64)
        grouped = x.view(n, self.groups, channels, height, width).numpy()
        work = partial(bit_kernels.pack_images, grouped, quantizer(self.levels, self.shift), words, (top, left))
        divided(work, n * self.groups * deep, x.numel() * self.levels.bits / PACKED)
        return words.reshape(*shape[:4], -1)

    def _multiply(self, words: Any, places: Places, out: Any) -> None:
        n, pixels, length = len(words), out.shape[2], self.rows.shape[2]
        blocks = -(-pixels // LANES)
        runs = -(-blocks * length * LANES * self.levels.bits // BUFFER)
        if n * self.groups == 1:  # one image: as many runs as there are threads
            runs = max(runs, min(blocks, torch.get_num_threads()))
        together = -(-blocks // min(runs, blocks))  # runs of one length
        channels = self.in_channels // self.groups
        base = _base(self.ends.xor, self.totals, places.inside, channels, self.z, self.levels.z)
        where = Taps(channels, places.taps, places.corners, places.kinds, together)
        work = partial(bit_kernels.convolve, words, _words(self.rows), where, self.ends.numbers(base), out)
        jobs = n * self.groups * -(-pixels // (together * LANES))
        divided(work, jobs, n * pixels * self.levels.bits * self.rows.numel() / COUNTED)


@dataclass(frozen=True)
class Places:
    """Where the taps of every output pixel lie on the padded image, as offsets into its positions."""

    shape: tuple[int, int]
    corners: Any  # (pixels,)
    taps: Any  # (kh * kw,)
    kinds: Any  # (pixels,): pixels of one kind have the same taps on the image
    inside: Tensor  # (kinds, taps)


@lru_cache(maxsize=64)
def places_of(
    image: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    around: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Places:
    """The places for images of one size.

    Raises:
        BadData: the image is smaller than the kernel.
    """
    left, right, top, bottom = around
    padded = (image[0] + top + bottom, image[1] + left + right)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    shape = [(p - r) // s + 1 for p, r, s in zip(padded, reach, stride, strict=True)]
    if min(shape) < 1:
        raise BadData(
            f"an image of {image[0]} x {image[1]} is too small for a kernel that reaches {reach[0]} x {reach[1]}"
        )
    starts = [np.arange(n) * s for n, s in zip(shape, stride, strict=True)]
    steps = [np.arange(k) * d for k, d in zip(kernel, dilation, strict=True)]
    found = [
        np.unique((at[:, None] + step >= before) & (at[:, None] + step < before + size), axis=0, return_inverse=True)
        for at, step, before, size in zip(starts, steps, (top, left), image, strict=True)
    ]
    (rows, row), (columns, column) = found
    inside = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(len(rows) * len(columns), -1)
    kinds = row.reshape(-1, 1) * len(columns) + column.reshape(1, -1)
    corners, taps = ((a[:, None] * padded[1] + b).reshape(-1) for a, b in (starts, steps))
    return Places((shape[0], shape[1]), corners, taps, kinds.reshape(-1), torch.from_numpy(inside))


# --- what both have ---------------------------------------------------------------------------------------------------


@final
class Ends(nn.Module):
    """What becomes of the counts of every output; thresholds are empty until batch norm and signs are folded in."""

    beta: Tensor
    scale: Tensor
    bias: Tensor
    threshold: Tensor
    direction: Tensor

    def __init__(self, digits: Digits, levels: Levels, bias: Tensor | None) -> None:
        super().__init__()
        outputs = len(digits.q)
        self.xor = levels.binary and digits.binary
        self.register_buffer("beta", torch.zeros(outputs, dtype=torch.int32) if self.xor else (2 * digits.z).int())
        self.register_buffer("scale", (digits.half.double() * levels.half).float())
        self.register_buffer("bias", torch.zeros(outputs) if bias is None else bias.detach().float().clone())
        self.register_buffer("threshold", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("direction", torch.zeros(0, dtype=torch.int32))

    def fold(self, value: Callable[[Tensor], Tensor], outputs: int, most: int) -> None:
        """Puts what follows and `>= 0` into one comparison of integers; from then on +1 and -1 leave the layer.

        Args:
            value: what becomes of the layer's results (n, outputs) before their sign is taken; it rises or falls.
            most: no product of integers is larger than this.
        """
        scale, bias = self.scale[:outputs], self.bias[:outputs]
        found = integer_thresholds(lambda products: value(products * scale + bias), outputs, -most, most)
        filled = (0, len(self.scale) - outputs)  # outputs that fill the last block of a linear layer
        self.threshold, self.direction = (F.pad(t.int(), filled) for t in (found.threshold, found.direction))

    def numbers(self, base: Tensor) -> Numbers:
        """As the kernels read them."""
        scaled = (self.scale.float().numpy(), self.bias.float().numpy())
        ends = (self.threshold.numpy(), self.direction.numpy())
        return Numbers(self.xor, self.beta.numpy(), *scaled, *ends, base.numpy())


def most(terms: int, weight_bits: int, bits: int) -> int:
    """No sum of so many products of integers in half steps is larger."""
    return 4 * terms * (2**weight_bits - 1) * (2**bits - 1)


def _base(xor: bool, totals: Tensor, inside: Tensor, channels: int, z_weight: Tensor, z_input: int) -> Tensor:
    """What is added to the counts of every output, for every kind of pixel: (out, kinds).

    Args:
        totals: sum of q over the channels of a tap (out, taps).
        inside: which taps of a kind lie on the image (kinds, taps).
    """
    counted = totals @ inside.long().T
    values = channels * inside.sum(1)
    if xor:  # beside the image the bits are zeros, and differ from the ones of the weight
        return (values + 2 * (totals.sum(1, keepdim=True) - counted)).int().contiguous()
    return (values * z_input * z_weight[:, None] - 2 * z_input * counted).int().contiguous()


def quantizer(levels: Levels, shift: Tensor) -> Quantizer:
    """As the kernels read it."""
    numbers = (np.float32(v) for v in (levels.inverse, levels.zero, levels.low, levels.high))
    return Quantizer(levels.sign, shift.float().numpy(), *numbers)


def _stored(words: Any) -> Tensor:
    """Words as a tensor that every state dict can hold."""
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int64))


def _words(tensor: Tensor) -> Any:
    return tensor.numpy().view(np.uint64)


def _put_aside(layer: BitLinear | BitConv2d, x: Tensor) -> None:
    """Leaves the mean sizes of the input for the form on the output of the same call, as the form itself does."""
    if layer.sized is not None:
        layer.__dict__["_fw_aside"] = layer.sized.size(x - spread(layer.shift, layer.sized.dim))


def packed(layer: nn.Module, digits: Digits, levels: Levels) -> BitLinear | BitConv2d | str:
    """The packed form of a Linear or Conv2d with these integers, or why there is none."""
    made = _packed(layer, digits, levels)
    form = activation_form(layer, "input")
    if isinstance(made, nn.Module) and isinstance(form, (SignInput, SizedSignInput)):
        if form.shift.shape != made.shift.shape or form.dim != channel_dim(layer):
            return "the shifts of its input are not those of its channels"
        made.shift.copy_(form.shift.detach())
        made.sized = form if isinstance(form, SizedSignInput) else None
    return made


def _packed(layer: nn.Module, digits: Digits, levels: Levels) -> BitLinear | BitConv2d | str:
    terms = digits.q[0].numel() if len(digits.q) else 0
    if terms == 0:
        return "it has no weights"
    if most(terms, digits.bits, levels.bits) >= 2**30:
        return f"sums of {terms} products of {digits.bits} and {levels.bits} bits can exceed 30 bits"
    if isinstance(layer, nn.Conv2d):
        return BitConv2d(digits, levels, layer)
    if isinstance(layer, nn.Linear):
        return BitLinear(digits, levels, layer.bias)
    return f"a {type(layer).__name__} is neither a Linear nor a Conv2d"
