"""`accelerate`: a copy of a model in which packed layers stand wherever they are faster."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.allowed import checked
from featherweight.catalogue import entries, entry
from featherweight.core.binary import SignInput, SizedSignInput
from featherweight.core.fold import SignsBehind, signs_behind
from featherweight.core.forms import activation_form, attach, bake
from featherweight.core.ledger import note, show, skip
from featherweight.core.measuring import interleaved
from featherweight.core.surgery import Layers, Where, altered, swap, targets
from featherweight.core.task import as_call
from featherweight.core.wired import Wired
from featherweight.errors import BadOption, MissingNeed, TraceError
from featherweight.runtime.bit_layers import BitConv2d, BitLinear

TYPES = (nn.Linear, nn.Conv2d)
Executor = Callable[[nn.Module], nn.Module | str]


@dataclass(frozen=True)
class Executed:
    """One layer that an executor can run, both timed on the layer's own input of the example; times in milliseconds."""

    path: str
    executor: str
    float_ms: float  # PyTorch's float layer, without its grids
    packed_ms: float
    ratio: float  # median over the rounds, packed / float
    used: bool


@checked()
def accelerate(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    executors: Sequence[str] | None = None,
    keep_slower: bool = False,
    where: Annotated[Where, Layers(TYPES)] = None,
    seconds: float = 0.05,
) -> nn.Module:
    """A copy for inference on this machine, with packed layers in the place of those that they outrun.

    Which layers have a packed form is read from the codes beside their weights and the grids on their inputs. Both
    forms are timed in turn on the example, with as many threads as PyTorch has; what is slower than PyTorch's float
    layer stays as it is, and the ledger says so. The copy has no gradients and cannot be saved: save the model.

    Args:
        example_inputs: a tensor, a tuple or a dictionary of arguments, of the batch size that will be used.
        executors: ids of those to try; all when left out.
        keep_slower: take packed layers also where they are slower.
        where: which layers; all Linear and Conv2d layers when left out.
        seconds: how long a layer and its packed form are timed.

    Raises:
        MissingNeed: there are no example inputs.
        BadOption: an option outside its range, or the model has no layer to look at.
        UnknownName: no such executor or layer.
    """
    tried = {name: entry(name, "executor") for name in (entries("executor") if executors is None else executors)}
    model = bake(copy.deepcopy(model)).eval().requires_grad_(False)
    layers = targets(model, where, TYPES)
    call = _example(model, example_inputs)
    seen, named = _inputs(model, layers, call)
    signs = _signs(model, call)
    rows: list[Executed] = []
    for path, layer in layers.items():
        reason = _untouchable(layer, seen.get(path)) or ("it is called by keyword" if path in named else "")
        reason = reason or ("" if path in seen else "the example inputs do not reach it")
        found = {} if reason else _forms(layer, tried)
        packed = {name: form for name, form in found.items() if isinstance(form, nn.Module)}
        if not packed:
            skip(path, reason or _told(found))
            continue
        timed = [_timed(path, name, layer, form, seen[path], seconds) for name, form in packed.items()]
        best = min(timed, key=lambda row: row.ratio)
        rows += [row for row in timed if row is not best]
        rows.append(_decided(model, best, packed[best.executor], keep_slower))
    for path in {row.path for row in rows if row.used} & signs.keys():
        _fold(model, path, signs[path])
    show("executors", [asdict(row) for row in rows])
    model._fw_executed = rows  # type: ignore[assignment]
    return model


def executed(model: nn.Module) -> list[Executed]:
    """What `accelerate` found of every layer that an executor can run.

    Raises:
        BadOption: the model did not come from `accelerate`.
    """
    if "_fw_executed" not in vars(model):
        raise BadOption("this model was not made by accelerate: pass what featherweight.accelerate gave back")
    return list(vars(model)["_fw_executed"])


def _example(model: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if given is None and isinstance(model, Wired):
        given = model.wiring.example()
    if given is None:
        raise MissingNeed("accelerate times every layer on an example: pass example_inputs=...")
    return as_call(given)


def _inputs(
    model: nn.Module, layers: dict[str, nn.Module], call: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[dict[str, Tensor], set[str]]:
    """What each layer is given at its first call in one pass, before its input form; and those called by keyword."""
    seen: dict[str, Tensor] = {}
    named: set[str] = set()

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if keywords:  # a packed layer's argument has another name
                named.add(path)
            else:
                seen.setdefault(path, args[0].detach())

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(path), prepend=True, with_kwargs=True) for path, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            model(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    return seen, named


def _signs(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, SignsBehind]:
    """Batch norms behind layers of which only signs are read, by the layer's path; none in a model without any."""
    kinds = {type(module) for module in model.modules()}
    if not kinds & {SignInput, SizedSignInput} or not kinds & {nn.BatchNorm1d, nn.BatchNorm2d}:
        return {}
    try:
        return signs_behind(model, call)
    except TraceError as error:
        note(f"no batch norm was folded into integer thresholds: {error}")
        return {}


@torch.no_grad()
def _fold(model: nn.Module, path: str, behind: SignsBehind) -> None:
    """Batch norm and signs behind a packed layer become a comparison of its integers; shifts behind it are taken in."""
    layer, norm = model.get_submodule(path), model.get_submodule(behind.norm)
    shifts = [_shift(model.get_submodule(reader)) for reader in behind.readers]
    same = all(torch.equal(shift, shifts[0]) for shift in shifts)
    if not isinstance(layer, (BitLinear, BitConv2d)) or activation_form(layer, "output") is not None or not same:
        return
    ones = (1, 1) if isinstance(norm, nn.BatchNorm2d) else ()

    def value(outputs: Tensor) -> Tensor:
        normed = behind.between(norm(outputs.view(*outputs.shape, *ones)).view(outputs.shape))
        if not shifts:
            return normed
        return normed - (shifts[0] if len(shifts[0]) == outputs.shape[1] else shifts[0][:1])

    layer.fold(value)
    for reader in behind.readers:
        # of +1 and -1, which now leave the layer, what lies between makes two numbers: the larger one is the sign
        _shift(model.get_submodule(reader)).fill_(float(behind.between(torch.tensor(1.0))))
    swap(model, behind.norm, nn.Identity())
    note(f"{behind.norm} and the signs behind it are integer thresholds of {path}")


def _shift(reader: nn.Module) -> Tensor:
    """What a layer of signs compares its inputs with."""
    form = activation_form(reader, "input")
    held: Tensor = reader.shift if form is None else form.shift  # type: ignore[assignment]
    return held


def _untouchable(layer: nn.Module, x: Tensor | None) -> str:
    """Why a layer that is given x cannot be exchanged whatever its weights; empty if it can."""
    if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in (layer.weight, x)):
        return "it computes in float64, and packed layers in float32: convert the model first, by model.float()"
    ours = {at for at in ("input", "output", "grad") if activation_form(layer, at) is not None}
    hooks = len(layer._forward_pre_hooks) + len(layer._forward_hooks) + len(layer._backward_hooks)
    return altered(layer) or ("it carries hooks of its own" if hooks > len(ours) else "")


def _forms(layer: nn.Module, tried: dict[str, Any]) -> dict[str, nn.Module | str]:
    """The packed layer of every executor, or why it has none."""
    return {name: executor(layer) for name, executor in tried.items()}


def _told(reasons: dict[str, nn.Module | str]) -> str:
    """Why no executor has a form, each reason once."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(str(reason), []).append(name)
    if len(by_reason) == 1:
        return next(iter(by_reason))
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


def _timed(path: str, name: str, layer: nn.Module, packed: nn.Module, x: Tensor, seconds: float) -> Executed:
    """Both in turn, the float layer without the grid on its input, which the packed one has to apply."""
    plain = type(layer).forward
    with torch.no_grad():
        calls = {"float": lambda: plain(layer, x), "packed": lambda: packed(x)}
        times = interleaved(calls, seconds=seconds, warmup=2, least=9)
    float_ms, packed_ms = (float(np.median(values)) for values in times.values())
    return Executed(path, name, float_ms, packed_ms, float(np.median(times["packed"] / times["float"])), used=False)


def _decided(model: nn.Module, row: Executed, packed: nn.Module, keep_slower: bool) -> Executed:
    """Puts the packed layer in, or says that it is slower and stays out."""
    told = f"{row.executor} takes {row.packed_ms:.3f} ms, the float layer {row.float_ms:.3f} ms ({row.ratio:.2f}x)"
    if row.ratio >= 1:
        skip(row.path, told + (": taken all the same" if keep_slower else ": stays float"))
        if not keep_slower:
            return row
    layer = model.get_submodule(row.path)
    if (form := activation_form(layer, "output")) is not None:
        attach(packed, form, "output")
    swap(model, row.path, packed)
    return Executed(**{**asdict(row), "used": True})
