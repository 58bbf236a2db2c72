"""Linear layers of bytes: PyTorch's product of 8-bit integers, exact in 32 bits, then one scale for each output."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, final

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from featherweight.errors import BadData
from featherweight.runtime.bit_kernels import Quantizer, level
from featherweight.runtime.bit_layers import inference_only, quantizer
from featherweight.runtime.integers import Levels
from featherweight.runtime.threads import divided

MOST_TERMS = 2**31 // (255 * 256)  # products of bytes whose sum fits 32 bits
NOWHERE = torch.zeros(0)  # no signs, no shift
HANDLED = 2000.0  # values that one thread takes to bytes, or back, in a microsecond


@njit(cache=True, nogil=True)
def to_bytes(x: Any, how: Quantizer, out: Any, first: int, last: int) -> None:
    """Rows `first` to `last` of x (n, k) as unsigned bytes."""
    for n in range(first, last):
        given, found = x[n], out[n]
        for k in range(given.size):
            found[k] = np.uint8(level(given[k], k, how))


@njit(cache=True, nogil=True)
def to_floats(sums: Any, offset: Any, scale: Any, bias: Any, out: Any, first: int, last: int) -> None:
    """`out = (sums + offset) * scale + bias` for rows `first` to `last`."""
    for n in range(first, last):
        given, found = sums[n], out[n]
        for o in range(given.size):
            found[o] = np.float32(np.int32(given[o] + offset[o])) * scale[o] + bias[o]


@final
class ByteLinear(nn.Module):
    """`y = sum (u - z) v * scale + bias` with unsigned bytes u of the input and signed bytes v of the weight.

    Args:
        v: the integers of the weight (out, in), from -128 to 127.
        step: between two of them, for each output.
        levels: the levels of the input, with a whole zero point.
        bias: of shape (out,), or None.
    """

    weight: Tensor
    offset: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, v: Tensor, step: Tensor, levels: Levels, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = v.shape
        self.levels = levels
        # a transposed row counts as contiguous with a stride of one, which torch._int_mm takes for another layout
        self.register_buffer("weight", torch.empty(v.shape[::-1], dtype=torch.int8).copy_(v.T))
        self.register_buffer("offset", (-(levels.z // 2) * v.sum(1)).int())
        self.register_buffer("scale", (step.double() * levels.half * 2).float())
        self.register_buffer("bias", torch.zeros(len(v)) if bias is None else bias.detach().float().clone())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"

    def forward(self, x: Tensor) -> Tensor:
        plain = inference_only(x, self)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise BadData(f"a ByteLinear of {self.in_features} inputs was given a tensor of shape {tuple(x.shape)}")
        flat = plain.float().contiguous().reshape(-1, self.in_features)
        out = torch.empty(len(flat), self.out_features)
        if out.numel():
            sums = torch._int_mm(self._bytes(flat), self.weight)
            ends = (self.offset.numpy(), self.scale.float().numpy(), self.bias.float().numpy())
            divided(partial(to_floats, sums.numpy(), *ends, out.numpy()), len(out), out.numel() / HANDLED)
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _bytes(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=torch.uint8)
        divided(partial(to_bytes, x.numpy(), quantizer(self.levels, NOWHERE), out.numpy()), len(x), x.numel() / HANDLED)
        return out


@cache
def refused() -> str:
    """Why this build of PyTorch does not multiply bytes exactly; empty if it does."""
    u, v = torch.full((17, 256), 255, dtype=torch.uint8), torch.full((256, 16), -128, dtype=torch.int8)
    try:
        sums = torch._int_mm(u, v)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"this build of PyTorch does not multiply bytes ({str(error).splitlines()[0]})"
    exact = sums.dtype == torch.int32 and bool((sums == -255 * 128 * 256).all())
    return "" if exact else "this build of PyTorch saturates sums of bytes"
