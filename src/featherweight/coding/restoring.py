"""Puts what a file holds into a fresh instance of the user's class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.catalogue import entries
from featherweight.coding.unpacking import Packed
from featherweight.core import grids  # noqa: F401 - the form that files have most, known without importing all rooms
from featherweight.core.arguments import agrees
from featherweight.core.blueprint import restructure
from featherweight.core.forms import ACTIVATIONS, Form, attach, declare_codes, own_modules
from featherweight.errors import BadData, FormatError, shown, unknown


@dataclass(frozen=True)
class Slot:
    """One place in a model where a tensor stands."""

    name: str
    module: nn.Module
    leaf: str
    tensor: Tensor


def slots(model: nn.Module) -> list[Slot]:
    """Parameters and persistent buffers, every path of a shared one, without the tensors of forms.

    Module by module as in the state dict, inside a module by name: forms that were taken off leave the weight last.
    """
    found = []
    for path, module in own_modules(model, remove_duplicate=False):
        prefix = f"{path}." if path else ""
        held = {**module._parameters, **module._buffers}
        found += [
            Slot(prefix + leaf, module, leaf, tensor)
            for leaf, tensor in sorted(held.items(), key=itemgetter(0))
            if tensor is not None and leaf not in module._non_persistent_buffers_set
        ]
    return found


def fill(model: nn.Module, manifest: dict[str, Any], records: Sequence[Packed | int], bare: bool) -> nn.Module:
    """Makes a fresh model equal to the one in the file, in place.

    Raises:
        BadData: the model is of another class or configuration.
        FormatError: the file describes layers or forms that it may not.
    """
    places = slots(model)
    device = next((place.tensor.device for place in places if not place.tensor.is_meta), torch.device("cpu"))
    reshape(model, manifest)
    if any(manifest[part] for part in ("swaps", "edits", "kept", "wiring")):
        places = slots(model)
    sources = _by_order(places, manifest, records) if bare else _by_name(places, manifest, records)
    held: dict[int, Tensor] = {}  # by the number of the record, the tensor that now holds it
    taken: set[int] = set()
    changed = bool(manifest["edits"])
    for place, number in zip(places, sources, strict=True):
        tensor = records[number].tensor  # type: ignore[union-attr]
        _check_shape(place, tensor, exact=place.tensor.is_meta or not changed)
        if number not in held:
            held[number] = _placed(place, tensor, device, taken)
            taken.add(id(held[number]))
        _put(place, held[number])
        codes = records[number].codes  # type: ignore[union-attr]
        if codes is not None:
            declare_codes(place.module, place.leaf, codes)
    _check_edited(model, manifest["edits"])
    _attach_forms(model, manifest["activations"], records, len(places) if bare else len(manifest["names"]))
    if not bare:
        frozen = set(manifest["frozen"])
        for place in places:
            tensor = getattr(place.module, place.leaf)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(tensor.is_floating_point() and place.name not in frozen)
    return model


def reshape(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Swaps layers and changes attributes. New layers hold no memory until their tensors come."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torch warns of layers without elements, which are the file's business
        restructure(model, {key: manifest[key] for key in ("swaps", "edits", "kept", "wiring")}, {})


def _by_name(places: list[Slot], manifest: dict[str, Any], records: Sequence[Packed | int]) -> list[int]:
    """The number of the record for each place of a model, by name."""
    numbers = {name: i for i, name in enumerate(manifest["names"])}
    numbers |= {name: numbers[owner] for name, owner in manifest["ties"].items()}
    wanted = [place.name for place in places]
    known = set(wanted)
    for name in wanted:
        if name not in numbers:
            raise BadData(
                f"the model has a tensor {name}, the file has none: pass the same class and options as were saved"
            )
    for name in numbers:
        if name not in known:
            raise BadData(
                f"the file has a tensor {name}, the model has none: pass the same class and options as were saved"
            )
    return [numbers[name] for name in wanted]


def _by_order(places: list[Slot], manifest: dict[str, Any], records: Sequence[Packed | int]) -> list[int]:
    """The number of the record for each place of a model, by order."""
    extra = len(
        {i for forms in manifest["activations"].values() for f in forms.values() for i in f["tensors"].values()}
    )
    if len(records) != len(places) + extra:
        raise BadData(
            f"the file holds {len(records) - extra} tensors and the model has {len(places)}: "
            "pass the same class and options as were saved"
        )
    return [number if isinstance(record := records[number], Packed) else record for number in range(len(places))]


def _check_shape(place: Slot, tensor: Tensor, *, exact: bool) -> None:
    """A layer from the file must fit its own description, and so must every layer if nothing was changed in the model.

    Elsewhere the number of dimensions must agree.
    """
    old = place.tensor
    if old.dim() != tensor.dim() or (exact and old.shape != tensor.shape):
        raise BadData(
            f"{place.name} has the shape {tuple(old.shape)} in the model and {tuple(tensor.shape)} in the file: "
            "pass the same class and options as were saved"
        )


def _placed(place: Slot, tensor: Tensor, device: torch.device, taken: set[int]) -> Tensor:
    """The place's own tensor with new contents, or a new one if shape, type or ties differ."""
    old = place.tensor
    if old.shape == tensor.shape and old.dtype == tensor.dtype and not old.is_meta and id(old) not in taken:
        old.detach().copy_(tensor)
        return old
    fresh = tensor.to(old.device if not old.is_meta else device)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(fresh, requires_grad=old.requires_grad and fresh.is_floating_point())
    return fresh


def _put(place: Slot, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter) != (place.leaf in place.module._parameters):
        raise FormatError(f"the file is corrupt: {place.name} is tied to a tensor of another kind")
    if getattr(place.module, place.leaf) is not tensor:
        setattr(place.module, place.leaf, tensor)  # recurrent layers keep lists of their own, which this updates


def _check_edited(model: nn.Module, edits: dict[str, dict[str, Any]]) -> None:
    """What torch's own layers say of their sizes must agree with the tensors that came."""
    for path in edits:
        module = model.get_submodule(path)
        if not agrees(module):
            raise FormatError(f"the file is corrupt: {path}, {module}, says other sizes than its tensors have")


def _attach_forms(model: nn.Module, active: dict[str, Any], records: Sequence[Packed | int], first: int) -> None:
    """Puts the forms of a file back on activations; their tensors follow those of the model."""
    for path, forms in active.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise BadData(f"the model has no layer {path}: pass the same class and options as were saved") from None
        for at, spec in forms.items():
            if at not in ACTIVATIONS:
                raise unknown("place of a form", at, ACTIVATIONS)
            form = _form(spec, records, first).requires_grad_(False)
            if at not in form.stands:
                raise FormatError(f"the file is corrupt: a {type(form).__name__} cannot stand on the {at} of a layer")
            attach(module, form, at)


def _form(spec: dict[str, Any], records: Sequence[Packed | int], first: int) -> Form:
    if spec["type"] not in Form.known:
        entries()  # imports all rooms of ours, which is where forms are defined
    tensors = {}
    for key, index in spec["tensors"].items():
        record = records[first + index]
        if not isinstance(record, Packed):
            raise FormatError(f"the file is corrupt: the form {shown(spec['type'])} refers to a tensor that is a tie")
        tensors[key] = record.tensor
    form = Form.restored(spec["type"], spec["settings"], tensors)
    if reason := form.unsound():
        raise FormatError(f"the file is corrupt: it describes a {type(form).__name__} {reason}")
    return form
