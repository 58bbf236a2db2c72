"""Batch norm into the layer before it, decided on the traced graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from featherweight.core.forms import (
    Affine,
    Codes,
    Product,
    Table,
    bake,
    codes_of,
    declare_codes,
    mask_zeros,
    masked_names,
)
from featherweight.core.ledger import skip
from featherweight.core.surgery import altered, swap
from featherweight.core.trace import graph_inputs, operator_name, trace

FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batchnorm(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Multiplies every batch norm into the convolution or linear layer that it alone reads, in place.

    `w' = w * g / sqrt(v + eps)` and `b' = (b - m) * g / sqrt(v + eps) + beta` with the running statistics m and v, so
    outputs in evaluation mode stay the same, and zeros stay zeros. Integers behind a weight stay what they are, up to
    their sign: its scales or tables are multiplied, one for each channel. The batch norm becomes an `nn.Identity`; one
    that cannot be folded stays, and the reason is reported. The model is baked; what was masked is masked again.

    Raises:
        TraceError: the model cannot be traced.
    """
    masked = masked_names(model)
    bake(model)
    try:
        for norm, layer in _pairs(model, example_inputs).items():
            if isinstance(layer, str):
                skip(norm, f"batch norm stays: {layer}")
                continue
            _fold(layer, model.get_submodule(norm))
            swap(model, norm, nn.Identity())
    finally:  # also where there is no graph
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
        found[path] = altered(norm) or _scalable_before(node, names, owners) if once else "it is used more than once"
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


def _scalable_before(node: fx.Node, names: dict[str, str], owners: dict[str, list[nn.Module]]) -> nn.Module | str:
    """The layer before a norm, if its channels can be scaled."""
    layer = _layer_before(node, names, owners)
    if isinstance(layer, nn.Module) and (codes := codes_of(layer)) is not None and not scalable(codes, layer):
        return "the codes of the layer before it have no scale or table of its own for each channel"
    return layer


def signs_behind(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """Layers whose output only a batch norm reads, of which only `>= 0` is read: its path by the layer's.

    What keeps signs may stand between: clipping around zero, pooling by maxima, movement. The model holds no forms.

    Raises:
        TraceError: the model cannot be traced.
    """
    program = trace(model, example_inputs)
    names, owners = graph_inputs(program).tensors, _owners(model)
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        norm = _norm_of(node, names, owners)
        if norm is None or altered(norm) or not _only_signs(node):
            continue
        layer = _layer_before(node, names, owners)
        if isinstance(layer, nn.Module) and paths[id(layer)] not in found:
            found[paths[id(layer)]] = paths[id(norm)]
    norms = list(found.values())
    return {layer: norm for layer, norm in found.items() if norms.count(norm) == 1}


KEEPING_SIGNS = {
    *("detach", "clone", "contiguous", "alias", "dropout", "max_pool1d", "max_pool2d"),
    *("view", "reshape", "_unsafe_view", "flatten", "permute", "transpose", "squeeze", "unsqueeze"),
}


def _only_signs(node: fx.Node) -> bool:
    """Whether all that is read of a node is which values are at least zero."""
    return bool(node.users) and all(_reads_signs(user) for user in node.users)


def _reads_signs(node: fx.Node) -> bool:
    name = operator_name(node) if node.op == "call_function" else ""
    if name == "ge":
        return len(node.args) == 2 and bool(node.args[1] == 0)
    if name in ("hardtanh", "clamp"):
        limits: list[Any] = [*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :]]
        around = all(isinstance(limit, (int, float)) for limit in limits) and limits[0] < 0 <= limits[1]
        return around and not node.kwargs and _only_signs(node)
    return name in KEEPING_SIGNS and _only_signs(node)


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
    dtype, codes = layer.weight.dtype, codes_of(layer)
    layer.weight.copy_(scaled.to(dtype))
    if codes is not None:
        codes = scaled_codes(codes, factor.cpu())
        declare_codes(layer, "weight", codes)
        layer.weight.copy_(codes.decode())
    moved = ((bias - norm.running_mean.double()) * factor + offset).to(dtype)
    if layer.bias is None:
        layer.bias = nn.Parameter(moved)
        layer._fw_swapped = True  # the container rebuilds this layer with the bias that its class does not give it
    else:
        layer.bias.copy_(moved)


def scalable(codes: Codes, layer: nn.Module) -> bool:
    """Whether codes can be multiplied by a factor for each output channel and stay the integers that they are."""
    if isinstance(layer, nn.ConvTranspose2d) or isinstance(codes.rule, Product):
        return False
    row = codes.decode()[0].numel()
    return codes.rule.axis in (None, 0) and not (isinstance(codes.rule, Affine) and row % (codes.rule.block or row))


def scaled_codes(codes: Codes, factor: Tensor) -> Codes:
    """The codes of `weight * factor`, one factor for each index of the first dimension: the same integers, or, where a
    factor is negative, their mirror images, so that scales stay positive.
    """
    rule = codes.rule
    if isinstance(rule, Table):
        values = rule.values.double().expand(len(factor), -1) * factor.view(-1, 1)
        return replace(codes, rule=Table(values.to(rule.values.dtype), 0))
    assert isinstance(rule, Affine), "scalable() has said so"
    by_row = factor.view([-1] + [1] * (len(codes.shape) - 1))
    zero = rule.spread(rule.zero_point, codes.shape).double()
    symbols = codes.symbols.view(codes.shape).double()
    turned = torch.where(by_row < 0, 2 * zero - symbols, torch.where(by_row == 0, zero, symbols))
    scale = rule.scale.double().reshape(1 if rule.scale.numel() == 1 else len(factor), -1) * factor.view(-1, 1)
    if bool((turned == turned.round()).all()):  # else zero is no integer, and only the scale can take the sign
        symbols, scale = turned, torch.where(scale == 0, 1.0, scale.abs())
    axis = None if rule.block else 0
    return replace(codes, symbols=_narrow(symbols), rule=replace(rule, scale=scale.flatten().to(rule.scale), axis=axis))


def _narrow(symbols: Tensor) -> Tensor:
    """Integers in the smallest signed type that holds them."""
    limits = symbols.aminmax()
    types = (torch.int8, torch.int16, torch.int32)
    fits = [t for t in types if torch.iinfo(t).min <= limits.min and limits.max <= torch.iinfo(t).max]
    return symbols.to([*fits, torch.int64][0])
