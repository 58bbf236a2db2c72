"""Training in fixed point: weights, activations and gradients of few bits, rounded up or down at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, final

import torch
from annotated_types import Interval
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Form, attach, originals, take_off_activation
from featherweight.core.grids import ActivationGrid
from featherweight.core.ledger import note
from featherweight.core.levels import FixedGrid, not_zero
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.errors import BadOption

Rounding = Literal["stochastic", "nearest"]
Word = Annotated[int, Interval(ge=2, le=16)]
Places = Annotated[int, Interval(ge=0, le=24)]


@final
class FixedPoint(Form):
    """Activations or gradients as multiples of `2^-places` in `bits` bits: at random while training, else the nearest.

    The gradient passes straight through inside the range and is zero outside of it.
    """

    stands = ("input", "output", "grad")
    settings = ("bits", "places", "rounding")

    def __init__(self, bits: int, places: int, rounding: Rounding = "stochastic") -> None:
        super().__init__()
        self.bits, self.places, self.rounding = bits, places, rounding

    def unsound(self) -> str:
        whole = self.bits in range(2, 17) and self.places in range(25) and self.rounding in ("stochastic", "nearest")
        return "" if whole and not self._buffers and not self._parameters else "whose bits or rounding are impossible"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (value,) = free
        if not value.is_floating_point():
            return value
        random = self.training and self.rounding == "stochastic"
        snapped = fixed_point(value.detach(), self.bits, self.places, "stochastic" if random else "nearest")
        if not (torch.is_grad_enabled() and value.requires_grad):
            return snapped
        low, high = limits(self.bits, self.places)
        inside = value.clamp(low, high)
        return snapped + (inside - inside.detach())  # what is added is exactly zero


def limits(bits: int, places: int) -> tuple[float, float]:
    """The smallest and the largest number of `bits` bits with `places` of them behind the point.

    >>> limits(8, 6)
    (-2.0, 1.984375)
    """
    return -(2.0 ** (bits - 1)) * 2.0**-places, (2.0 ** (bits - 1) - 1) * 2.0**-places


def fixed_point(values: Tensor, bits: int, places: int, rounding: Rounding) -> Tensor:
    """Values rounded to multiples of `eps = 2^-places` and cut off at `limits`.

    Stochastic: down to the next multiple with probability `1 - (x - floor(x)) / eps`, up otherwise: right on average.
    """
    scaled = values.double() * 2.0**places
    whole = (scaled + torch.rand_like(scaled)).floor() if rounding == "stochastic" else scaled.round()
    return (whole.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * 2.0**-places).to(values.dtype)


def fits(options: Mapping[str, Any]) -> None:
    """Refuses numbers whose sign has no place in front of the point, other than gradients, which may be small."""
    for word, places in (("weight_bits", "weight_places"), ("act_bits", "act_places"), ("grad_bits", "grad_places")):
        if options[places] > options[word] - 1 + (9 if places == "grad_places" else 0):
            limit = limits(options[word], options[places])[1]
            raise BadOption(
                f"{places}={options[places]} with {word}={options[word]}: no number above {limit:g} could be held, "
                f"pass fewer {places}"
            )


@recipe(
    paper="Gupta et al., ICML 2015, arXiv:1502.02551",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"bits"},
    rules=(fits,),
    small={"weight_bits": 8, "weight_places": 6, "epochs": 1},
)
def gupta_stochastic(
    model: nn.Module,
    task: Task,
    *,
    weight_bits: Word = 16,
    weight_places: Places = 14,
    act_bits: Word = 16,
    act_places: Places = 10,
    grad_bits: Word = 16,
    grad_places: Places = 14,
    rounding: Rounding = "stochastic",
    epochs: Amount = 10,
    lr: Positive = 0.01,
    optimizer: Optimizers = "momentum",
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Trains with weights, biases, activations and gradients in fixed point; every update is rounded at random.

    Suyog Gupta, Ankur Agrawal, Kailash Gopalakrishnan, Pritish Narayanan, "Deep Learning with Limited Numerical
    Precision", ICML 2015. A number has `bits` bits, `places` of them behind the point: a multiple of `eps = 2^-places`
    in `[-2^(bits - places - 1), 2^(bits - places - 1) - eps]`, where it saturates. There is no float copy of a weight:
    what the optimizer makes of it is rounded after every step, down with probability `1 - (x - floor(x)) / eps`.
    Updates smaller than eps / 2 are lost by rounding to the nearest; by stochastic rounding they count on average.
    Inner products are summed wide and rounded once.

    The result holds weights and inputs of layers on their grids, for good; activations are rounded to the nearest when
    the network runs. An integer runtime with 16 bits would execute it; those known here compute it in float.

    Departs from the paper: training starts from the network that is given, and weights beyond the range are cut off
    (that is noted). Activations are rounded where a layer reads them, the network's output is not; what the optimizer
    remembers, batch norms and the loss are float. Defaults from memory: 14 places for weights, 10 for activations.

    Args:
        weight_bits: bits of a weight or bias.
        weight_places: how many of them stand behind the point.
        act_bits: bits of an activation.
        act_places: how many of them stand behind the point.
        grad_bits: bits of the gradient of a layer's output.
        grad_places: how many of them stand behind the point.
        rounding: "stochastic" or "nearest" (the paper's comparison, which stalls).
        epochs: training.
        lr: learning rate at the start.
        optimizer: "momentum" (default: 0.9, no decay), "sgd", "adam" or "adamw".
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        BadOption: an option outside its range.
        BadData: weights are not finite.
        CompressionError: every chosen layer is zero.
    """
    found = not_zero(sites(model, where, (nn.Linear, nn.Conv2d)))
    held = [*found.values(), *(Site(f"{p}.bias", s.module, "bias") for p, s in found.items() if _has_bias(s.module))]
    for site in held:
        cut_off(site, *limits(weight_bits, weight_places))
        attach(site.module, grid(site, weight_bits, weight_places), at=site.name, root=model)
    for site in found.values():
        attach(site.module, FixedPoint(act_bits, act_places, rounding), "input")
        attach(site.module, FixedPoint(grad_bits, grad_places, rounding), "grad")
    parameters = [originals(site.module, site.name)[0] for site in held]

    def round_weights(progress: float) -> None:
        for parameter in parameters:
            parameter.data.copy_(fixed_point(parameter.data, weight_bits, weight_places, rounding))

    round_weights(0.0)
    task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, after_step=round_weights, label="fixed point")
    top = 2 ** (act_bits - 1)
    for site in found.values():
        attach(site.module, ActivationGrid(2.0**-act_places, 0, -top, top - 1), "input")
        take_off_activation(site.module, "grad")
    return model


def grid(site: Site, bits: int, places: int) -> FixedGrid:
    """The fixed point numbers as a grid for a weight."""
    top = 2 ** (bits - 1)
    return FixedGrid(torch.tensor(2.0**-places, dtype=site.weight.dtype, device=site.weight.device), -top, top - 1)


def cut_off(site: Site, low: float, high: float) -> None:
    """Says how many weights lie beyond the range."""
    beyond = int(((site.weight < low) | (site.weight > high)).sum())
    if beyond:
        widest = float(site.weight.abs().max())
        note(f"{site.path}: {beyond} of {site.weight.numel()} values, up to {widest:.3g}, are cut off at {high:.3g}: "
             "pass fewer weight_places")  # fmt: skip


def _has_bias(module: nn.Module) -> bool:
    return isinstance(getattr(module, "bias", None), Tensor)
