"""Batch norm into the layer before it, decided on the traced graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
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


def rectified(model: nn.Module, example_inputs: Any) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The modules whose output a rectifier alone reads, by path: the layer, and the rectifier as a module of its own.

    The module is the layer itself, or the batch norm behind it. Each is called once. The model holds no forms.

    Raises:
        TraceError: the model cannot be traced.
    """
    program = trace(model, example_inputs)
    names, owners = graph_inputs(program).tensors, _owners(model)
    paths = {id(module): path for path, module in model.named_modules()}
    found: list[tuple[str, tuple[nn.Module, nn.Module]]] = []
    for node in program.graph.nodes:
        limits = _limits(node) if node.op == "call_function" and operator_name(node) in ("relu", "hardtanh") else None
        before = node.args[0] if limits is not None and limits[0] == 0 else None
        if limits is None or not isinstance(before, fx.Node) or len(before.users) > 1:
            continue
        norm = _norm_of(before, names, owners)
        layer = _layer_before(node if norm is None else before, names, owners)
        if isinstance(layer, nn.Module) and (norm is None or not altered(norm)):
            last = nn.ReLU() if limits[1] == float("inf") else nn.Hardtanh(*limits)
            found.append((paths[id(layer if norm is None else norm)], (layer, last)))
    hosts = [path for path, _ in found]
    return {path: told for path, told in found if hosts.count(path) == 1}


@dataclass(frozen=True)
class SignsBehind:
    """What stands between a layer and the signs that alone are read of it: a batch norm, then `steps`.

    The signs are those of the result itself, or of its difference to the shift of each of the `readers`, which are
    layers that take signs of their input.
    """

    norm: str
    steps: tuple[tuple[str, tuple[float, float]], ...]
    readers: tuple[str, ...]

    def between(self, value: Tensor) -> Tensor:
        """What the steps make of a value: cut off at two limits."""
        for _, (low, high) in self.steps:
            value = value.clamp(low, high)
        return value


def signs_behind(model: nn.Module, example_inputs: Any) -> dict[str, SignsBehind]:
    """Layers whose output only a batch norm reads, of which only signs are read, by path. The model holds no forms.

    What keeps the order of values may stand between: rectifiers and clipping, pooling by maxima, movement.

    Raises:
        TraceError: the model cannot be traced.
    """
    program = trace(model, example_inputs)
    names, owners = graph_inputs(program).tensors, _owners(model)
    paths = {id(module): path for path, module in model.named_modules()}
    found: list[tuple[str, SignsBehind]] = []
    for node in program.graph.nodes:
        norm = _norm_of(node, names, owners)
        if norm is not None and not altered(norm):
            behind = _behind(model, names, paths[id(norm)], _signs(node, _Seen()))
            layer = _layer_before(node, names, owners)
            if behind is not None and isinstance(layer, nn.Module):
                found.append((paths[id(layer)], behind))
    layers, norms = [layer for layer, _ in found], [behind.norm for _, behind in found]
    return {layer: behind for layer, behind in found if layers.count(layer) == norms.count(behind.norm) == 1}


KEEPING = {"detach", "clone", "contiguous", "alias", "dropout", "max_pool1d", "max_pool2d"}
MOVING = {"view", "reshape", "_unsafe_view", "flatten", "permute", "transpose", "squeeze", "unsqueeze"}
CUTTING = {"relu", "hardtanh", "clamp"}
FORM_SHIFT = ".fw_input.shift"  # of the form that takes signs of a layer's input


@dataclass(frozen=True)
class _Seen:
    """What stands between a norm and a sign: whether channels moved, where values were cut off, what is subtracted."""

    moved: bool = False
    steps: tuple[tuple[str, tuple[float, float]], ...] = ()
    shift: fx.Node | None = None


def _signs(node: fx.Node, seen: _Seen) -> list[_Seen] | None:
    """The ways to every sign that is taken of a node; None if anything else is read of it."""
    found: list[_Seen] = []
    for user in node.users:
        name = operator_name(user) if user.op == "call_function" else ""
        inner: list[_Seen] | None = None
        if name == "ge" and len(user.args) == 2 and user.args[1] == 0:
            inner = [seen]
        elif name == "sub" and seen.shift is None and user.args[0] is node and isinstance(user.args[1], fx.Node):
            inner = _signs(user, replace(seen, shift=user.args[1]))
        elif name in KEEPING or name in MOVING:
            inner = _signs(user, replace(seen, moved=seen.moved or name in MOVING))
        elif name in CUTTING and seen.shift is None and (limits := _limits(user)) is not None:
            inner = _signs(user, replace(seen, steps=(*seen.steps, (name, limits))))
        if inner is None:
            return None
        found += inner
    return found or None


def _limits(node: fx.Node) -> tuple[float, float] | None:
    """Where an operator cuts values off; None if it says so in another way than by two numbers."""
    if operator_name(node) == "relu":
        return 0.0, float("inf")
    limits: list[Any] = [*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :]]
    low, high = limits
    plain = isinstance(low, (int, float)) and isinstance(high, (int, float)) and not node.kwargs
    return (float(low), float(high)) if plain else None


def _behind(model: nn.Module, names: dict[str, str], norm: str, signs: list[_Seen] | None) -> SignsBehind | None:
    """What all signs have in common, None if they differ, or a shift does not stay with its channel."""
    if signs is None or len({seen.steps for seen in signs}) > 1 or len({seen.shift is None for seen in signs}) > 1:
        return None
    readers = []
    for seen in signs:
        if seen.shift is not None:
            source = seen.shift
            while source.op == "call_function" and operator_name(source) in MOVING:
                source = source.args[0]  # type: ignore[assignment]
            name = names.get(source.name, "")
            if not name.endswith(FORM_SHIFT) or len(source.users) != 1:
                return None
            values = model.get_parameter(name)
            if seen.moved and bool((values != values.flatten()[0]).any()):
                return None
            readers.append(name.removesuffix(FORM_SHIFT))
    behind = SignsBehind(norm, signs[0].steps, tuple(dict.fromkeys(readers)))
    low, high = (float(behind.between(torch.tensor(sign))) for sign in (-1.0, 1.0))
    return behind if low < high and (readers or low < 0 <= high) else None


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
