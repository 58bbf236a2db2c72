"""Fixed-point networks of M levels: steps of least squares, refined on the error rate; few-bit signals; retraining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn

from featherweight.allowed import Amount, Bits, Count, Positive
from featherweight.catalogue import fill, recipe
from featherweight.core.calibration import observed, remark
from featherweight.core.fit import Optimizers
from featherweight.core.flow import follow
from featherweight.core.forms import attach
from featherweight.core.grids import ActivationGrid, Place
from featherweight.core.ledger import note, show
from featherweight.core.levels import FixedGrid, not_zero, survivors
from featherweight.core.site import PerLayer, per_layer
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task, drop, evaluate
from featherweight.errors import BadOption

LevelCount = Annotated[int, Interval(ge=3, le=65535)]
LAYERS = (nn.Linear, nn.Conv2d)
STARTS = 12
ROUNDS = 100


def odd(options: Mapping[str, Any]) -> None:
    """Refuses numbers of levels that cannot lie around zero."""
    for name in ("weight_levels", "output_levels"):
        given = options[name]
        for count in given.values() if isinstance(given, Mapping) else [given]:
            if count is not None and count % 2 == 0:
                raise BadOption(f"{name}={count}: must be odd, zero is one of the levels, such as 3, 7, 15 or 255")


@recipe(
    paper="Hwang and Sung, IEEE SiPS 2014",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"bits"},
    rules=(odd,),
    small={"candidates": 3, "epochs": 1},
)
def hwang_sung(
    model: nn.Module,
    task: Task,
    *,
    weight_levels: PerLayer[LevelCount] = 3,
    output_levels: LevelCount | None = 255,
    signal_bits: Bits | None = 3,
    input_bits: Bits = 8,
    candidates: Count = 9,
    calibration_batches: Count = 16,
    epochs: Amount = 10,
    lr: Positive = 0.01,
    optimizer: Optimizers = "momentum",
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Rounds weights to M levels a layer and signals to few bits, chooses the steps on the error rate, and retrains.

    Kyuyeon Hwang, Wonyong Sung, "Fixed-point feedforward deep neural network design using weights +1, 0, and -1",
    IEEE Workshop on Signal Processing Systems (SiPS) 2014. `Q(w) = sgn(w) D min(floor(|w| / D + 0.5), (M - 1) / 2)`.
    1. The step of each layer by least squares, in turns `z = Q(w) / D` and `D = sum w z / sum z^2`.
    2. Layer by layer, with the earlier layers quantized and the later ones float, the step that loses least of the
       metric on the validation data, among `candidates` from 0.6 to 1.4 times that of step 1; the nearest to it if two
       lose the same.
    3. Signals on grids of least squared error, of the float network; then retraining: gradients at the
       quantized weights move float ones.

    Departs from the paper: also for convolutions; least squares starts from 12 steps and takes the best (one start ends
    in a local minimum); steps stay fixed in the retraining; batch norms and biases are float. 255 levels in the output
    layer, the range of candidates and 8 bits for the network's input are from memory or chosen here.

    Args:
        weight_levels: M, an odd number of levels; or layer patterns with a number each.
        output_levels: M of the layer that runs last; as the others when None. Layer patterns say it themselves.
        signal_bits: bits of a hidden signal, the input of a layer; None leaves all signals float.
        input_bits: bits of the input of the layer that runs first.
        candidates: how many steps are tried for each layer, a pass over the validation data each; 1 keeps that of least
            squares.
        calibration_batches: how many batches the grids of the signals are taken from.
        epochs: retraining.
        lr: learning rate at the start.
        optimizer: "momentum" (default: 0.9, no decay), "sgd", "adam" or "adamw".
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        BadOption: an option outside its range, or an even number of levels.
        BadData: weights are not finite.
        CompressionError: every chosen layer is zero.
    """
    found, levels = per_layer(model, "weight_levels", weight_levels, where, types=LAYERS)
    found, order = not_zero(found), running_order(model, task)
    paths = [*(path for path in order if path in found), *(path for path in found if path not in order)]
    if output_levels is not None and not isinstance(weight_levels, Mapping) and order and order[-1] in found:
        levels[order[-1]] = output_levels

    signals = (
        signal_grids(model, task, paths, order, signal_bits, input_bits, calibration_batches)
        if signal_bits is not None
        else {}
    )
    rows = []
    for path in paths:
        step, error = least_squares_step(survivors(found[path]), levels[path])
        top = levels[path] // 2
        form = FixedGrid(torch.tensor(step).to(found[path].weight), -top, top, ties="away")
        attach(found[path].module, form, at=found[path].name, root=model)
        factor = refine(model, task, form, candidates)
        rows.append({"layer": path, "levels": levels[path], "step": step * factor, "factor": factor, "error": error})
    show("steps", rows)
    note("steps: " + ", ".join(f"{r['layer']} {r['step']:.4g} ({r['factor']:g} of least squares)" for r in rows))
    for path, grid in signals.items():
        attach(found[path].module, grid, "input")
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="retrain")


def least_squares_step(weights: Tensor, levels: int) -> tuple[float, float]:
    """The step D of the least squared error, and that error relative to `||w||^2`.

    >>> least_squares_step(torch.tensor([-2.0, 0.0, 2.0, 2.0]), 3)
    (2.0, 0.0)
    """
    weights = weights.double()
    low = float(weights.abs().mean()) / (levels // 2)
    starts = torch.linspace(0.5 * low, max(float(weights.abs().max()) / (levels // 2), low), STARTS).tolist()
    total = float(weights.square().sum())
    return min((alternate(weights, start, levels) for start in starts), key=lambda pair: pair[1] / total)


def alternate(weights: Tensor, step: float, levels: int) -> tuple[float, float]:
    """`z = Q(w) / D` and `D = sum w z / sum z^2` in turns until nothing moves: D and the squared error, relative."""
    total = float(weights.square().sum())
    error = float("inf")
    for _ in range(ROUNDS):
        z = rounded(weights, step, levels)
        if not z.any():
            return step, 1.0
        step = float((weights * z).sum() / z.square().sum())
        before, error = error, float((weights - step * rounded(weights, step, levels)).square().sum()) / total
        if error >= before:
            break
    return step, error


def rounded(weights: Tensor, step: float, levels: int) -> Tensor:
    """The integers of the M-level quantizer, as floats."""
    return weights.sign() * (weights.abs() / step + 0.5).floor().clamp_max(levels // 2)


def refine(model: nn.Module, task: Task, form: FixedGrid, candidates: int) -> float:
    """Leaves the step of a layer at the best of several multiples on the validation data, and says which."""
    if candidates == 1:
        return 1.0
    factors = sorted({1.0, *torch.linspace(0.6, 1.4, candidates).tolist()}, key=lambda f: abs(f - 1))
    step, best, kept = form.scale.clone(), None, 1.0
    for factor in factors:
        form.scale.copy_(step * factor)
        score = evaluate(model, task, label="step")
        if best is None or drop(best, score) < 0:
            best, kept = score, factor
    form.scale.copy_(step * kept)
    return round(kept, 4)


def running_order(model: nn.Module, task: Task) -> list[str]:
    """The paths of Linear and Conv2d layers in the order in which they are called first."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LAYERS)}
    steps = follow(model, task.inputs(), layers).steps
    return list(dict.fromkeys(step.layer for step in steps if step.layer is not None))


def signal_grids(
    model: nn.Module, task: Task, paths: list[str], order: list[str], bits: int, input_bits: int, batches: int
) -> dict[str, ActivationGrid]:
    """Grids of least squared error for the inputs of layers; that of the layer that runs first has bits of its own."""
    seen = observed(model, task, [(path, "input") for path in paths], batches)
    make = fill("range", "mse")
    grids = {path: make(held, input_bits if path in order[:1] else bits) for (path, _), held in seen.items()}
    remark([Place(((path, "input"),)) for path in paths], seen.values(), grids.values())
    return grids
