"""Integers of eight bits without training: what a runtime executes with integer kernels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import inf
from typing import Literal

from torch import nn

from featherweight.allowed import Count, Whole
from featherweight.catalogue import fill, recipe
from featherweight.core.biases import correct_biases
from featherweight.core.decibels import Noise, noises
from featherweight.core.divergence import answers
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.ledger import note, recording, show, skip
from featherweight.core.pairs import equalize_pairs, find_pairs
from featherweight.core.pairs import on_grids as grids_stand
from featherweight.core.site import sites
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.core.walk import joined
from featherweight.errors import BadOption, TraceError
from featherweight.quantize import LAYERS, quantize

CALIBRATORS = ("minmax", "percentile", "mse", "entropy")
SHOWN = 3  # worst layers that are named in a note; the table has all
LOOKED_AT = 64  # samples on which signal to noise is measured


@recipe(
    paper="Krishnamoorthi, 2018, arXiv:1806.08342",
    family="quantize",
    needs={"calibration"},
    shrinks={"bits"},
    small={"calibration_batches": 2},
)
def int8(
    model: nn.Module,
    task: Task,
    *,
    calibrator: Literal["minmax", "percentile", "mse", "entropy", "auto"] = "minmax",
    equalize: bool = False,
    correct_bias: bool = True,
    float_layers: Whole = 0,
    calibration_batches: Count = 16,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Post-training int8: batch norm folded, weights per channel, calibrated unsigned activations, biases int32.

    Raghuraman Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A whitepaper", 2018,
    sec. 3.1: weights symmetric per channel, activations affine per tensor.

    Departs from the paper: weights use -127..127 (no -128); grids also stand on the results of additions,
    concatenations and pooling, so that a runtime never leaves integers between two layers; the model's outputs stay
    float; biases are corrected (Nagel et al., ICCV 2019). Linear and Conv2d layers with any bias, groups, dilation,
    stride and padding are quantized; layers of other types are reported and stay float. The report holds every layer's
    signal-to-noise ratio, weights and inputs apart, the worst layers first.

    Args:
        calibrator: how a range follows from what was seen: "minmax", "percentile" (all but 0.01 %),
            "mse" (least squared error), "entropy" (least divergence, as TensorRT does), or "auto": the one of these
            whose network's outputs on the calibration data are nearest to the float network's.
        equalize: scale neighbouring layers to equal ranges first; the function stays the same.
        correct_bias: give every layer's outputs the mean back that rounding shifts.
        float_layers: how many layers to give back to float, those with the worst signal-to-noise ratios.
        calibration_batches: how many batches of the calibration (or training) data to look at.
        where: which layers; all Linear and Conv2d layers when left out.
    """
    fold(model, task)
    if equalize:
        equalized(model, task)
    original, chosen = copy.deepcopy(model), list(sites(model, where, LAYERS))
    ends = _nearest(original, task, chosen, calibration_batches) if calibrator == "auto" else calibrator
    small = on_grids(original, task, chosen, ends, calibration_batches, correct_bias)
    if not float_layers:
        report(original, small, task, chosen)
        return small
    with recording():
        worst = [row.layer for row in report(original, small, task, chosen)[:float_layers]]
    if len(worst) == len(chosen):
        raise BadOption(f"float_layers={float_layers}: only {len(chosen)} layers are quantized, give fewer back")
    chosen = [path for path in chosen if path not in worst]
    small = on_grids(original, task, chosen, ends, calibration_batches, correct_bias)
    report(original, small, task, chosen)
    for path in worst:
        skip(path, "given back to float: its signal-to-noise ratio was among the worst")
    return small


def fold(model: nn.Module, task: Task) -> None:
    """Folds batch norms; a network without a graph keeps them, and that is said."""
    try:
        fold_batchnorm(model, task.inputs())
    except TraceError as error:
        note(f"batch norm is not folded: {error}")


def equalized(model: nn.Module, task: Task) -> None:
    """Equal ranges in neighbouring layers, as far as there are any; see the recipe `equalize`."""
    if grids_stand(model):
        note("layers are not equalized: an earlier method's grids fit their present scales, and stay")
        return
    masked = masked_names(model)
    bake(model)
    try:
        pairs, _ = find_pairs(model, task.inputs())
        equalize_pairs(model, pairs)
        note(f"{len(pairs)} pairs of layers were scaled to equal ranges")
    except TraceError as error:
        note(f"layers are not equalized: {error}")
    mask_zeros(model, masked)


def on_grids(
    original: nn.Module, task: Task, chosen: Sequence[str], calibrator: str, batches: int, correct_bias: bool
) -> nn.Module:
    """A copy of the float network on grids of eight bits."""
    small = quantize(
        copy.deepcopy(original),
        task,
        weights="symmetric",
        acts=calibrator,
        place="fused",
        calibration_batches=batches,
        where=list(chosen),
    )
    if correct_bias:
        correct_biases(small, original, task, joined(task, batches), chosen)
    return small


def _nearest(original: nn.Module, task: Task, chosen: Sequence[str], batches: int) -> str:
    """The calibrator whose quantized network's outputs differ least from the float network's."""
    batch = joined(task, batches)
    wanted = answers(original, task, batch)
    errors = {}
    for name in CALIBRATORS:
        with recording():
            small = on_grids(original, task, chosen, name, batches, correct_bias=False)
        errors[name] = float((answers(small, task, batch) - wanted).square().mean() / wanted.square().mean())
    told = ", ".join(f"{name} {error:.3g}" for name, error in errors.items())
    best = min(errors, key=errors.__getitem__)
    note(f"calibrator {best}: relative squared errors of the outputs on the calibration data were {told}")
    return best


def report(original: nn.Module, small: nn.Module, task: Task, chosen: Sequence[str]) -> list[Noise]:
    """Puts every layer's signal-to-noise ratio into the report, the worst first, and names these."""
    with recording():  # what the places have to say was said
        places = fill("place", "fused")(original, task, {path: original.get_submodule(path) for path in chosen})
    rows = noises(original, small, task, joined(task, 1, LOOKED_AT), chosen, places)
    show("signal_to_noise", [row.told() for row in rows])
    worst = [f"{r.layer} {r.both:.1f} (weights {r.weights:.1f}, inputs {r.inputs:.1f})" for r in rows[:SHOWN]]
    if rows and rows[0].both < inf:
        note(f"worst signal-to-noise ratios of layers, in dB: {', '.join(worst)}")
    return rows
