"""Layer-wise reconstruction: rows of a layer's inputs and outputs, streamed; their sums; least squares with ridge.

A linear layer, or a convolution at one position, computes `y = W x + b` from a row `x` of its inputs (for a convolution
the patch under the kernel, channel after channel). Of all rows only sums in float64 are kept, and only of sampled
positions: what a layer costs is `(columns + 1)^2` numbers, whatever the number of batches (see `MEMORY`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.core.capture import layer_io
from featherweight.core.surgery import altered
from featherweight.core.task import Batch, Task
from featherweight.errors import BadData, BadOption

Linear = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Rows = Iterable[tuple[Tensor, Tensor]]
"""Pairs of inputs (rows, columns) and outputs (rows, outputs)."""

MEMORY = 2**30
"""Bytes that the sums of one layer may take; a wider layer is left alone, and that is said."""
CHUNK = 2**23
"""Entries of the inputs that are gathered at a time."""


def refusal(layer: nn.Module) -> str:
    """Why a layer cannot be reconstructed by least squares on its rows; empty if it can."""
    if reason := no_matrix(layer):
        return reason
    assert isinstance(layer.weight, Tensor)
    outputs, columns = len(layer.weight), layer.weight[0].numel() + 1
    size = 8 * columns * (columns + outputs)
    if size > MEMORY:
        return f"the sums of its {columns - 1} inputs would take {size / 2**30:.1f} GiB, over {MEMORY / 2**30:g}"
    return ""


def no_matrix(layer: nn.Module) -> str:
    """Why a layer is no matrix between all of its inputs and all of its outputs; empty if it is one."""
    if not isinstance(layer, Linear):
        return f"a {type(layer).__name__}, neither a linear layer nor a convolution"
    if reason := altered(layer):
        return reason
    groups = getattr(layer, "groups", 1)
    return f"a convolution of {groups} groups, not of one" if groups != 1 else ""


def layer_rows(
    model: nn.Module,
    path: str,
    task: Task,
    batches: Iterable[Batch],
    *,
    positions: int | None = 10,
    original: nn.Module | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Streams a layer's rows: inputs (rows, columns) behind the prefix of `model`, outputs (rows, outputs), float64.

    Args:
        positions: how many output positions of every sample are drawn, without replacement and the same at every call;
            all of them if None.
        original: the outputs are those of this network, so that a reconstruction also repairs the layers before.

    Raises:
        BadOption: the layer cannot be reconstructed.
    """
    layer = model.get_submodule(path)
    if reason := refusal(layer):
        raise BadOption(f"{path}: {reason}")
    generator = torch.Generator().manual_seed(0)
    for seen, output in layer_io(model, path, task, batches, original=original):
        yield from gather(layer, seen, output, positions, generator)


def gather(
    layer: nn.Module, seen: Tensor, output: Tensor, positions: int | None, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of one call of a layer, at sampled positions, at most `CHUNK` entries of the inputs at a time."""
    if isinstance(layer, nn.Linear):
        seen, output = (seen[None], output[None]) if seen.dim() == 1 else (seen, output)
        flat, out = seen.reshape(len(seen), -1, seen.shape[-1]), output.reshape(len(output), -1, output.shape[-1])
        columns = flat.shape[-1]
    else:
        seen, output = batched(layer, seen), batched(layer, output)
        out, columns = output.flatten(2).mT, layer.weight[0].numel()  # type: ignore[index]
        flat, index = patch_index(layer, seen, output.shape[2:])
    sample, place = drawn(len(out), out.shape[1], positions, generator)
    for part in torch.arange(len(sample)).split(max(1, CHUNK // columns)):
        i, p = sample[part].to(out.device), place[part].to(out.device)
        if isinstance(layer, nn.Linear):
            x = flat[i, p]
        else:
            channel = torch.arange(flat.shape[1], device=flat.device)[None, :, None]
            x = flat[i[:, None, None], channel, index[p][:, None]].flatten(1)
        yield x.to("cpu", torch.float64), out[i, p].to("cpu", torch.float64)


def drawn(samples: int, places: int, positions: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which sample and which place each row comes from: `positions` different places of every sample."""
    count = places if positions is None else min(positions, places)
    if count == places:
        place = torch.arange(places).expand(samples, -1)
    else:
        place = torch.rand(samples, places, generator=generator).argsort(1)[:, :count]
    return torch.arange(samples).repeat_interleave(count), place.flatten()


def batched(layer: nn.Module, x: Tensor) -> Tensor:
    return x if x.dim() == layer.weight.dim() else x[None]  # type: ignore[operator]


def patch_index(layer: nn.Module, x: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
    """The padded inputs (samples, channels, places) and the places (outputs, kernel) under the kernel of each output.

    Unfolding everything would take kernel-many copies of the input; an index takes only what was drawn.
    """
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    pad = layer._reversed_padding_repeated_twice  # per side, also of padding="same"
    padded = F.pad(x, pad, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    index = torch.zeros(1, 1, dtype=torch.long, device=x.device)
    for d, length in enumerate(padded.shape[2:]):
        at = torch.arange(size[d], device=x.device) * layer.stride[d]
        under = torch.arange(layer.kernel_size[d], device=x.device) * layer.dilation[d]
        row = at[:, None] + under
        index = (index[:, None, :, None] * length + row[None, :, None, :]).flatten(2).flatten(0, 1)
    return padded.flatten(2), index


@final
@dataclass(frozen=True)
class Moments:
    """Sums over `n` rows, the inputs `x` with a one after their last column (the bias's), in float64.

    `xx` (columns + 1, columns + 1), `xy` (columns + 1, outputs) and the outputs' squares `yy` (outputs,).
    """

    n: int
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @staticmethod
    def of(rows: Rows) -> Moments:
        """The sums of all rows.

        Raises:
            BadData: there are none, or they are not finite.
        """
        n, xx, xy, yy = 0, torch.empty(0), torch.empty(0), torch.empty(0)
        for x, y in rows:
            ones = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
            if not n:
                xx, xy, yy = ones.mT @ ones, ones.mT @ y.double(), y.double().square().sum(0)
            else:
                xx.addmm_(ones.mT, ones)
                xy.addmm_(ones.mT, y.double())
                yy += y.double().square().sum(0)
            n += len(x)
        if not n:
            raise BadData("no rows to reconstruct a layer from: pass at least one batch of calibration data")
        if not (xx.isfinite().all() and xy.isfinite().all()):
            raise BadData("the inputs or outputs of a layer are not finite: check the weights and the calibration data")
        return Moments(n, xx, xy, yy)

    def error(self, weight: Tensor) -> Tensor:
        """The mean squared error (outputs,) of `weight @ [x, 1]`, weight (outputs, columns + 1)."""
        w = weight.double()
        squares = self.yy - 2 * (w.mT * self.xy).sum(0) + (w @ self.xx * w).sum(1)
        return squares.clamp_min(0) / self.n

    @property
    def energy(self) -> Tensor:
        """The variance (outputs,) of the outputs: the error of a constant."""
        return (self.yy / self.n - (self.xy[-1] / self.n).square()).clamp_min(0)

    def refit(self, weight: Tensor, free: Tensor, ridge: float) -> Tensor:
        """Least squares over the free entries, near the given weight; what is not free stays as it is.

        Minimises `sum_n (y_n - w x_n)^2 + ridge m |w - weight|^2` for each output, m the mean of the diagonal of `xx`;
        so the error never exceeds that of the given weight.

        Args:
            weight: where it starts from, (outputs, columns + 1).
            free: True for the entries that may move, of the weight's shape or (columns + 1,) for all outputs.
        """
        new = weight.double().clone()
        slope = self.xy.mT - new @ self.xx
        for pattern, outputs in patterns(free.expand(new.shape)):
            if len(pattern):
                new[outputs[:, None], pattern] += self._solved(pattern, slope[outputs][:, pattern], ridge)
        return new

    def _solved(self, pattern: Tensor, slope: Tensor, ridge: float) -> Tensor:
        """`slope @ (xx + ridge m I)^-1` on the chosen columns, (outputs, chosen)."""
        chosen = self.xx[pattern][:, pattern]
        mean = float(self.xx.diagonal()[:-1].mean()) if len(self.xx) > 1 else 1.0
        chosen.diagonal().add_(ridge * mean)
        return solved(chosen, slope)


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """`right @ matrix^-1` for a symmetric positive matrix; the pseudo-inverse where it is singular."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal()
    if int(info) == 0 and bool((pivots > 1e-6 * pivots.max()).all()):
        return torch.cholesky_solve(right.mT, factor).mT
    return right @ torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12)


def patterns(free: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The columns of every different row of a boolean matrix, and the rows that have them."""
    found, which = torch.unique(free.cpu(), dim=0, return_inverse=True)
    for number, row in enumerate(found):
        yield row.nonzero().flatten(), (which == number).nonzero().flatten()


def augmented(layer: nn.Module) -> Tensor:
    """A layer's weight (outputs, columns) with its bias (zero if it has none) as the last column, float64."""
    weight = layer.weight.detach().flatten(1).to("cpu", torch.float64)  # type: ignore[operator]
    bias = layer.bias.detach().to("cpu", torch.float64) if isinstance(layer.bias, Tensor) else weight.new_zeros(())
    return torch.cat([weight, bias.expand(len(weight))[:, None]], 1)


@torch.no_grad()
def put(layer: nn.Module, weight: Tensor) -> None:
    """Puts an augmented weight back into its layer; the last column only if the layer has a bias."""
    layer.weight.copy_(weight[:, :-1].reshape(layer.weight.shape))  # type: ignore[operator, arg-type]
    if isinstance(layer.bias, Tensor):
        layer.bias.copy_(weight[:, -1])
