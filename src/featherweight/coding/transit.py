"""Packs tensors in transit: a byte for every float and a scale for every block, without a file around them.

    packed = fw.codec("dettmers8_dynamic_tree").encode(gradient)      # packed.codes travels, and packed.scales
    gradient = codec.decode(packed)

Nothing is trained, nothing remembered; what is lost is said by `Codec.table`. `Codec.exchange` is a hook for torch's
DistributedDataParallel, which then averages gradients that travelled as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, final

import torch
from torch import Tensor

from featherweight.catalogue import entry
from featherweight.core.check import whole
from featherweight.errors import BadData


@final
@dataclass(frozen=True)
class Packed:
    """A tensor of `shape` and `dtype` as `codes` (n,), bytes, and `scales` (blocks,), float32."""

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What travels: a byte for every element and four for every block."""
        return self.codes.numel() + 4 * self.scales.numel()


@final
@dataclass(frozen=True)
class Codec:
    """The nearest of at most 256 numbers of a `table` in [-1, 1], ascending, times the largest size of a block.

    Args:
        block: elements that share a scale; the whole tensor when left out.
    """

    name: str
    table: Tensor
    block: int | None = None

    def encode(self, tensor: Tensor, scales: Tensor | None = None) -> Packed:
        """A tensor as bytes and scales; given scales (blocks,) are taken as they are, and what exceeds them is cut off.

        Raises:
            BadData: the tensor is no float, holds NaN or infinity, or sizes beyond float32; or the scales given are
                not as many as its blocks, or not finite, or below zero.
        """
        if not tensor.is_floating_point():
            raise BadData(f"{self.name} packs floating-point tensors, given {tensor.dtype}: send it as it is")
        values = tensor.detach().float().flatten()
        if not bool(values.isfinite().all()):
            raise BadData(f"{self.name}: the tensor holds NaN or sizes beyond float32: look for what made them")
        rows = self._rows(values)
        if scales is None:
            scales = rows.abs().amax(1) if rows.numel() else values.new_zeros(len(rows))
        elif scales.shape != (len(rows),) or not _sizes(scales):
            raise BadData(
                f"{self.name}: given scales of shape {tuple(scales.shape)} for {len(rows)} blocks: give one for each, "
                "finite and not below zero"
            )
        size = torch.where(scales > 0, scales, torch.ones_like(scales))[:, None]
        table = self.table.to(values.device)
        places = torch.bucketize(rows / size, (table[1:] + table[:-1]) / 2)
        return Packed(places.flatten()[: len(values)].to(torch.uint8), scales, tuple(tensor.shape), tensor.dtype)

    def decode(self, packed: Packed) -> Tensor:
        """The tensor that bytes and scales stand for, in its own shape and type; NaN where `exchange` marked it so.

        Raises:
            BadData: they do not fit together, a byte has no number, or a scale is not finite or below zero.
        """
        self._check(packed)
        count = prod(packed.shape)
        values = self.table.to(packed.codes.device)[packed.codes.long()]
        spread = (self._rows(values) * packed.scales[:, None]).flatten()[:count]
        return spread.view(packed.shape).to(packed.dtype)

    def _check(self, packed: Packed) -> None:
        count, (codes, scales) = prod(packed.shape), (packed.codes, packed.scales)
        if codes.shape != (count,) or scales.shape != (len(self._rows(codes)),):
            raise BadData(
                f"{self.name}: {codes.numel()} codes and {scales.numel()} scales are no tensor of the shape "
                f"{packed.shape}: decode with the codec that encoded it, and the same block"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < len(self.table):
            raise BadData(
                f"{self.name} has {len(self.table)} numbers, given the code {int(codes.max())}: send it again"
            )
        if not _sizes(scales) and not (bool(scales.isnan().all()) and not bool(codes.any())):
            raise BadData(f"{self.name}: a scale that is not finite, or below zero: send it again")

    def _rows(self, values: Tensor) -> Tensor:
        """Elements (n,) as (blocks, elements of each), the last filled up with zeros."""
        block = self.block or max(1, len(values))
        return torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)

    def exchange(self, group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        """The mean of the gradients of all processes, which travel as bytes: `model.register_comm_hook(None, ...)`.

        Every process decodes what it sent itself, too, so that all hold the same mean. `group` is the process group,
        or None for all. Gradients that one process cannot encode (NaN, infinity, sizes beyond float32) travel as codes
        of zero with scales of NaN, and the mean is NaN on all: raised in one process, the error would leave the others
        waiting.
        """
        import torch.distributed as dist

        gradient = bucket.buffer()
        sound = bool(gradient.float().isfinite().all())
        packed = self.encode(gradient if sound else torch.zeros_like(gradient))
        if not sound:
            packed.codes.zero_()
            packed.scales.fill_(float("nan"))
        count = dist.get_world_size(group)
        codes, scales = ([torch.empty_like(one) for _ in range(count)] for one in (packed.codes, packed.scales))
        dist.all_gather(codes, packed.codes, group)
        dist.all_gather(scales, packed.scales, group)
        parts = [self.decode(Packed(c, s, packed.shape, packed.dtype)) for c, s in zip(codes, scales, strict=True)]
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(torch.stack(parts).mean(0))
        return done


def _sizes(scales: Tensor) -> bool:
    """Whether scales are finite and not below zero."""
    return bool((scales.isfinite() & (scales >= 0)).all())


def codec(name: str, *, block: int | None = None) -> Codec:
    """The codec of an id of the catalogue, such as "dettmers8_dynamic_tree".

    Args:
        block: elements that share a scale; the whole tensor when left out.

    Raises:
        UnknownName: there is no such codec.
        BadOption: block is no positive whole number.

    >>> found = codec("dettmers8_linear", block=2)
    >>> packed = found.encode(torch.tensor([1.0, -0.25, 254.0, 2.0]))
    >>> packed.codes.tolist(), packed.scales.tolist(), packed.bytes
    ([254, 95, 254, 128], [1.0, 254.0], 12)
    >>> found.decode(packed)[2:].tolist()
    [254.0, 2.0]
    """
    if block is not None:
        whole("block", block, low=1)
    found = entry(name, "codec")
    return Codec(found.id, found(), block)
