"""Neuron importance score propagation: the last responses are ranked, and their scores flow back through the weights.

Ruichi Yu, Ang Li, Chun-Fu Chen, Jui-Hsin Lai, Vlad I. Morariu, Xintong Han, Mingfei Gao, Ching-Yung Lin, Larry S.
Davis, "NISP: Pruning Networks using Neuron Importance Score Propagation", CVPR 2018, arXiv:1711.05908. The responses
that the classifier reads are ranked by infinite feature selection (Giorgio Roffo, Simone Melzi, Marco Cristani, ICCV
2015): `A_ij = a max(sd_i, sd_j) + (1 - a) (1 - |spearman_ij|)`, score `((I - r A)^-1 - I) 1` with a = 0.5, r = 0.9 /
rho(A). A layer's scores are `s_k = |W|^T s_{k+1}`; ReLU and pooling pass them on, a batch norm multiplies by |gamma|
/ deviation, at a residual sum both branches take them, and a channel's score is the sum over its positions. With them
the weighted change of the last responses is bounded by `sum over pruned k of s_k |x_k|`.

It is computed as a gradient: in a network whose weights are all replaced by their sizes, without shifts, at a
positive input, the gradient of `s^T y` by a layer's output is the propagated score, however the graph branches.

Departs from the paper: the ratio is one for all layers, or a mapping; nonlinearities other than ReLU count with their
slope at zero; average pooling divides by the size of its window, the same for all channels of a layer; kept channels
are rounded up to whole vectors. Networks that do not scale with their input (layer norms, attention, embeddings) are
refused.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.catalogue import ingredient, method
from featherweight.core.cost import batch_size
from featherweight.core.flow import follow
from featherweight.core.forms import bake
from featherweight.core.ledger import skip
from featherweight.core.site import Site
from featherweight.core.study import NORMS, Study
from featherweight.core.surgery import WEIGHTED
from featherweight.core.task import eval_mode, run
from featherweight.errors import CompressionError

MOST = 8192
TINY = 1e-30  # so small an input that nothing saturates: clamps and smooth nonlinearities are linear there


@ingredient("score", grain="filter")
def propagation(site: Site) -> Tensor:
    """What each output contributes at most to the last responses, weighted by their scores, (outputs,)."""
    found = site.data.once(propagated)
    if site.path not in found:
        skip(site.path, "the responses that the last layer reads do not depend on it")
        return torch.full((len(site.rows),), torch.inf)
    return found[site.path]


def propagated(study: Study) -> dict[str, Tensor]:
    """The scores (outputs,) of the study's layers on which the last layer's inputs depend.

    Raises:
        CompressionError: the network does not scale with its input.
    """
    last = study.order()[-1]
    weights = infinite_selection(responses(study, last))
    task = replace(study.task, example_inputs=pytree.tree_map(positive, study.task.inputs()))
    twin = Study(absolute(bake(copy.deepcopy(study.model))), task, study.paths, 1)
    twin.order()  # runs the network, before anything is hooked on it
    once, scores = _gradients(twin, last, weights, 1.0)
    twice, _ = _gradients(twin, last, weights, 2.0)
    linear = np.isfinite(once) and once > 0 and abs(twice - 2 * once) <= 1e-6 * abs(twice)
    if not linear or (blocking := normalising(twin)):
        told = "" if not linear else f" ({', '.join(blocking)})"
        raise CompressionError(
            "scores propagate through layers whose output scales with their input (linear, convolution, batch norm, "
            f"pooling, ReLU), which this network's does not{told}: choose another score, such as taylor_activation"
        )
    return scores


def normalising(study: Study) -> list[str]:
    """What divides by a size of its own input, which a tiny input cannot show, as names of operators and paths."""
    modules: dict[str, nn.Module] = dict(study.model.named_modules())
    layers = {path: m for path, m in modules.items() if isinstance(m, (*WEIGHTED, *NORMS))}
    names = {step.name.strip("_") for step in follow(study.model, study.task.inputs(), layers).steps if not step.layer}
    operators = {name for name in names if any(word in name for word in ("norm", "softmax", "attention", "std", "var"))}
    return sorted(operators | {p for p, m in layers.items() if isinstance(m, NORMS) and m.running_mean is None})


def responses(study: Study, last: str) -> Tensor:
    """What the last layer reads, means over positions, (samples, features)."""
    rows: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(features(module, args[0]).flatten(2).mean(2) if args[0].dim() > 2 else args[0])

    with study.model.get_submodule(last).register_forward_pre_hook(keep), eval_mode(study.model):
        for batch in study.batches():
            run(study.model, study.task, batch)
    found = torch.cat(rows).double().cpu()
    if found.shape[1] > MOST:
        raise CompressionError(
            f"{last} reads {found.shape[1]} responses, and ranking them inverts a matrix of that size: at most {MOST}, "
            "pool them first or choose another score"
        )
    return found


def features(layer: nn.Module, value: Tensor) -> Tensor:
    """A layer's input or output with its channels second."""
    return value.movedim(-1, 1) if isinstance(layer, nn.Linear) else value


def infinite_selection(values: Tensor, mix: float = 0.5, decay: float = 0.9) -> Tensor:
    """Scores of the columns of (samples, features) by infinite feature selection, (features,).

    >>> infinite_selection(torch.tensor([[0.0, 0, 1], [1, 2, 1], [2, 4, 1]])).argmax()
    tensor(1)
    """
    deviation = values.std(0, unbiased=False)
    deviation = deviation / (float(deviation.max()) or 1.0)
    ranks = torch.from_numpy(rankdata(values.numpy(), axis=0))
    ranks = ranks - ranks.mean(0)
    unit = ranks / ranks.norm(dim=0).clamp(min=1e-300)
    alike = torch.where(torch.eye(len(deviation), dtype=torch.bool), 1.0, (unit.T @ unit).abs())
    A = mix * torch.maximum(deviation[:, None], deviation[None, :]) + (1 - mix) * (1 - alike)
    r = decay / max(float(torch.linalg.eigvalsh(A).abs().max()), 1e-300)
    ones = torch.ones(len(A), dtype=A.dtype)
    return torch.linalg.solve(torch.eye(len(A), dtype=A.dtype) - r * A, ones) - 1


def absolute(model: nn.Module) -> nn.Module:
    """Every weight by its size, no biases, no means, in float64 and evaluation mode, in place."""
    model.double().eval()
    with torch.no_grad():
        for module in (m for m in model.modules() if isinstance(m, (*WEIGHTED, *NORMS))):
            held = {name: getattr(module, name, None) for name in ("weight", "bias", "running_mean")}
            for name, tensor in held.items():
                if isinstance(tensor, Tensor):
                    tensor.copy_(tensor.abs() if name == "weight" else torch.zeros_like(tensor))
    return model


def _gradients(twin: Study, last: str, weights: Tensor, scale: float) -> tuple[float, dict[str, Tensor]]:
    """`s^T y` at a positive input, and its gradient by the layers' outputs, summed over positions, of one sample."""
    shifts: dict[str, Tensor] = {}
    read: list[Tensor] = []

    def shifted(path: str, value: Tensor) -> Tensor:
        layer = twin.model.get_submodule(path)
        shifts.setdefault(path, torch.zeros(features(layer, value).shape[1], dtype=value.dtype, requires_grad=True))
        return value + (
            shifts[path] if isinstance(layer, nn.Linear) else shifts[path].view(-1, *[1] * (value.dim() - 2))
        )

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(features(module, args[0]))

    args, kwargs = pytree.tree_map(lambda t: scale * positive(t) if isinstance(t, Tensor) else t, twin.task.inputs())
    with twin.model.get_submodule(last).register_forward_pre_hook(keep), eval_mode(twin.model), twin.seen(shifted):
        with torch.enable_grad():
            twin.model(*args, **kwargs)
            total = torch.stack([(y * weights.view(-1, *[1] * (y.dim() - 2))).sum() for y in read]).sum()
        found = torch.autograd.grad(total, list(shifts.values()), allow_unused=True)
    samples = batch_size(twin.task.inputs())
    scores = {path: grad / samples for path, grad in zip(shifts, found, strict=True) if grad is not None}
    return float(total.detach()) / TINY, scores


def positive(value: Any) -> Any:
    """An input of the same shape whose entries are all tiny and positive; what is no floating number stays."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return torch.full_like(value, TINY, dtype=torch.float64) if floating else value


nisp = method(
    "prune",
    score=propagation,
    grain="filter",
    scope="layer",
    prune_ratio=0.5,
    schedule="constant",
    rounds=1,
    epochs=0,
    finetune=20,
    lr=1e-3,
    optimizer="sgd",
    paper="Yu et al., CVPR 2018, arXiv:1711.05908",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"finetune": 1, "round_to": 1},
)
