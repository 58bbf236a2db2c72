"""Batch norm into the layer before it, decided on the traced graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.ledger import skip
from featherweight.core.surgery import altered, swap
from featherweight.core.trace import graph_inputs, operator_name, trace

FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batchnorm(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Multiplies every batch norm into the convolution or linear layer that it alone reads, in place.

    `w' = w * g / sqrt(v + eps)` and `b' = (b - m) * g / sqrt(v + eps) + beta` with the running statistics m and v, so
    outputs in evaluation mode stay the same, and zeros stay zeros. The batch norm becomes an `nn.Identity`; one that
    cannot be folded stays, and the reason is reported. The model is baked; what was masked is masked again.

    Raises:
        TraceError: the model cannot be traced.
    """
    masked = masked_names(model)
    bake(model)
    for norm, layer in _pairs(model, example_inputs).items():
        if isinstance(layer, str):
            skip(norm, f"batch norm stays: {layer}")
            continue
        _fold(layer, model.get_submodule(norm))
        swap(model, norm, nn.Identity())
    mask_zeros(model, masked)
    return model


def norms_behind(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """The path of the batch norm that alone reads a layer's output, by the layer's path. The model holds no forms.

    Raises:
        TraceError: the model cannot be traced.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found = _pairs(model, example_inputs).items()
    return {paths[id(layer)]: norm for norm, layer in found if not isinstance(layer, str)}


def _pairs(model: nn.Module, example_inputs: Any) -> dict[str, nn.Module | str]:
    """Every batch norm by path, with the layer to fold it into, or the reason why there is none."""
    program = trace(model, example_inputs)
    names = graph_inputs(program).tensors
    owners = _owners(model)
    paths = {id(m): path for path, m in model.named_modules() if isinstance(m, NORMS)}
    found: dict[str, nn.Module | str] = {}
    for node in program.graph.nodes:
        norm = _norm_of(node, names, owners)
        if norm is None:
            continue
        path = paths[id(norm)]
        once = path not in found
        found[path] = altered(norm) or _layer_before(node, names, owners) if once else "it is used more than once"
    for path in paths.values():
        found.setdefault(path, "it has no running statistics, or the example inputs do not reach it")
    return found


def _owners(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Every name of a parameter or buffer -> all modules that hold that tensor."""
    holders: dict[int, list[nn.Module]] = {}
    named: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                named[f"{path}.{name}" if path else name] = tensor
                if all(module is not m for m in holders.setdefault(id(tensor), [])):
                    holders[id(tensor)].append(module)
    return {name: holders[id(tensor)] for name, tensor in named.items()}


def _norm_of(node: fx.Node, names: dict[str, str], owners: dict[str, list[nn.Module]]) -> nn.Module | None:
    """The batch norm module with running statistics that a node computes, or None."""
    if node.op != "call_function" or "batch_norm" not in operator_name(node):
        return None
    held = [owners[names[a.name]] for a in node.args[1:] if isinstance(a, fx.Node) and a.name in names]
    modules = [m for modules in held for m in modules if isinstance(m, NORMS) and m.running_mean is not None]
    return modules[0] if modules else None


def _layer_before(node: fx.Node, names: dict[str, str], owners: dict[str, list[nn.Module]]) -> nn.Module | str:
    before = node.args[0]
    name = operator_name(before) if isinstance(before, fx.Node) and before.op == "call_function" else "an input"
    if not isinstance(before, fx.Node) or not ("conv" in name or name == "linear"):
        return f"{name} stands before it, no convolution or linear layer"
    weight = before.args[1]
    held = owners[names[weight.name]] if isinstance(weight, fx.Node) and weight.name in names else []
    layers = [m for m in held if isinstance(m, FOLDABLE)]
    if len(layers) != 1 or len(held) != 1 or not isinstance(weight, fx.Node):
        return "the weight before it is shared, or belongs to no layer"
    if reason := altered(layers[0]):
        return reason
    reasons = {
        "the output of the layer before it is read elsewhere too": len(before.users) > 1,
        "the layer before it is used more than once": len(weight.users) > 1,
        "it normalises another dimension than the layer before it computes": name == "linear"
        and before.meta["val"].dim() != 2,
    }
    return next((reason for reason, holds in reasons.items() if holds), layers[0])


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    """One batch norm into one layer. Computed in double precision, so that nothing but the last rounding is lost."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    factor = factor * norm.weight.double() if norm.weight is not None else factor
    offset = norm.bias.double() if norm.bias is not None else torch.zeros_like(factor)
    bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(factor)
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    weight = layer.weight.double()
    if axis == 1 and layer.groups > 1:  # (in, out / groups, ...): the output channel is (group of the input, column)
        rows = factor.view(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
        spread = rows.reshape(weight.shape[0], -1)
        scaled = weight * spread.view(*spread.shape, *([1] * (weight.dim() - 2)))
    else:
        scaled = weight * factor.view([-1 if d == axis else 1 for d in range(weight.dim())])
    dtype = layer.weight.dtype
    layer.weight.copy_(scaled.to(dtype))
    moved = ((bias - norm.running_mean.double()) * factor + offset).to(dtype)
    if layer.bias is None:
        layer.bias = nn.Parameter(moved)
        layer._fw_swapped = True  # the container rebuilds this layer with the bias that its class does not give it
    else:
        layer.bias.copy_(moved)
