"""Mixed precision: bits for every layer by what they cost the outputs, under a budget, by integer programming.

Itay Hubara, Yury Nahshan, Yair Hanani, Ron Banner, Daniel Soudry, "Accurate post training quantization with small
calibration sets", ICML 2021, arXiv:2006.10518, sec. 3.3: with `d_lb` what `b` bits in layer `l` alone cost and `c_lb`
what it then takes,

    min sum_lb d_lb m_lb   subject to   sum_b m_lb = 1 for every l,   sum_lb c_lb m_lb <= budget,   m_lb in {0, 1}

Departs from the paper: `d` is the divergence of the outputs on calibration data from the float network's, not a loss,
so that no labels are needed; `c` is the entropy of a layer's integers and its scales in bytes, or a share of the
measured latency by multiply-accumulates; the real file, or the real latency, is measured and the program solved again
until the budget holds; activations are on grids of eight bits throughout. Rounding may be learned (AdaRound) in place
of the paper's AdaQuant; integers so rounded may have more entropy, and where the budget then breaks, rounding to
nearest is kept and that is told.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import MinLen
from torch import nn

from featherweight.allowed import Count
from featherweight.budget import Limit, parse
from featherweight.catalogue import Slot, fill, recipe
from featherweight.coding import save
from featherweight.coding.bits import entropy_bits
from featherweight.core import measuring
from featherweight.core.biases import correct_biases
from featherweight.core.cost import cost
from featherweight.core.divergence import answers, divergence
from featherweight.core.forms import attach, bake, codes_of
from featherweight.core.ledger import note, recording, show, skip
from featherweight.core.progress import track
from featherweight.core.sensitivity import Allocate, Curve
from featherweight.core.site import sites
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.core.walk import joined
from featherweight.errors import BadOption, CompressionError
from featherweight.ingredients.grid.symmetric import symmetric_mse
from featherweight.quantize import LAYERS, quantize
from featherweight.recipes.adaround import Rounded, adaround
from featherweight.recipes.int8 import fold, report

FLOAT = 32
MOST = 512  # samples that a sensitivity is measured on
TRIES = 6
PROVENANCE = 1024  # bytes that a run writes into its file beside the network


@recipe(
    paper="Hubara et al., ICML 2021, arXiv:2006.10518",
    family="quantize",
    needs={"calibration"},
    shrinks={"bits"},
    small={"budget": "size<=20kB", "calibration_batches": 2},
)
def mixed_precision(
    model: nn.Module,
    task: Task,
    *,
    budget: str = "size<=0.15x",
    bits: Annotated[Sequence[Rounded], MinLen(1)] = (2, 3, 4, 6, 8),
    rounding: Literal["nearest", "learned"] = "nearest",
    allocate: Annotated[str, Slot("allocation")] | Allocate = "budget_knapsack",
    calibrator: Literal["minmax", "percentile", "mse", "entropy"] = "minmax",
    iterations: Count = 1000,
    calibration_batches: Count = 16,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Folds batch norms, measures what few bits cost in each layer, and gives each the bits with which a budget holds.

    Args:
        budget: such as "size<=30kB" or "size<=0.15x" (of the parameters in float), for the file; or "latency<=0.6x" or
            "latency<=2ms", with which layers have eight bits or stay float: a runtime is as fast with two.
        bits: which bits a layer may have, 2 to 8; not for a latency.
        rounding: "nearest", with biases corrected; or "learned" by AdaRound, where the budget holds with it.
        allocate: what chooses: "budget_knapsack" (the integer program) or "layer_sensitivity" (one tolerance for all).
        calibrator: how a range of activations follows from what was seen; see `int8`.
        iterations: steps for each layer where rounding is learned.
        calibration_batches: how many batches of the calibration (or training) data to look at.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        BudgetError: the budget cannot be parsed.
        BadOption: it is none on size or latency.
        CompressionError: not even the fewest bits meet it.
        MissingNeed: a latency, in a plain call in which nothing is timed.
    """
    limit = _limit(budget)
    start = copy.deepcopy(model)
    fold(model, task)
    chosen = list(sites(model, where, LAYERS))
    batch, every = joined(task, calibration_batches, MOST), joined(task, calibration_batches)
    # 1. What each layer alone costs the outputs, and what it takes, with every number of bits.
    options = sorted(set(bits), reverse=True) if limit.quantity == "size" else [FLOAT, 8]
    costs, drops = _sensitivity(model, task, chosen, options, batch, limit)
    # 2. The bits with the least sum of costs within the budget; again, tighter, until the real figure is.
    choose = fill("allocation", allocate)

    def built(share: float) -> tuple[dict[str, int], nn.Module]:
        curves = {path: _curve(costs, drops, path) for path in chosen}
        found = choose(curves, share)
        given = {path: options[round(found[path])] for path in chosen}
        small = _on_grids(model, task, given, calibrator, calibration_batches)
        correct_biases(small, model, task, every, [path for path, count in given.items() if count != FLOAT])
        return given, small  # with its biases, which may be new and take bytes

    goal = _Goal(limit, start, task)
    given, small = goal.within(built, sum(max(costs[path]) for path in chosen))
    show("bits", [{"layer": p, "bits": given[p], **_told(options, costs[p], drops[p])} for p in chosen])
    # 3. Rounding, and what came of it.
    quantized = {path: count for path, count in given.items() if count != FLOAT}
    for path in given.keys() - quantized.keys():
        skip(path, "it stays float: the budget holds without it")
    if rounding == "learned":
        learned = adaround(copy.deepcopy(model), task, weight_bits=quantized, iterations=iterations,
                           calibrator=calibrator, calibration_batches=calibration_batches)  # fmt: skip
        if (reached := goal.figure(learned)) <= goal.allowed():
            return learned
        note(f"weights are rounded to nearest: learned rounding has more entropy, with which the network has "
             f"{reached:.5g} of {goal.allowed():.5g} under {limit.text}")  # fmt: skip
    report(model, small, task, list(quantized))
    return small


def _limit(budget: str) -> Limit:
    limits = parse(budget)
    if len(limits) != 1 or limits[0].quantity not in ("size", "latency"):
        raise BadOption(f"budget={budget!r}: bits are given under one limit, of size or latency, such as size<=0.15x")
    return limits[0]


def _sensitivity(
    model: nn.Module, task: Task, chosen: Sequence[str], options: Sequence[int], batch: Any, limit: Limit
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """What every layer takes, and what it costs the outputs when only its weights have so many bits."""
    wanted = answers(model, task, batch)
    macs = {path: row.macs for path, row in cost(model, task.inputs()).layers.items()}
    costs: dict[str, list[float]] = {path: [] for path in chosen}
    drops: dict[str, list[float]] = {path: [] for path in chosen}
    pairs = [(path, count) for path in chosen for count in options]
    for path, count in track(pairs, "sensitivity", len(pairs)):
        trial = copy.deepcopy(model)
        if count != FLOAT:
            site = sites(trial, path, LAYERS)[path]
            attach(site.module, symmetric_mse(site, count), root=trial)
        drops[path].append(divergence(wanted, answers(trial, task, batch)) if count != FLOAT else 0.0)
        taken = _bytes(bake(trial).get_submodule(path)) if limit.quantity == "size" else macs.get(path, 0) * (count > 8)
        costs[path].append(taken)
    return costs, drops


def _bytes(layer: nn.Module) -> float:
    """The entropy of a layer's integers, with its scales, in bytes."""
    codes = codes_of(layer)
    if codes is None:
        return float(layer.weight.numel() * 4)  # type: ignore[operator]
    counts = torch.unique(codes.symbols, return_counts=True)[1].numpy()
    return entropy_bits(counts) / 8 + 4 * len(codes.symbols)


def _curve(costs: Mapping[str, Sequence[float]], drops: Mapping[str, Sequence[float]], path: str) -> Curve:
    """A layer's options as ratios 0, 1, 2 ...: what they cost, and the part of the whole that they save."""
    whole = sum(max(own) for own in costs.values()) or 1.0
    rising = torch.tensor(drops[path], dtype=torch.float64).cummax(0)[0].tolist()
    base = rising[0]
    saved = torch.tensor([(costs[path][0] - own) / whole for own in costs[path]], dtype=torch.float64).cummax(0)[0]
    return Curve(tuple(map(float, range(len(rising)))), tuple(d - base for d in rising), tuple(saved.tolist()))


def _told(options: Sequence[int], costs: Sequence[float], drops: Sequence[float]) -> dict[str, Any]:
    each = zip(options, costs, drops, strict=True)
    return {"options": [{"bits": b, "takes": c, "divergence": d} for b, c, d in each]}


def _on_grids(model: nn.Module, task: Task, given: Mapping[str, int], calibrator: str, batches: int) -> nn.Module:
    small = {path: count for path, count in given.items() if count != FLOAT}
    if not small:
        return copy.deepcopy(model)
    with recording():  # what is said of a trial is said again of the result
        return quantize(
            copy.deepcopy(model),
            task,
            weights="symmetric_mse",
            weight_bits=small,
            acts=calibrator,
            place="fused",
            calibration_batches=batches,
        )


@dataclass(frozen=True)
class _Goal:
    """A limit on a real figure."""

    limit: Limit
    original: nn.Module
    task: Task

    def within(self, built: Any, whole: float) -> tuple[dict[str, int], nn.Module]:
        """The first candidate with which the limit holds, from the largest share that may do.

        Args:
            built: share to be saved -> bits, network.
            whole: what all layers take with the most bits.
        """
        share, allowed = 0.0, self.allowed()
        given, small = built(0.0)
        for _ in range(TRIES):
            reached = self.figure(small)
            if reached <= allowed:
                note(f"{self.limit.text} holds: {reached:.5g} of {allowed:.5g}, with {_counted(given)} bits")
                return given, small
            over = (reached - allowed) / whole if self.limit.quantity == "size" else (reached / allowed - 1) * 0.5
            share += over * 1.02 + 1e-3
            given, small = built(min(share, 1.0))
        raise CompressionError(
            f"{self.limit.text} is not reached: the network has {self.figure(small):.5g} of {allowed:.5g} with "
            f"{_counted(given)} bits; ask for less, allow fewer bits, or prune it first"
        )

    def allowed(self) -> float:
        """The limit in bytes, or relative to the original's latency."""
        if self.limit.quantity == "size":
            held = {id(t): t for t in (*self.original.parameters(), *self.original.buffers())}
            whole = float(sum(t.numel() * t.element_size() for t in held.values()))
            return self.limit.allowed({"size": whole}) - PROVENANCE
        if self.limit.relative:
            return self.limit.value
        inputs = self.task.inputs()
        return self.limit.value / measuring.latency(self.original, self.original, inputs).before

    def figure(self, small: nn.Module) -> float:
        """What the network has."""
        baked = bake(copy.deepcopy(small))
        if self.limit.quantity == "latency":
            return measuring.latency(self.original, baked, self.task.inputs()).ratio
        with tempfile.TemporaryDirectory() as folder, recording():
            return float(save(baked, Path(folder) / "model.fw", example_inputs=self.task.inputs()).bytes)


def _counted(given: Mapping[str, int]) -> str:
    """How many layers have how many bits."""
    return ", ".join(f"{sum(b == count for b in given.values())} x {count}" for count in sorted(set(given.values())))
