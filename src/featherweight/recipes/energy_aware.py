"""Energy-aware pruning: the layers that use most energy first, what is missed most restored, the rest refitted.

Tien-Ju Yang, Yu-Hsin Chen, Vivienne Sze, "Designing Energy-Efficient Convolutional Neural Networks using Energy-Aware
Pruning", CVPR 2017, arXiv:1611.05128. Layers are taken in descending order of their energy (those pruned later have
less freedom left). In a layer (1) small weights are removed, more than are to go; (2) those whose return lowers the
error of the output feature maps most are restored; (3) each filter is refitted by least squares, `a = argmin |y - X_S
a|^2`, y the outputs of the original network and X the inputs in the network pruned so far; (4) after all layers
everything is fine-tuned, and another round begins.

The energy of a layer for one sample, with `p` the positions a weight is used at, `d` the share of inputs that are not
zero (a multiplication with a zero is skipped), and n the numbers that are not zero:
`E = n_weights p d (mac + 4 register) + (n_weights + n_inputs + n_outputs) (buffer + dram)`.

Departs from the paper: its energies come from a dataflow search for one chip; here every operand of a multiplication
comes from a register (weight, input, partial sum in and out) and every number moves once through the buffer and once
through the memory; steps between processing elements are left out. Errors are compared by their squares, and all
restored weights are chosen at once. The accuracy at which to stop is the guard of `compress`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.capture import observe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake
from featherweight.core.layerwise import Sums, called, kept_by_masks, unfit, with_bias
from featherweight.core.ledger import note, skip
from featherweight.core.masks import largest
from featherweight.core.reconstruct import Moments, augmented, put
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.errors import MissingNeed


@final
@dataclass(frozen=True)
class Energies:
    """What one operation, or one number moved, costs: relative to a multiply-accumulate, or in picojoules."""

    mac: float = 1
    register: float = 1
    buffer: float = 6
    dram: float = 200

    def of(self, weights: int, traffic: Traffic) -> float:
        """The energy of a layer for one sample, given how many of its weights are not zero."""
        macs = weights * traffic.positions * traffic.density
        moved = weights + traffic.inputs + traffic.outputs
        return macs * (self.mac + 4 * self.register) + moved * (self.buffer + self.dram)


@final
@dataclass(frozen=True)
class Traffic:
    """What a layer sees for one sample: inputs that are not zero, their share, outputs, positions of every weight."""

    inputs: float
    density: float
    outputs: float
    positions: float


@recipe(
    paper="Yang et al., CVPR 2017, arXiv:1611.05128",
    family="prune",
    needs={"calibration"},
    shrinks={"weights"},
    small={"calibration_batches": 2, "sparsity": 0.6, "finetune": 0},
)
def energy_aware(
    model: nn.Module,
    task: Task,
    *,
    sparsity: PerLayer[Fraction] = 0.9,
    rounds: Count = 1,
    restore: Fraction = 0.1,
    mac: Amount = 1.0,
    register: Amount = 1.0,
    buffer: Amount = 6.0,
    dram: Amount = 200.0,
    ridge: Amount = 1e-4,
    positions: Count = 10,
    calibration_batches: Count = 16,
    finetune: Amount = 4,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereWeighted = None,
) -> nn.Module:
    """Removes small weights of the layers that use most energy first, restores what is missed most, refits the rest.

    Args:
        sparsity: fraction of the weights removed, of every layer; or layer patterns with a fraction each.
        rounds: an equal part is removed in each, layers in the order of their energy then.
        restore: of the weights that stay, this fraction is chosen by the error that they undo, the others by size.
        mac: energy of a multiply-accumulate.
        register: energy of moving a number between a register and the arithmetic.
        buffer: energy of moving a number through the buffer on the chip.
        dram: energy of moving a number to or from memory.
        ridge: pull towards the weights that are there, as a share of the mean square of the inputs.
        positions: output positions drawn from every sample.
        calibration_batches: how many batches of the calibration (or training) data are looked at.
        finetune: passes of fine-tuning after every round.
        lr: its learning rate.
        optimizer: its optimizer, as in `fit`.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range.
        UnknownName: a pattern matches nothing.
        MissingNeed: fine-tuning without training data.
    """
    if finetune and task.train is None:  # told before the work and not after it
        raise MissingNeed("the fine-tuning needs training data: pass Task(train=...), or finetune=0")
    found, goals = per_layer(model, "sparsity", sparsity, where)
    keeps = {path: site.keep for path, site in found.items()}
    original, others = copy.deepcopy(model), kept_by_masks(model)
    energies = Energies(mac, register, buffer, dram)
    bake(model)
    reasons = {path: unfit(model, path, called(model, task)) for path in found}
    for path in [path for path, why in reasons.items() if why]:
        skip(path, reasons[path])
        del goals[path]
    for turn in range(1, rounds + 1):
        traffic = seen(model, list(goals), task, calibration_batches)
        before = {path: energies.of(int(keeps[path].sum()), traffic[path]) for path in goals}
        for path in sorted(goals, key=lambda path: -before[path]):
            moments = Sums(model, original, task, positions, calibration_batches).of(path)
            layer, keep = model.get_submodule(path), keeps[path].flatten(1)
            kept = chosen(moments, augmented(layer), keep, goals[path] * turn / rounds, restore)
            if not torch.equal(kept, keep):
                put(layer, refitted(moments, augmented(layer), kept, layer.bias is not None, ridge))
            keeps[path] = kept.view_as(keeps[path])
        told(before, {path: energies.of(int(keeps[path].sum()), traffic[path]) for path in goals})
        for (path, name), keep in others.items():
            Site(path, model.get_submodule(path), name).set_mask(model, keep)
        for path in (path for path in goals if not keeps[path].all()):
            Site(path, model.get_submodule(path)).set_mask(model, keeps[path])
        if finetune:
            task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label=f"fine-tune {turn}/{rounds}")
        if turn < rounds:
            bake(model)
    return model


def seen(model: nn.Module, paths: list[str], task: Task, batches: int) -> dict[str, Traffic]:
    """What every layer sees for one sample, on the mean over the first batches."""
    sums = {path: torch.zeros(4, dtype=torch.float64) for path in paths}  # samples, inputs, of them not zero, outputs

    def look(path: str, value: Tensor, at: str) -> None:
        if at == "input":
            sums[path] += torch.tensor([len(value), value.numel(), int(value.count_nonzero()), 0])
        else:
            sums[path][3] += value.numel()

    for at in ("input", "output"):
        observe(model, paths, task, islice(task.calibrating(), batches), partial(look, at=at), at=at)
    found = {}
    for path, (samples, inputs, alive, outputs) in ((path, total.tolist()) for path, total in sums.items()):
        wide = len(model.get_submodule(path).weight)  # type: ignore[arg-type]
        per = max(samples, 1)
        found[path] = Traffic(alive / per, alive / max(inputs, 1), outputs / per, outputs / per / wide)
    return found


def chosen(moments: Moments, weight: Tensor, keep: Tensor, sparsity: float, restore: float) -> Tensor:
    """What stays (outputs, columns): the largest weights, and those of the others whose return undoes most error."""
    size, within = weight[:, :-1].abs(), {"": keep}
    target = largest({"": size}, {"": sparsity}, within=within)[""]
    some = 1 - (1 - sparsity) * (1 - restore)
    big = largest({"": size}, {"": some}, within=within)[""]
    gains = torch.where(big, torch.inf, gained(moments, torch.where(with_bias(big, True), weight, 0.0), weight))
    gone = keep.numel() - int(target.sum())
    return largest({"": gains}, {"": gone / keep.numel()}, within=within)[""]


def gained(moments: Moments, pruned: Tensor, weight: Tensor) -> Tensor:
    """By how much the squared error falls if a weight alone returns to `pruned`, (outputs, columns)."""
    slope = moments.xy.mT - pruned @ moments.xx
    step = weight - pruned
    return (2 * step * slope - step.square() * moments.xx.diagonal())[:, :-1]


def refitted(moments: Moments, weight: Tensor, kept: Tensor, bias: bool, ridge: float) -> Tensor:
    """Least squares over the weights that stay, filter by filter, and the bias."""
    return moments.refit(torch.where(with_bias(kept, True), weight, 0.0), with_bias(kept, bias), ridge)


def told(before: dict[str, float], after: dict[str, float]) -> None:
    """Notes the energies, in the order in which layers were taken."""
    order: Iterable[str] = sorted(before, key=lambda path: -before[path])
    rows = ", ".join(f"{path} {before[path]:.3g} -> {after[path]:.3g}" for path in order)
    note(f"modelled energy {sum(before.values()):.3g} -> {sum(after.values()):.3g} ({rows})")
