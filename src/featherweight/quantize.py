"""The verb `quantize`: grids for weights, activations and gradients; calibrate the ranges; train through the grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

from torch import nn

from featherweight.allowed import Amount, Bits, Count, Positive, Share, checked
from featherweight.catalogue import Slot, fill
from featherweight.core.calibration import calibrate, remark
from featherweight.core.fit import Optimizers
from featherweight.core.flow import follow
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import Affine, Form, activation_form, attach, codes_of, has_forms
from featherweight.core.grids import ActivationGrid, Place, Seen
from featherweight.core.ledger import note, skip
from featherweight.core.norms import fit_and_settle
from featherweight.core.site import PerLayer, Site, per_layer, sites
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.core.taught import taught
from featherweight.errors import BadOption, CompressionError

Grid = Callable[[Site, int], Form]
Range = Callable[[Seen, int], Form]
Gradient = Callable[[int], Form]
Placement = Callable[[nn.Module, Task, Mapping[str, nn.Module]], list[Place]]

LAYERS = (nn.Linear, nn.Conv2d)


def ends_once(options: Mapping[str, Any]) -> None:
    """Refuses ends that stay float and have bits."""
    if options["keep_first_last"] and options["first_last_bits"] is not None:
        raise BadOption("keep_first_last=True leaves the first and the last layer float: drop first_last_bits")


@checked(ends_once)
def quantize(
    model: nn.Module,
    task: Task,
    *,
    weights: Annotated[str, Slot("grid")] | Grid | None = "symmetric",
    acts: Annotated[str, Slot("range")] | Range | None = None,
    grads: Annotated[str, Slot("gradient")] | Gradient | None = None,
    weight_bits: PerLayer[Bits] = 8,
    act_bits: Bits = 8,
    grad_bits: Bits = 8,
    place: Annotated[str, Slot("place")] | Placement = "layer_inputs",
    keep_first_last: bool = False,
    first_last_bits: Bits | None = None,
    calibration_batches: Count = 16,
    epochs: Amount = 0,
    lr: Positive = 1e-4,
    optimizer: Optimizers = None,
    teacher_share: Share = 0.0,
    fold: bool = False,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Puts weights, activations and gradients of Linear and Conv2d layers on grids, trains through them, returns.

    The grids stay on the model as forms: a later method trains through them, the file and the ONNX export read the
    integers from them. Weights that an earlier method left on an integer grid of no more bits keep it, unless they are
    trained here. What is trained gets its activation ranges from the network as it was, to which the training leads
    back; what is not trained gets them from the network whose weights are on their grids. After the training the
    running statistics of batch norms are taken anew.

    Args:
        weights: an ingredient `(site, bits) -> Form`, or None to leave weights alone.
        acts: an ingredient `(what was seen, bits) -> Form`, or None to leave activations alone.
        grads: an ingredient `(bits) -> Form` for the gradient of a layer's output, or None.
        weight_bits: bits of a weight; or layer patterns with bits each, such as {"conv*": 8, "Linear": 4}.
        act_bits: bits of an activation.
        grad_bits: bits of a gradient.
        place: which tensors carry activation grids: "layer_inputs", or "fused" (what integer runtimes want).
        keep_first_last: leave the first and the last layer that run in float.
        first_last_bits: bits of the weights and the inputs of the first and the last layer that run; as the others when
            left out.
        calibration_batches: how many batches the activation ranges are taken from.
        epochs: training through the grids.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw" or "sgd".
        teacher_share: share of the teacher's softened class probabilities in the loss, the labels have the rest; the
            teacher is the task's, in a chain the original network.
        fold: multiply batch norms into the weights when all is done, as inference does: the integers stay, their
            scales change.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        BadOption: an option outside its range.
        UnknownName: no such ingredient or layer.
        MissingNeed: no data to calibrate or to train with.
        CompressionError: nothing is left to quantize.
    """
    found, bits = per_layer(model, "weight_bits", weight_bits, where, types=LAYERS)
    step = taught(task, model, teacher_share) if epochs else None
    ends = {*ends_of(model, task)} & found.keys() if keep_first_last or first_last_bits is not None else set()
    chosen = without(found, ends) if keep_first_last else found
    bits |= dict.fromkeys(ends, first_last_bits) if first_last_bits is not None else {}

    puts: list[Callable[[], None]] = []
    if weights is not None:
        puts.append(partial(_snap, model, chosen, bits, fill("grid", weights), trained=epochs > 0))
    if acts is not None:
        places = _open(model, fill("place", place)(model, task, {path: site.module for path, site in chosen.items()}))
        inputs = {(path, "input") for path in ends}
        widths = [(first_last_bits or act_bits) if inputs & {*p.sites} else act_bits for p in places]
        puts.append(partial(_place, model, task, places, fill("range", acts), widths, calibration_batches))
    for put in reversed(puts) if epochs else puts:
        put()
    if grads is not None:
        gradient = fill("gradient", grads)
        for site in chosen.values():
            attach(site.module, gradient(grad_bits), "grad")
    note(
        f"{len(chosen)} layers quantized: {_told(weights is not None, bits, chosen, acts, act_bits, grads, grad_bits)}"
    )
    if epochs:
        label = "train on the grids"
        fit_and_settle(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, label=label)
    return fold_batchnorm(model, task.inputs()) if fold else model


def _on_grid(site: Site, bits: int) -> bool:
    """Whether the weights of a layer are integers of so many bits already."""
    codes = None if has_forms(site.module, site.name) else codes_of(site.module, site.name)
    if codes is None or not isinstance(codes.rule, Affine):
        return False
    centred = codes.symbols.view(codes.shape) - codes.rule.spread(codes.rule.zero_point, codes.shape).double()
    return bool((centred == centred.round()).all()) and float(centred.abs().max()) <= max(1, 2 ** (bits - 1) - 1)


def _told(weights: bool, bits: Mapping[str, int], chosen: Mapping[str, Site], *rest: object) -> str:
    acts, act_bits, grads, grad_bits = rest
    used = "/".join(str(b) for b in sorted({bits[path] for path in chosen}))
    parts = [f"weights {used}" if weights else "", f"activations {act_bits}" if acts is not None else ""]
    return ", ".join(p for p in [*parts, f"gradients {grad_bits}" if grads is not None else ""] if p) + " bits"


def ends_of(model: nn.Module, task: Task) -> list[str]:
    """The paths of the first and the last layer that run; none if the example inputs reach none."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LAYERS)}
    order = [step.layer for step in follow(model, task.inputs(), layers).steps if step.layer is not None]
    return [order[0], order[-1]] if order else []


def chosen_sites(model: nn.Module, task: Task, where: WhereLinearOrConv2d, *, keep_first_last: bool) -> dict[str, Site]:
    """The Linear and Conv2d layers that were asked for, without the first and the last that run if these stay float.

    Raises:
        CompressionError: nothing is left between the two.
    """
    found = sites(model, where, LAYERS)
    return without(found, {*ends_of(model, task)} & found.keys()) if keep_first_last else found


def without(found: Mapping[str, Site], ends: set[str]) -> dict[str, Site]:
    """The chosen layers without the first and the last that run, whichever are chosen."""
    for path in ends:
        skip(path, "the first and the last layer stay float: pass keep_first_last=False to quantize them too")
    chosen = {path: site for path, site in found.items() if path not in ends}
    if not chosen:
        raise CompressionError(
            "no layer is left between the first and the last, which stay float: pass keep_first_last=False"
        )
    return chosen


def _snap(model: nn.Module, chosen: Mapping[str, Site], bits: Mapping[str, int], grid: Grid, *, trained: bool) -> None:
    """Puts the weights on their grids; those that are on one already are left there if they are not trained."""
    for path, site in chosen.items():
        if not site.weight.any():
            note(f"the weights of {path} are all zero: they stay zero, on a grid of step one")
        if trained or not _on_grid(site, bits[path]):
            attach(site.module, grid(site, bits[path]), root=model)
        else:
            note(f"{path}: its weights keep the integers that an earlier method gave them")


def _open(model: nn.Module, places: list[Place]) -> list[Place]:
    """The places where no form stands that is no grid: signs of an earlier method stay what they are."""
    found = []
    for place in places:
        forms = {(path, at): activation_form(model.get_submodule(path), at) for path, at in place.sites}
        other = {site: form for site, form in forms.items() if form and not isinstance(form.settled(), ActivationGrid)}
        for (path, at), form in other.items():
            skip(path, f"its {at} keeps the {type(form).__name__} that an earlier method put there")
        found += [] if other else [place]
    return found


def _place(model: nn.Module, task: Task, places: list[Place], make: Range, bits: list[int], batches: int) -> None:
    """Watches what passes at every place, then puts a grid there."""
    seen = [Seen(place.clamp) for place in places]
    for place, watcher in zip(places, seen, strict=True):
        for path, at in place.sites[:1]:
            attach(model.get_submodule(path), watcher, at)
    facts: dict[str, bool] = getattr(make, "__ingredient__", ("range", {}))[1]
    if facts.get("calibrated", True):
        calibrate(model, task, batches)
    grids = [make(watcher, width) for watcher, width in zip(seen, bits, strict=True)]
    for place, grid in zip(places, grids, strict=True):
        for path, at in place.sites:
            attach(model.get_submodule(path), grid, at)
    remark(places, seen, [grid.settled() for grid in grids])
