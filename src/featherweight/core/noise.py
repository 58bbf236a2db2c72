"""Gaussian weights while a network trains: every weight its own variance, the noise drawn where it is seen.

The outputs of a linear map of independent Gaussian weights are Gaussian, so that one draw for each output of each
sample does the work of one draw for each weight: the local reparameterisation (Kingma, Salimans and Welling, NIPS 2015,
arXiv:1506.02557). The layers stay what they are; a hook adds the noise, and is gone after the block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.core.capture import UNCALLED, called
from featherweight.core.fit import MakeOptimizer, Optimizers, make_optimizer
from featherweight.core.forms import mask_of, owners
from featherweight.core.ledger import skip
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WEIGHTED, Where, altered
from featherweight.core.task import Batch, Task, length
from featherweight.errors import BadData, BadOption, MissingNeed

LOG_VARIANCE = "fw_log_variance"


def linear_sites(model: nn.Module, task: Task, where: Where = None) -> dict[str, Site]:
    """The weights that `where` chooses whose layers, every one that shares them, are torch's own linear maps.

    A weight that code uses without calling its layer (attention's output projection) is none of them: it is tried.

    Raises:
        UnknownName: a pattern matches nothing.
        BadOption: there is none.
    """
    found = sites(model, where)
    seen = called(model, task.inputs())
    refused = {path: reason for path, site in found.items() if (reason := _refusal(model, site, seen))}
    for path, reason in refused.items():
        skip(path, reason)
    if refused.keys() == found.keys():
        path = next(iter(refused))
        raise BadOption(f"no layer that was chosen can have random weights: {path}: {refused[path]}")
    return {path: site for path, site in found.items() if path not in refused}


def _refusal(model: nn.Module, site: Site, seen: Collection[nn.Module]) -> str:
    for owner, name in owners(model, site.module, site.name):
        if not isinstance(owner, WEIGHTED) or name != "weight":
            return f"it shares its weight with a layer of type {type(owner).__name__}, which is no linear map"
        if reason := altered(owner):
            return reason
        if owner not in seen:
            return UNCALLED
    return ""


@contextmanager
def noisy(model: nn.Module, found: Mapping[str, Site], log_variance: float) -> Iterator[dict[str, nn.Parameter]]:
    """Makes the weights N(weight, exp(log variance)) in training mode, and yields the log variances, which are trained.

    Every one is of its weight's shape and starts at `log_variance`; layers that share a weight share them. What a mask
    removed has no noise. In evaluation mode the layers are as ever.
    """
    held, handles = {}, []
    for path, site in found.items():
        weight = site.weight
        held[path] = nn.Parameter(torch.full(weight.shape, log_variance, device=weight.device))
        for owner, _ in owners(model, site.module, site.name):
            owner.register_parameter(LOG_VARIANCE, held[path])
            handles.append(owner.register_forward_hook(_add_noise, with_kwargs=True))
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            module._parameters.pop(LOG_VARIANCE, None)


def _add_noise(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    if not module.training:
        return output
    x = args[0] if args else kwargs["input"]
    variance = module.get_parameter(LOG_VARIANCE).exp()
    keep = mask_of(module)
    spread = linear_map(module, x.square(), variance if keep is None else variance * keep, output)
    return output + torch.randn_like(output) * (spread + 1e-16).sqrt().to(output.dtype)


def linear_map(layer: nn.Module, x: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """What a layer makes of `x` with another weight and no bias, of the shape of `like`, its own output."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    if isinstance(layer, nn.ConvTranspose2d):
        sizes: list[int] = list(like.shape[-2:])
        more = layer._output_padding(x, sizes, layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation)  # type: ignore[arg-type]
        return F.conv_transpose2d(x, weight, None, layer.stride, layer.padding, more, layer.groups, layer.dilation)  # type: ignore[arg-type]
    forward: Any = layer._conv_forward
    return forward(x, weight, None)


def apart(optimizer: Optimizers, uncertain: Iterable[nn.Parameter], lr: float) -> MakeOptimizer:
    """The same optimizer with parameters of a distribution in a group of their own: their own rate and no decay."""
    separate = {id(p) for p in uncertain}

    def make(params: list[nn.Parameter], rest_lr: float) -> Optimizer:
        made = make_optimizer(optimizer, [p for p in params if id(p) not in separate], rest_lr)
        own = [p for p in params if id(p) in separate]
        made.add_param_group({"params": own, "lr": lr, "weight_decay": 0.0})
        return made

    return make


def samples(task: Task) -> int:
    """How many training samples there are, to within a batch: the first batch's size times the number of batches.

    Raises:
        MissingNeed: the task has no training data.
        BadData: they are empty.
    """
    if task.train is None:
        raise MissingNeed("fit needs training data: pass Task(train=...)")
    each = next((size for size in map(_size, _inputs(task)) if size), 0)
    count = length(task.train)
    count = sum(1 for _ in task.train) if count is None else count
    if not each * count:
        raise BadData("the training data are empty: at least one batch is needed")
    return each * count


def _inputs(task: Task) -> Iterator[Any]:
    for batch in task.train or ():
        args, kwargs, _ = task.split(batch)
        yield from (*args, *kwargs.values())
        return


def _size(value: Batch) -> int:
    return len(value) if isinstance(value, Tensor) and value.dim() > 0 else 0
