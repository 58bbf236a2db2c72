"""What differs between a model and a fresh one of the user's class: swapped layers, changed attributes, forms.

`blueprint` describes it as JSON-able data and tensors, `conform` makes a fresh model the same. The container and the
checkpoints of a chain both stand on it; neither ever evaluates, imports or unpickles anything.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.core.forms import (
    ACTIVATIONS,
    Affine,
    Codes,
    Form,
    Product,
    Rule,
    Stack,
    Table,
    _register,
    activation_forms,
    attach,
    codes_of,
    declare_codes,
    form_names,
    forms_of,
    originals,
    own_modules,
)
from featherweight.core.layers import build_layer, check_entries, check_swaps, layer_spec
from featherweight.core.wire_data import wiring_data, wiring_from
from featherweight.core.wired import Wired
from featherweight.errors import BadData, unknown

OPAQUE = (Tensor, type, ModuleType)  # whose attributes no file sets


def swapped(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that were put in place of the class's own, by path."""
    found: dict[str, nn.Module] = {}
    inside: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        within = path != "" and path.rpartition(".")[0] in inside
        if within or (path and getattr(module, "_fw_swapped", False)):
            inside.add(path)
            if not within:
                found[path] = module
    return found


def structure(model: nn.Module) -> dict[str, Any]:
    """Swapped layers and changed attributes, JSON-able: what makes a fresh model the same shape.

    A layer that stands at several paths is described at the first one; the others say `{"same": first path}`.
    """
    first: dict[int, str] = {}
    swaps: dict[str, dict[str, Any]] = {}
    for path, module in swapped(model).items():
        earlier = first.setdefault(id(module), path)
        swaps[path] = layer_spec(module) if earlier == path else {"same": earlier}
    check_entries(swaps.values())
    # a layer that was swapped, before or after its attributes changed, is described by what it is now
    inside = tuple(f"{path}." for path in swaps)
    changed = getattr(model, "_fw_edits", {})
    edits = {p: dict(e) for p, e in changed.items() if p not in swaps and not p.startswith(inside)}
    plan: dict[str, Any] = {"swaps": swaps, "edits": edits, "kept": list(getattr(model, "_fw_kept", ()))}
    return plan | ({"wiring": wiring_data(model)} if isinstance(model, Wired) else {})


def restructure(model: nn.Module, plan: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """Makes a fresh model of the user's class the same shape as the one that `structure` described, in place.

    Args:
        shapes: the shape of every parameter and buffer of the file, by its name in the state dict.

    Raises:
        BadData: the model is of another class or configuration than the one in the file.
    """
    check_swaps(plan["swaps"])
    built = {path: build_layer(spec) for path, spec in plan["swaps"].items() if "same" not in spec}
    for path, spec in plan["swaps"].items():
        parent, _, name = path.rpartition(".")
        owner = _module(model, parent)
        if name not in owner._modules:
            raise BadData(f"the model has no layer {path}, which the file replaces: pass the same class and options")
        new = built[spec.get("same", path)]
        new._fw_swapped = True  # type: ignore[assignment]
        new.train(owner.training)
        owner._modules[name] = new
    for path, edit in plan["edits"].items():
        module = _module(model, path)
        for key, value in edit.items():
            _edit(module, path, key, value)
    model._fw_edits = {p: dict(e) for p, e in plan["edits"].items()}  # type: ignore[assignment]
    for name in plan.get("kept", ()):
        path, _, leaf = str(name).rpartition(".")
        _module(model, path)._non_persistent_buffers_set.discard(leaf)
    model._fw_kept = list(plan.get("kept", ()))  # type: ignore[assignment]
    for name, shape in shapes.items():
        _reshape(model, name, shape)
    if isinstance(model, Wired) and plan.get("wiring"):
        model.wiring = wiring_from(plan["wiring"])
    return model


def _edit(module: nn.Module, path: str, key: str, value: Any) -> None:
    """Sets a changed attribute, `a.b` through nested plain objects (a config).

    Only integers and lists of them that were there before, as many as there were: no file reaches into classes,
    functions, tensors or whole modules of Python.
    """
    owner: Any = module
    *inner, last = key.split(".")
    for step in inner:
        owner = getattr(owner, step, None) if _plain(owner) else None
    if not _plain(owner) or key.startswith("_") or not _alike(getattr(owner, last, None), value):
        raise BadData(f"the model has no attribute {path}.{key} to set: pass the same class and options as were saved")
    try:
        setattr(owner, last, tuple(value) if isinstance(value, list) else value)
    except (AttributeError, TypeError, ValueError):  # a property, or a frozen object
        raise BadData(f"the model does not let {path}.{key} be set: pass the same class and options") from None


def _plain(owner: Any) -> bool:
    """Whether an object is a module of the network or a plain one, such as a config."""
    return not isinstance(owner, OPAQUE) and (isinstance(owner, nn.Module) or not callable(owner))


def _alike(old: Any, new: Any) -> bool:
    """Whether both are integers, or lists of as many; true and false are no integers."""
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return len(old) == len(new) and all(_alike(a, b) for a, b in zip(old, new, strict=True))
    return all(isinstance(value, int) and not isinstance(value, bool) for value in (old, new))


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise BadData(f"the model has no layer {path}: pass the same class and options as were saved") from None


def _reshape(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    path, _, leaf = name.rpartition(".")
    module = _module(model, path)
    tensor = getattr(module, leaf, None)
    if not isinstance(tensor, Tensor):
        raise BadData(f"the model has no tensor {name}: pass the same class and options as were saved")
    if tuple(tensor.shape) == tuple(shape):
        return
    if tensor.dim() != len(shape):
        raise BadData(f"{name} has shape {tuple(tensor.shape)} in the model and {tuple(shape)} in the file")
    fresh = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        replacement: Tensor = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
        for owner in model.modules():  # tied parameters stay tied
            for key, value in owner._parameters.items():
                if value is tensor:
                    owner._parameters[key] = replacement  # type: ignore[assignment]
    else:
        module._buffers[leaf] = fresh


# --- forms and codes as data and tensors ------------------------------------------------------------------------------


def blueprint(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A whole model, forms and codes included, as JSON-able data and named tensors (each tied tensor once)."""
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}

    def keep(name: str, tensor: Tensor) -> str:
        key = id(tensor)
        if key not in seen:
            seen[key] = name
            tensors[name] = tensor.detach().cpu().contiguous()
        return seen[key]

    def keep_form(name: str, form: Form) -> dict[str, Any]:
        settings, held = form.state()
        return {
            "type": type(form).__name__,
            "settings": settings,
            "tensors": {key: keep(f"{name}/{key}", tensor) for key, tensor in held.items()},
        }

    plain: dict[str, str] = {}
    weights: dict[str, Any] = {}
    codes: dict[str, Any] = {}
    for path, module in own_modules(model):
        prefix = f"{path}." if path else ""
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            plain[prefix + name] = keep(prefix + name, tensor)
            found = codes_of(module, name)
            if found is not None:
                codes[prefix + name] = _codes_data(f"{prefix}{name}/codes", found, keep)
        for name in form_names(module):
            weights[prefix + name] = {
                "forms": [keep_form(f"{prefix}{name}/{i}", form) for i, form in enumerate(forms_of(module, name))],
                "free": [keep(f"{prefix}{name}/free{i}", p) for i, p in enumerate(originals(module, name))],
            }
    active = {
        path: {at: keep_form(f"{path}/{at}", form) for at, form in forms.items()}
        for path, forms in activation_forms(model).items()
    }
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    data = {
        **structure(model),
        "plain": plain,
        "weights": weights,
        "activations": active,
        "codes": codes,
        "frozen": frozen,
    }
    return data, tensors


def _codes_data(name: str, codes: Codes, keep: Callable[[str, Tensor], str]) -> dict[str, Any]:
    rule = codes.rule
    fields = {key: value for key, value in vars(rule).items() if isinstance(value, Tensor)}
    return {
        "rule": type(rule).__name__,
        "places": {key: getattr(rule, key) for key in ("axis", "block") if hasattr(rule, key)},
        "shape": list(codes.shape),
        "symbols": keep(f"{name}/symbols", codes.symbols),
        "fields": {key: keep(f"{name}/{key}", value) for key, value in fields.items()},
    }


def conform(model: nn.Module, data: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """Makes a fresh model of the user's class equal to the one that `blueprint` described, in place.

    Raises:
        BadData: the model is of another class or configuration.
        FormatError: the data are not a blueprint.
    """
    shapes = {name: tuple(tensors[key].shape) for name, key in data["plain"].items()}
    restructure(model, data, shapes)
    placed: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, key in data["plain"].items():
            path, _, leaf = name.rpartition(".")
            module = _module(model, path)
            tensor = placed.setdefault(key, getattr(module, leaf))
            tensor.copy_(tensors[key])
            if getattr(module, leaf) is not tensor:  # a layer that was swapped in is tied to another
                setattr(module, leaf, tensor)
    shared = {key: held for key, held in placed.items() if isinstance(held, nn.Parameter)}
    stacks: dict[tuple[str, ...], Stack] = {}
    for name, held in data["weights"].items():
        path, _, leaf = name.rpartition(".")
        free = [shared.setdefault(key, nn.Parameter(tensors[key].clone())) for key in held["free"]]
        same = tuple(held["free"])
        if same not in stacks:
            stacks[same] = Stack([_form(spec, tensors) for spec in held["forms"]])
        _register(_module(model, path), leaf, stacks[same], free)
    for path, forms in data["activations"].items():
        for at, spec in forms.items():
            if at not in ACTIVATIONS:
                raise unknown("place of a form", at, ACTIVATIONS)
            attach(_module(model, path), _form(spec, tensors), at)
    for name, held in data["codes"].items():
        path, _, leaf = name.rpartition(".")
        declare_codes(_module(model, path), leaf, codes_from(held, tensors))
    frozen = set(data["frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name not in frozen)
    return model


def _form(spec: dict[str, Any], tensors: dict[str, Tensor]) -> Form:
    return Form.restored(
        spec["type"], spec["settings"], {k: tensors[key].clone() for k, key in spec["tensors"].items()}
    )


def codes_from(held: dict[str, Any], tensors: dict[str, Tensor]) -> Codes:
    """Codes from their stored data."""
    fields = {key: tensors[name] for key, name in held["fields"].items()}
    rules: dict[str, Callable[..., Rule]] = {"Affine": Affine, "Table": Table, "Product": Product}
    if held["rule"] not in rules:
        raise unknown("rule", str(held["rule"]), rules)
    rule = rules[held["rule"]](**fields, **held["places"])
    return Codes(tensors[held["symbols"]], rule, tuple(held["shape"]))
