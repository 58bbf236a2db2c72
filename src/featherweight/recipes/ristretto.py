"""Ristretto: dynamic fixed point, minifloats and powers of two; how many bits each kind of number needs is measured.

Philipp Gysel, Mohammad Motamedi, Soheil Ghiasi, "Hardware-oriented Approximation of Convolutional Neural Networks",
ICLR 2016 workshop, arXiv:1604.03168; Gysel, "Ristretto: Hardware-Oriented Approximation of Convolutional Neural
Networks", 2016, arXiv:1605.06402. Weights of convolutions, weights of linear layers, and activations (inputs and
outputs of both) are quantized apart, each with fewer and fewer bits until the metric on the validation data falls by
more than the margin; then all together, measured again, and fine-tuned with float weights behind the quantized ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, Literal, final

import torch
from annotated_types import Interval
from torch import Tensor, nn

from featherweight.allowed import Amount, Bits, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.calibration import observed
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Form, attach
from featherweight.core.grids import ActivationGrid, Seen
from featherweight.core.ledger import note, show
from featherweight.core.levels import FixedGrid, Levels, not_zero, straight_through, survivors
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task, drop, evaluate
from featherweight.errors import BadOption

Saturation = Literal["noclip", "reference"]
Watched = Mapping[tuple[str, str], Seen]
LAYERS = (nn.Linear, nn.Conv2d)
WIDTHS = (16, 8, 4, 2, 1)
ROLES = {"conv": "weights of convolutions", "fc": "weights of linear layers", "act": "activations"}


@dataclass(frozen=True)
class Numbers:
    """A number format: forms for weights and activations of so many bits; None where there is none so narrow."""

    weights: Callable[[Site, int], Form | None]
    acts: Callable[[Seen, int], Form | None]


def some(options: Mapping[str, Any]) -> None:
    """Refuses an empty list of widths."""
    if not options["widths"]:
        raise BadOption("widths=[]: must hold at least one number of bits, such as [16, 8, 4]")


# --- the search -------------------------------------------------------------------------------------------------------


def narrowed(
    model: nn.Module,
    task: Task,
    numbers: Numbers,
    seen: Watched,
    paths: Sequence[str],
    *,
    widths: Sequence[int],
    margin: float,
    fixed: Mapping[str, int],
) -> nn.Module:
    """Puts the fewest bits that keep the metric within the margin on each kind of number that `fixed` leaves open."""
    baseline = evaluate(model, task, label="baseline")
    kinds = {role: None for path in paths for role in (role_of(model.get_submodule(path)), "act")}
    found, rows = dict(fixed), []
    for role in (kind for kind in ROLES if kind in kinds and kind not in fixed):
        for width in sorted(set(widths), reverse=True):
            trial = quantized(deepcopy(model), numbers, seen, paths, {role: width})
            if trial is None:
                break
            lost = drop(baseline, evaluate(trial, task, label=f"{role} {width} bits"))
            rows.append({"kind": role, "bits": width, "drop": lost})
            if lost > margin:
                break
            found[role] = width
        if role not in found:
            found[role] = max(widths)
            note(f"{ROLES[role]}: even {max(widths)} bits lose more than {margin:g}; they are kept all the same")
    show("bit widths", rows)
    if quantized(model, numbers, seen, paths, found) is None:
        raise BadOption(f"widths={list(widths)}: none is wide enough for this format, pass 8 or 16 as well")
    together = evaluate(model, task, label="combined")
    told = ", ".join(f"{ROLES[role]} {bits} bits" for role, bits in found.items() if role in kinds)
    note(f"{told}: apart each within {margin:g} of {baseline}; together {together}, a drop of "
         f"{drop(baseline, together):.4g}")  # fmt: skip
    return model


def quantized(
    model: nn.Module, numbers: Numbers, seen: Watched, paths: Sequence[str], widths: Mapping[str, int]
) -> nn.Module | None:
    """The model with the kinds of numbers that `widths` names in so many bits; None if no format is so narrow."""
    for path in paths:
        site = Site(path, model.get_submodule(path))
        if (bits := widths.get(role_of(site.module))) is not None:
            if (form := numbers.weights(site, bits)) is None:
                return None
            attach(site.module, form, at=site.name, root=model)
        for at in ("input", "output") if "act" in widths else ():
            if (form := numbers.acts(seen[path, at], widths["act"])) is None:
                return None
            attach(site.module, form, at)
    return model


def role_of(layer: nn.Module) -> str:
    """What a layer's weights count as."""
    return "fc" if isinstance(layer, nn.Linear) else "conv"


def watched(
    model: nn.Module, task: Task, where: WhereLinearOrConv2d, batches: int
) -> tuple[dict[str, Site], dict[tuple[str, str], Seen]]:
    """The layers to quantize, and what passes at their inputs and outputs."""
    found = not_zero(sites(model, where, LAYERS))
    return found, observed(model, task, [(path, at) for path in found for at in ("input", "output")], batches)


# --- dynamic fixed point ----------------------------------------------------------------------------------------------


def integer_length(largest: float, saturation: Saturation) -> int:
    """Bits in front of the point, without a sign, for numbers up to `largest`.

    "reference" is `ceil(log2 largest)`; "noclip" is one more where `largest` is a power of two.

    >>> [integer_length(x, "reference") for x in (0.3, 1.0, 5.0)], integer_length(1.0, "noclip")
    ([-1, 0, 3], 1)
    """
    exact = math.log2(largest) if largest > 0 else 0.0
    return math.ceil(exact) if saturation == "reference" else math.floor(exact) + 1


def dynamic_weights(site: Site, bits: int, saturation: Saturation) -> FixedGrid:
    """Multiples of `2^-fl` in `bits` bits with their sign: `fl = bits - il`, `il` one more than the integer length."""
    il = integer_length(float(survivors(site).abs().max()), saturation) + 1
    top = 2 ** (bits - 1)
    return FixedGrid(torch.tensor(2.0 ** (il - bits)).to(site.weight), -top, top - 1)


def dynamic_acts(seen: Seen, bits: int, saturation: Saturation) -> ActivationGrid:
    """Multiples of `2^-fl` for what was seen.

    "reference" is the authors' code: `fl = bits - ceil(log2 max)` with a sign, so that it clips at half the maximum or
    a little more, behind a ReLU too. "noclip" has one bit more in front, or no sign where nothing negative was seen.
    """
    largest = max(abs(seen.low), abs(seen.high)) if seen.parts else 0.0
    il, top = integer_length(largest, saturation), 2 ** (bits - 1)
    if saturation == "reference":
        return ActivationGrid(2.0 ** (il - bits), 0, -top, top - 1)
    if not seen.parts or seen.low >= 0:
        return ActivationGrid(2.0 ** (il - bits), 0, 0, 2 * top - 1)
    return ActivationGrid(2.0 ** (il + 1 - bits), 0, -top, top - 1)


@recipe(
    paper="Gysel et al., ICLR workshop 2016, arXiv:1604.03168",
    family="accelerate",
    needs={"labels", "train"},
    shrinks={"bits"},
    rules=(some,),
    small={"widths": [8, 4], "calibration_batches": 2, "epochs": 1},
)
def ristretto_dynamic_fixed_point(
    model: nn.Module,
    task: Task,
    *,
    widths: Sequence[Bits] = WIDTHS,
    margin: Amount = 0.01,
    saturation: Saturation = "noclip",
    rounding: Literal["nearest", "stochastic"] = "nearest",
    calibration_batches: Count = 10,
    epochs: Amount = 2,
    lr: Positive = 1e-4,
    optimizer: Optimizers = None,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Fixed point whose point stands elsewhere for each layer's weights, inputs and outputs; bit widths are searched.

    See the module for the paper and the search. A group of numbers (a layer's weights, inputs or outputs) has a
    fractional length `fl = bits - il` of its own; scales are powers of two, so that one group becomes another by
    shifts. Runtimes with 8-bit kernels execute what ends at 8 bits or fewer in them.

    Departs from the paper: how far the integers reach is "noclip" by default (`saturation`); biases and norms stay
    float; the margin is one point of the metric as it is. With a mask, ranges are those of the surviving weights.

    Args:
        widths: the numbers of bits to try, the widest first, a pass over the validation data for each kind and width.
        margin: by how much the metric may fall for each kind of number apart.
        saturation: "noclip" (the largest number is on the grid, to a step), or "reference" (the authors' code, which
            clips activations at about half their largest, and powers of two by a step).
        rounding: of weights in the fine-tuning: "nearest" or "stochastic"; what results is rounded to the nearest.
        calibration_batches: how many batches ranges are taken from.
        epochs: fine-tuning.
        lr: learning rate of that.
        optimizer: "adam" (default), "adamw" or "sgd".
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        BadOption: an option outside its range.
        BadData: weights are not finite, or the calibration data are empty.
        CompressionError: every chosen layer is zero.
    """
    found, seen = watched(model, task, where, calibration_batches)
    numbers = Numbers(
        lambda site, bits: dynamic_weights(site, bits, saturation),
        lambda held, bits: dynamic_acts(held, bits, saturation),
    )
    narrowed(model, task, numbers, seen, list(found), widths=widths, margin=margin, fixed={})
    grids = [form for form in model.modules() if isinstance(form, FixedGrid)]
    for grid in grids:
        grid.stochastic = rounding == "stochastic"
    task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="fine-tune")
    for grid in grids:
        grid.stochastic = False
    return model


# --- minifloats -------------------------------------------------------------------------------------------------------


def exponents(exponent: int) -> tuple[int, int]:
    """The smallest and the largest exponent of normal numbers: bias `2^(e - 1) - 1`, the lowest code is zero.

    >>> exponents(5)
    (-14, 16)
    """
    bias = 2 ** (exponent - 1) - 1
    return 1 - bias, 2**exponent - 1 - bias


def minifloat_levels(exponent: int, mantissa: int) -> Tensor:
    """Zero and all normal numbers, ascending, float64; there are no subnormal ones and no infinity.

    >>> minifloat_levels(2, 1).tolist()[6:]
    [0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    low, high = exponents(exponent)
    sizes = [(1 + part / 2**mantissa) * 2.0**e for e in range(low, high + 1) for part in range(2**mantissa)]
    positive = torch.tensor(sizes, dtype=torch.float64)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])


@final
class Minifloat(Form):
    """Activations as minifloats, by float arithmetic alone: half-way to either side; the rest is cut off.

    Rounding to m + 1 significant bits by Veltkamp's splitting: `t = (2^(23 - m) + 1) x`, `t - (t - x)`.
    """

    stands = ("input", "output")
    settings = ("exponent", "mantissa")

    def __init__(self, exponent: int, mantissa: int) -> None:
        super().__init__()
        self.exponent, self.mantissa = exponent, mantissa

    def unsound(self) -> str:
        whole = self.exponent in range(1, 8) and self.mantissa in range(15)
        return "" if whole and not self._buffers and not self._parameters else "whose bits are impossible"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (value,) = free
        if not value.is_floating_point():
            return value
        low, high = exponents(self.exponent)
        least, top = 2.0**low, (2 - 2.0**-self.mantissa) * 2.0**high
        inside = value.clamp(-top, top)
        plain = inside.detach().float()
        spread = plain * (2.0 ** (23 - self.mantissa) + 1)
        short = spread - (spread - plain)
        normal = torch.where(plain.abs() < least, plain.sign() * least, short)
        snapped = torch.where(plain.abs() < least / 2, torch.zeros_like(plain), normal)
        return straight_through(inside, snapped.to(value.dtype))


def exponent_bits(found: Mapping[str, Site], seen: Watched) -> int:
    """Enough bits for the largest number of the network, and for a quarter of the mean |w| of every layer."""
    weights = [survivors(site).abs() for site in found.values()]
    passed = [max(abs(held.low), abs(held.high)) for held in seen.values() if held.parts]
    largest = max([float(w.max()) for w in weights] + passed)
    smallest = min(float(w.mean()) for w in weights) / 4
    fits = (e for e in range(2, 7) if 2.0 ** exponents(e)[1] >= largest and 2.0 ** exponents(e)[0] <= smallest)
    return next(fits, 7)


@recipe(
    paper="Gysel et al., ICLR workshop 2016, arXiv:1604.03168",
    family="accelerate",
    needs={"labels", "train"},
    shrinks={"bits"},
    rules=(some,),
    small={"widths": [16, 8], "calibration_batches": 2, "epochs": 1},
)
def ristretto_minifloat(
    model: nn.Module,
    task: Task,
    *,
    widths: Sequence[Bits] = WIDTHS,
    margin: Amount = 0.01,
    calibration_batches: Count = 10,
    epochs: Amount = 2,
    lr: Positive = 1e-4,
    optimizer: Optimizers = None,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Floating-point numbers of few bits without subnormals; one exponent width for the network, bit widths searched.

    See the module for the paper and the search. A sign, e exponent bits with the bias `2^(e - 1) - 1` and what is left
    as mantissa; the lowest exponent code stands for zero, the highest is an ordinary number. e is the least with which
    the largest number of the network fits. Simulated, storage only: hardware for such numbers would execute it.

    Departs from the paper: e is also large enough for a quarter of the mean |w| of every layer, because the bias is
    fixed and small weights would all become zero; widths without room for a sign and e bits are not tried. Biases and
    norms stay float. With a mask, ranges are those of the surviving weights.

    Args:
        widths: the numbers of bits to try, the widest first, a pass over the validation data for each kind and width.
        margin: by how much the metric may fall for each kind of number apart.
        calibration_batches: how many batches ranges are taken from.
        epochs: fine-tuning.
        lr: learning rate of that.
        optimizer: "adam" (default), "adamw" or "sgd".
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        BadOption: an option outside its range, or no width is wide enough.
        BadData: weights are not finite, or the calibration data are empty.
        CompressionError: every chosen layer is zero.
    """
    found, seen = watched(model, task, where, calibration_batches)
    e = exponent_bits(found, seen)

    def weights(site: Site, bits: int) -> Form | None:
        return Levels(minifloat_levels(e, bits - 1 - e).to(site.weight)) if bits > e else None

    def acts(held: Seen, bits: int) -> Form | None:
        return Minifloat(e, bits - 1 - e) if bits > e else None

    low, high = exponents(e)
    note(f"{e} exponent bits: numbers from 2^{low} to 2^{high} and more")
    narrowed(model, task, Numbers(weights, acts), seen, list(found), widths=widths, margin=margin, fixed={})
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="fine-tune")


# --- powers of two ----------------------------------------------------------------------------------------------------


def power_levels(highest: int, count: int) -> tuple[Tensor, Tensor]:
    """`+-2^e` for `count` exponents up to the highest, and the edges at which `log2 |w|` is rounded; zero is positive.

    >>> power_levels(-1, 2)[0].tolist()
    [-0.5, -0.25, 0.25, 0.5]
    """
    powers = torch.arange(highest - count + 1, highest + 1, dtype=torch.float64)
    between = 2.0 ** (powers[1:] - 0.5)
    edges = torch.cat([-between.flip(0), torch.zeros(1, dtype=torch.float64), between])
    return torch.cat([-(2.0 ** powers.flip(0)), 2.0**powers]), edges


@recipe(
    paper="Gysel et al., ICLR workshop 2016, arXiv:1604.03168",
    family="accelerate",
    needs={"labels", "train"},
    shrinks={"bits"},
    rules=(some,),
    small={"widths": [8], "calibration_batches": 2, "epochs": 1},
)
def ristretto_pow2(
    model: nn.Module,
    task: Task,
    *,
    weight_bits: Annotated[int, Interval(ge=2, le=6)] = 4,
    highest: int | None = None,
    widths: Sequence[Bits] = WIDTHS,
    margin: Amount = 0.01,
    saturation: Saturation = "noclip",
    calibration_batches: Count = 10,
    epochs: Amount = 2,
    lr: Positive = 1e-4,
    optimizer: Optimizers = None,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Weights as signs and powers of two, activations in dynamic fixed point whose bit width is searched.

    See the module for the paper and the search. `w = sgn(w) 2^clip(round(log2 |w|), e_min, e_max)`: a sign and
    `weight_bits - 1` bits of exponent; there is no zero. Products are shifts on hardware that has them; here networks
    run by multiplication, and what is gained is storage.

    Departs from the paper: the highest exponent follows from the largest weight of each layer; the paper's is -1 (so
    2^-8 to 2^-1) for all, which cuts off weights of 0.71 and more. Biases and norms stay float. Weights that a mask
    hides stay zero.

    Args:
        weight_bits: bits of a weight, one of them for the sign.
        highest: the largest exponent of all layers; each layer's own when left out.
        widths: the numbers of bits to try for activations, the widest first.
        margin: by how much the metric may fall for activations apart.
        saturation: "noclip" or "reference", as for `ristretto_dynamic_fixed_point`.
        calibration_batches: how many batches ranges are taken from.
        epochs: fine-tuning.
        lr: learning rate of that.
        optimizer: "adam" (default), "adamw" or "sgd".
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        BadOption: an option outside its range.
        BadData: weights are not finite, or the calibration data are empty.
        CompressionError: every chosen layer is zero.
    """
    found, seen = watched(model, task, where, calibration_batches)

    def weights(site: Site, bits: int) -> Form:
        own = round(math.log2(float(survivors(site).abs().max()))) if highest is None else highest
        levels, edges = power_levels(own, 2 ** (bits - 1))
        return Levels(levels.to(site.weight), edges.to(site.weight.device))

    if highest is not None:
        cut = sum(int((survivors(site).abs() >= 2 ** (highest + 0.5)).sum()) for site in found.values())
        note(f"{cut} weights are cut off at 2^{highest}" + (": leave highest= out to fit each layer" if cut else ""))
    numbers = Numbers(weights, lambda held, bits: dynamic_acts(held, bits, saturation))
    fixed = {"conv": weight_bits, "fc": weight_bits}
    narrowed(model, task, numbers, seen, list(found), widths=widths, margin=margin, fixed=fixed)
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="fine-tune")
