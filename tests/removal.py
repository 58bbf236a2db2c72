"""The proof that removal is right: what is left computes what the whole network does with those channels masked."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.core.channels import Channels, channel_groups, remove_channels
from featherweight.core.task import as_call


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random norm statistics and affines, in place, so that nothing is hidden by ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name in ("running_mean", "running_var", "weight", "bias"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor) and tensor.dim() == 1:
                values = torch.rand(tensor.shape, generator=generator)
                tensor.data = values + 0.5 if name in ("running_var", "weight") else values - 0.5
    return model


def masked_twin(model: nn.Module, channels: Channels, doomed: Tensor) -> nn.Module:
    """A copy with every entry of the doomed channels zero and norms that take statistics over the kept channels only.

    Written without the graph: weights are zeroed slice by slice and the norms' forward is replaced.
    """
    twin = copy.deepcopy(model)
    tensors = {**dict(twin.named_parameters(remove_duplicate=False)), **dict(twin.named_buffers())}
    with torch.no_grad():
        for channel in doomed.tolist():
            for s in channels.slices(channel):
                part = tensors[s.path][slice(*s.rows)] if s.rows else tensors[s.path]
                part.index_fill_(s.dim, torch.tensor(s.index), 0)
    for path, module in twin.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
            for dim in range(module.weight.dim()):
                ids = channels.axes.get((f"{path}.weight", dim))
                if ids is not None:
                    keep = ~torch.isin(ids, doomed)
                    module.forward = _kept_norm(
                        module, keep.reshape([-1 if d == dim else 1 for d in range(module.weight.dim())])
                    )
    return twin


def _kept_norm(module: nn.Module, keep: Tensor) -> Any:
    def layer_norm(x: Tensor) -> Tensor:
        dims = tuple(range(-module.weight.dim(), 0))
        wide = keep.expand(module.weight.shape).expand_as(x)
        count = wide.sum(dims, keepdim=True)
        mean = (x * wide).sum(dims, keepdim=True) / count if isinstance(module, nn.LayerNorm) else 0
        var = ((x - mean) ** 2 * wide).sum(dims, keepdim=True) / count
        eps = module.eps if module.eps is not None else torch.finfo(x.dtype).eps
        out = (x - mean) / torch.sqrt(var + eps) * module.weight
        return out + module.bias if getattr(module, "bias", None) is not None else out

    def group_norm(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index in torch.arange(x.shape[1]).chunk(module.num_groups):
            kept = index[keep[index]]
            part = x[:, kept].flatten(1)
            mean, var = part.mean(1), part.var(1, unbiased=False)
            shape = (-1, *[1] * (x.dim() - 1))
            normal = (x[:, kept] - mean.reshape(shape)) / torch.sqrt(var.reshape(shape) + module.eps)
            affine = (1, -1, *[1] * (x.dim() - 2))
            out[:, kept] = normal * module.weight[kept].reshape(affine) + module.bias[kept].reshape(affine)
        return out

    return group_norm if isinstance(module, nn.GroupNorm) else layer_norm


def gap(a: Any, b: Any) -> float:
    """Largest difference between two outputs over the largest magnitude of the second."""
    worst = 0.0
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if isinstance(x, Tensor):
            assert x.shape == y.shape
            assert not x.isnan().any()
            assert y.numel() == 1 or y.std() > 0
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-12)))
    return worst


def removal_gap(
    model: nn.Module, example_inputs: Any, fraction: float = 0.5, seed: int = 0, fresh_inputs: Any = None
) -> tuple[float, Channels, Tensor]:
    """Removes a random fraction of all channels from a model, in place; returns how far it is from its masked twin.

    Both are compared on `fresh_inputs` where given, so that nothing rests on the example.
    """
    model.eval()
    channels = channel_groups(model, example_inputs)
    order = torch.randperm(channels.count, generator=torch.Generator().manual_seed(seed))
    doomed = channels.legal(order[: int(channels.count * fraction)])
    twin = masked_twin(model, channels, doomed)
    remove_channels(model, doomed, channels=channels)
    args, kwargs = as_call(example_inputs if fresh_inputs is None else fresh_inputs)
    with torch.no_grad():
        return gap(model(*args, **kwargs), twin(*args, **kwargs)), channels, doomed
