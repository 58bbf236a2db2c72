"""What an error in a layer's weights costs: the curvature of the loss as a Kronecker product, and moments of inputs.

A linear layer, or a convolution at one position, computes `y = W x` from a column x of its inputs, for a convolution
the patch under the kernel, channel after channel; a one stands behind it, for the bias. With V (outputs, columns + 1)
the gradient of a sample by all these weights, the Gauss-Newton matrix is the mean of `vec(V) vec(V)'`; its two factors
here are the means of `V' V` and of the squares of V's rows, which count what the positions of a convolution add up to
(Gupta, Koren, Singer, "Shampoo", ICML 2018, arXiv:1802.09568). Groups of a convolution are layers of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from featherweight.core.curvature import calls, columns_of, finite, probe, tilted
from featherweight.core.progress import track
from featherweight.core.reconstruct import CHUNK, MEMORY, Linear, batched, patch_index
from featherweight.core.surgery import altered
from featherweight.core.task import Batch, Task, cross_entropy, length, prediction, run

PLACES = 64  # positions of a sample that the moments of inputs are taken over


def no_columns(layer: nn.Module) -> str:
    """Why a layer is no product of its weights with columns of its inputs; empty if it is one."""
    if not isinstance(layer, Linear):
        return f"a {type(layer).__name__}, neither a linear layer nor a convolution"
    if reason := altered(layer):
        return reason
    columns = layer.weight[0].numel() + 1
    if (size := 16 * getattr(layer, "groups", 1) * columns**2) > MEMORY:
        return f"the moments of its {columns - 1} inputs would take {size / 2**30:.1f} GiB, over {MEMORY / 2**30:g}"
    return ""


@final
@dataclass(frozen=True)
class Curvature:
    """Of the loss, by a layer's weights: half of `outputs[o] * e inputs[g] e'` for an error e of row o of group g.

    `inputs` (groups, columns + 1, columns + 1), `outputs` (outputs,) with mean one in each group, float64.
    """

    inputs: Tensor
    outputs: Tensor


def curvatures(
    model: nn.Module, task: Task, paths: Iterable[str], batches: Iterable[Batch], *, draws: int, plain: float
) -> dict[str, Curvature]:
    """The curvature of the mean loss by the weights and biases of the layers that a pass calls, by path.

    Args:
        draws: of cross-entropy, how many classes are drawn for each sample.
        plain: how much of `inputs` is the mean of `x x'` over all samples alike, at the same trace: what counts once
            errors are no longer small, and what few sure samples say too little of.

    Raises:
        BadData: the loss is not finite.
    """
    model = probe(model, training=False)
    layers = {path: model.get_submodule(path) for path in paths}
    sums: dict[str, _Sums] = {}
    samples = 0
    for batch in track(batches, "curvature", length(batches)):
        with calls(layers.values()) as seen:
            output, target = run(model, task, batch)
        output = prediction(output)
        loss = finite(task.loss(output, target))
        found = [(path, x, y) for path, layer in layers.items() for x, y in seen[layer]]
        vectors = tilted(output, draws) if task.loss is cross_entropy else columns_of(loss, output, target)
        ends = [y for *_, y in found]
        grads = [torch.autograd.grad(output, ends, one, retain_graph=True, allow_unused=True) for one in vectors]
        for (path, x, y), *back in zip(found, *grads, strict=True):
            total = sums.setdefault(path, _Sums(layers[path]))
            total.add(x, [torch.zeros_like(y) if grad is None else grad for grad in back])
            total.plain += second_moments(layers[path], x)
        samples += len(output)
    return {path: total.curvature(plain, samples) for path, total in sums.items()}


class _Sums:
    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.groups = layer, int(getattr(layer, "groups", 1))
        weight: Tensor = layer.weight  # type: ignore[assignment]
        size = weight[0].numel() + 1
        self.fisher = torch.zeros(self.groups, size, size, dtype=torch.float64)
        self.plain = torch.zeros(self.groups, size, size, dtype=torch.float64)
        self.rows = torch.zeros(len(weight), dtype=torch.float64)

    def add(self, x: Tensor, grads: list[Tensor]) -> None:
        """The squares of what is pulled back from several vectors, as if a layer had so many times the outputs."""
        for part, back in chunks(self.layer, x, *grads):
            if part.shape[3] < back.shape[2]:  # few positions: V' V = x (g g') x'
                core = back.mT @ back
                flat = (part @ core).permute(1, 2, 0, 3).flatten(2) @ part.permute(1, 0, 3, 2).flatten(1, 2)
                rows = (back @ (part.mT @ part) * back).sum(3)
            else:
                each = back @ part.mT  # (samples, groups, outputs, columns + 1)
                rows, stacked = each.square().sum(3), each.transpose(0, 1).flatten(1, 2)
                flat = stacked.mT @ stacked
            self.fisher += flat.double().cpu()
            self.rows += rows.sum(0).unflatten(1, (len(grads), -1)).sum(1).flatten().double().cpu()

    def curvature(self, plain: float, samples: int) -> Curvature:
        """Factors whose product has the trace of the whole, in each group."""
        rows = self.rows.view(self.groups, -1)
        alike = self.plain * (trace(self.fisher) / trace(self.plain).clamp_min(1e-300))[:, None, None]
        inputs = ((1 - plain) * self.fisher + plain * alike) / (rows.shape[1] * samples)
        return Curvature(inputs, (rows / rows.mean(1, keepdim=True).clamp_min(1e-300)).flatten())


def trace(matrices: Tensor) -> Tensor:
    """Of each of a stack of matrices."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def second_moments(layer: nn.Module, x: Tensor) -> Tensor:
    """The sum of `x x'` over samples and some positions, (groups, columns + 1, columns + 1), float64."""
    total: Tensor | float = 0.0
    for part, _ in chunks(layer, x, places=PLACES):
        flat = part.permute(1, 2, 0, 3).flatten(2)
        total = total + (flat @ flat.mT).double().cpu()
    assert isinstance(total, Tensor)
    return total


def joint_moments(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Means of `x x'` (groups, columns + 1, columns + 1) and `y x'` (groups, outputs of one, columns + 1), float64.

    x is what the layer sees now, y what the original one puts out, at the same positions.
    """
    xx: Tensor | float = 0.0
    yx: Tensor | float = 0.0
    rows = 0
    for part, out in chunks(layer, x, y, places=PLACES):
        columns = part.permute(1, 2, 0, 3).flatten(2)
        xx = xx + (columns @ columns.mT).double().cpu()
        yx = yx + (out.permute(1, 2, 0, 3).flatten(2) @ columns.mT).double().cpu()
        rows += columns.shape[2]
    assert isinstance(xx, Tensor)
    assert isinstance(yx, Tensor)
    return xx / rows, yx / rows


def chunks(layer: nn.Module, x: Tensor, *outputs: Tensor, places: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Columns (samples, groups, columns + 1, positions), outputs (samples, groups, outputs, positions), some at once.

    Args:
        outputs: what the layer put out, or gradients by it; those of several stand one behind the other in each group.
        places: at most so many positions of a sample, drawn once, the same for all samples; all of them if None.
    """
    groups = int(getattr(layer, "groups", 1))
    if isinstance(layer, nn.Linear):
        x = x[None] if x.dim() == 1 else x
        flat = x.reshape(len(x), -1, x.shape[-1]).mT
        index = torch.arange(flat.shape[2], device=x.device)[:, None]
        ys = [one.reshape(len(x), -1, one.shape[-1]).mT for one in outputs]
    else:
        x = batched(layer, x)
        size = _output_size(layer, x)
        flat, index = patch_index(layer, x, size)
        ys = [batched(layer, one).flatten(2) for one in outputs]
    if places is not None and places < len(index):
        drawn = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:places].sort().values
        index, ys = index[drawn.to(x.device)], [y[:, :, drawn.to(x.device)] for y in ys]
    per = max(1, CHUNK // (flat.shape[1] * index.numel() + 1))
    for start in range(0, len(flat), per):
        part = flat[start : start + per]
        columns = part[:, :, index.T].unflatten(1, (groups, -1)).flatten(2, 3)
        ones = columns.new_ones(len(part), groups, 1, columns.shape[3])
        out = [y[start : start + per].unflatten(1, (groups, -1)) for y in ys]
        yield torch.cat([columns, ones], 2).float(), torch.cat(out, 2).float() if out else columns


def _output_size(layer: nn.Module, x: Tensor) -> torch.Size:
    """The sizes of what a convolution puts out for an input."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    pads = layer._reversed_padding_repeated_twice[::-1]
    found = []
    for d, length_ in enumerate(x.shape[2:]):
        whole = length_ + pads[2 * d] + pads[2 * d + 1]
        found.append((whole - layer.dilation[d] * (layer.kernel_size[d] - 1) - 1) // layer.stride[d] + 1)
    return torch.Size(found)
