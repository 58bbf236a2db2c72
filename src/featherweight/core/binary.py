"""Binary weights and activations as forms: signs, what they are measured from, and the sizes that go beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.core.calibration import calibrate
from featherweight.core.forms import Affine, Codes, Form, along, attach, forms_of, originals, take_off
from featherweight.core.grids import mean_sizes
from featherweight.core.site import Site, channel_axis
from featherweight.core.task import Task

ROWS = 512  # places of an input that `Columns` keeps of one call


def signs(value: Tensor) -> Tensor:
    """1 where a value is at least zero, else -1.

    >>> signs(torch.tensor([-2.0, 0.0, 3.0])).tolist()
    [-1.0, 1.0, 1.0]
    """
    one = torch.ones((), dtype=value.dtype, device=value.device)
    return torch.where(value >= 0, one, -one)


def sign_through(value: Tensor, window: float) -> Tensor:
    """The signs, with the gradient `1 / window` where `|value| <= window` and none elsewhere, as a clipped line has."""
    if not (torch.is_grad_enabled() and value.requires_grad):
        return signs(value)
    line = value.clamp(-window, window) / window
    return signs(value.detach()) + (line - line.detach())  # adds exactly zero, and the gradient


# --- weights ----------------------------------------------------------------------------------------------------------


@final
class BinaryWeights(Form):
    """`alpha * sign(w)` with `alpha = mean|w|`, in all or per index of `axis`; `sign(0) = 1`.

    alpha follows the weights, and has a gradient. A channel of zeros stays zero.
    """

    stands = ("weight",)
    settings = ("axis",)

    def __init__(self, axis: int | None = 0) -> None:
        super().__init__()
        self.axis = axis

    def unsound(self) -> str:
        return "" if _axis(self.axis) and not self._buffers and not self._parameters else "whose axis is impossible"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        sign = signs(weight.detach())
        alpha = along(mean_sizes(weight, self.axis, keep), self.axis, weight.dim())
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return sign * alpha
        clipped = weight.clamp(-1, 1)
        # the difference is exactly zero: the value is alpha * sign, the gradient that of both factors
        return sign * alpha + alpha.detach() * (clipped - clipped.detach())

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (weight,) = free
        return _sign_codes(weight.detach(), mean_sizes(weight.detach(), self.axis, keep), self.axis)


@final
class SignWeights(Form):
    """`scale * sign(w)` with a fixed scale, in all or of shape (channels,) along `axis`; `sign(0) = 1`.

    While a network trains, `stochastic` draws the sign: 1 with the probability `clip((w / scale + 1) / 2, 0, 1)`. The
    gradient of a sign is handed to its weight, which `clip` keeps between -scale and scale.
    """

    stands = ("weight",)
    settings = ("axis", "stochastic")
    scale: Tensor

    def __init__(self, scale: Tensor, axis: int | None = 0, *, stochastic: bool = False) -> None:
        super().__init__()
        self.axis, self.stochastic = axis, stochastic
        self.register_buffer("scale", scale.detach().clone())

    def unsound(self) -> str:
        held = self._buffers.keys() == {"scale"} and self.scale.is_floating_point() and _axis(self.axis)
        sound = held and self.scale.dim() == (0 if self.axis is None else 1) and bool(self.scale.isfinite().all())
        return "" if sound and isinstance(self.stochastic, bool) else "whose scale, axis or rounding is impossible"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        scale = along(self.scale, self.axis, weight.dim())
        drawn = self.stochastic and self.training and torch.is_grad_enabled()
        sign = signs(self._draw(weight.detach(), scale) if drawn else weight.detach())
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return sign * scale
        return sign * scale + (weight - weight.detach())

    def _draw(self, weight: Tensor, scale: Tensor) -> Tensor:
        chance = ((weight / scale.clamp_min(torch.finfo(scale.dtype).tiny) + 1) / 2).clamp(0, 1)
        return torch.bernoulli(chance) - 0.5

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (weight,) = free
        return _sign_codes(weight.detach(), self.scale, self.axis)

    @torch.no_grad()
    def clip(self, weight: Tensor) -> None:
        """Clips the free weight to between -scale and scale, in place."""
        scale = along(self.scale, self.axis, weight.dim())
        weight.copy_(torch.minimum(torch.maximum(weight, -scale), scale))


def _axis(axis: object) -> bool:
    return axis is None or (isinstance(axis, int) and not isinstance(axis, bool) and 0 <= axis < 32)


def _sign_codes(weight: Tensor, scale: Tensor, axis: int | None) -> Codes:
    rule = Affine(scale.cpu(), torch.zeros((), dtype=torch.int32), axis)
    return Codes(signs(weight).to(torch.int8).cpu(), rule, tuple(weight.shape))


# --- activations ------------------------------------------------------------------------------------------------------


@final
class SignInput(Form):
    """`sign(x - shift)`, the input of a layer of signs; shift is trained, one number per channel (dimension `dim`).

    The gradient is `1 / window` where `|x - shift| <= window`, else none.
    """

    stands = ("input",)
    settings = ("dim", "window")
    shift: nn.Parameter

    def __init__(self, shift: Tensor, dim: int, window: float) -> None:
        super().__init__()
        self.dim, self.window = dim, window
        self.shift = nn.Parameter(shift.detach().clone())

    def unsound(self) -> str:
        return unsound_shift(self)

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (value,) = free
        return sign_through(value - spread(self.shift, self.dim), self.window)


@final
class SizedSignInput(Form):
    """`sign(u)` of `u = x - shift`, and aside, for the output of the layer, the mean of `|u|` over each window.

    That mean is `K = A * k`, A the mean of `|u|` over the channels (of a group), k a box of the layer's kernel that
    moves as the kernel does; for a linear layer, the mean over the features. `TimesSize` multiplies it to the output.
    """

    stands = ("input",)
    settings = ("dim", "window", "reads")
    shift: nn.Parameter

    def __init__(self, shift: Tensor, dim: int, window: float, layer: nn.Module) -> None:
        super().__init__()
        self.dim, self.window, self.reads = dim, window, reads_of(layer)
        self.shift = nn.Parameter(shift.detach().clone())

    def unsound(self) -> str:
        return unsound_shift(self) or ("" if readable(self.reads) else "whose window is impossible")

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (value,) = free
        centred = value - spread(self.shift, self.dim)
        return sign_through(centred, self.window), self.size(centred)

    def size(self, centred: Tensor) -> Tensor:
        """K, shape (batch, groups, out height, out width), or (..., 1) of a linear layer."""
        if not self.reads:
            return centred.abs().mean(-1, keepdim=True)
        kernel, groups = self.reads["kernel"], self.reads["groups"]
        of_groups = centred.abs().unflatten(-3, (groups, -1)).mean(-3)
        box = of_groups.new_full((groups, 1, *kernel), 1 / (kernel[0] * kernel[1]))
        padded = pad(of_groups, self.reads)
        return F.conv2d(padded, box, None, self.reads["stride"], 0, self.reads["dilation"], groups)


@final
class TimesSize(Form):
    """The output of a layer of signs times what `SizedSignInput` put aside, plus a bias of its own.

    The layer's own bias must be zero: the size would multiply it too.
    """

    stands = ("output",)
    settings = ("dim",)

    def __init__(self, dim: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.dim = dim
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone())

    def unsound(self) -> str:
        bare = self._parameters.keys() <= {"bias"} and not self._buffers
        return "" if bare and self.dim in (-1, -3) else "whose dimension is impossible"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        output, *aside = free
        for size in aside:  # one; none if another form has taken the input's place
            rows = output.shape[-3] // size.shape[-3] if self.dim == -3 else 1
            output = output * (size.repeat_interleave(rows, -3) if rows > 1 and size.shape[-3] > 1 else size)
        bias = self._parameters.get("bias")
        return output if bias is None else output + spread(bias, self.dim)


def reads_of(layer: nn.Module) -> dict[str, Any]:
    """How a convolution moves over its input, JSON-able; empty for a linear layer."""
    if not isinstance(layer, nn.Conv2d):
        return {}
    sizes = {"kernel": layer.kernel_size, "stride": layer.stride, "dilation": layer.dilation}
    around = list(layer._reversed_padding_repeated_twice)  # left, right, above, below: whatever "same" comes to
    held: dict[str, Any] = {name: list(size) for name, size in sizes.items()}
    return held | {"padding": around, "groups": layer.groups, "mode": layer.padding_mode}


def readable(reads: Any) -> bool:
    """Whether data from a file say how a convolution may move."""
    if reads == {}:
        return True
    lengths = {"kernel": 2, "stride": 2, "dilation": 2, "padding": 4}
    if not isinstance(reads, dict) or reads.keys() != {*lengths, "groups", "mode"}:
        return False
    if not all(isinstance(reads[name], list) and len(reads[name]) == n for name, n in lengths.items()):
        return False
    numbers = [value for name in lengths for value in reads[name]] + [reads["groups"]]
    whole = all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 256 for value in numbers)
    positive = whole and all(value > 0 for name in ("kernel", "stride", "dilation") for value in reads[name])
    return positive and reads["groups"] > 0 and reads["mode"] in ("zeros", "reflect", "replicate", "circular")


def pad(value: Tensor, reads: Mapping[str, Any]) -> Tensor:
    """An input (..., channels, height, width) with what the convolution puts around it."""
    return F.pad(value, reads["padding"], "constant" if reads["mode"] == "zeros" else reads["mode"])


def spread(values: Tensor, dim: int) -> Tensor:
    """One number per channel, shaped to broadcast over a tensor whose channels are its dimension `dim`, from behind."""
    return values.view(-1, *[1] * (-dim - 1))


def unsound_shift(form: Any) -> str:
    """Why a restored form has no shift, window or dimension to work with; empty if it has."""
    held = form._parameters.keys() == {"shift"} and not form._buffers and form.shift.is_floating_point()
    sound = held and form.shift.dim() == 1 and bool(form.shift.isfinite().all()) and form.dim in (-1, -3)
    window = isinstance(form.window, float) and 0 < form.window < float("inf")
    return "" if sound and window else "whose shift, window or dimension is impossible"


# --- where to start ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """What calibration saw of a layer's input: per channel its mean, and of the rest the mean size and the deviation.

    Of what a rectifier puts out every sign is 1: the mean is what a sign can be taken around.
    """

    shift: Tensor
    size: float
    window: float


@final
class Columns(Form):
    """Stands where a form will stand and remembers what passes, channel by channel, at random places."""

    stands = ()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.parts: list[Tensor] = []

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (value,) = free
        held = value.detach().movedim(self.dim, -1).flatten(0, -2)
        draw = torch.Generator().manual_seed(len(self.parts))
        self.parts.append(held[torch.randint(len(held), (min(len(held), ROWS),), generator=draw).to(held.device)])
        return value

    def start(self, channels: int) -> Start:
        """What was seen; zero and one where nothing was."""
        if not self.parts:
            return Start(torch.zeros(channels), 1.0, 1.0)
        held = torch.cat(self.parts)
        rest = held - held.mean(0)
        return Start(held.mean(0), float(rest.abs().mean()) or 1.0, float(rest.square().mean().sqrt()) or 1.0)


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a layer's input that counts channels, from behind."""
    return -1 if isinstance(layer, nn.Linear) else -3


def looked_at(model: nn.Module, task: Task, layers: Mapping[str, nn.Module], batches: int) -> dict[str, Start]:
    """Runs calibration batches and says where the signs of each layer's input start; watchers stay on the inputs."""
    watchers = {path: Columns(channel_dim(layer)) for path, layer in layers.items()}
    for path, layer in layers.items():
        attach(layer, watchers[path], "input")
    calibrate(model, task, batches)
    return {path: watcher.start(_channels(layers[path])) for path, watcher in watchers.items()}


def _channels(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[return-value]


def clip(found: Iterable[Site]) -> None:
    """Clips the free weights under `SignWeights`, in place: what Courbariaux's networks do after every update."""
    for site in found:
        for form in forms_of(site.module, site.name):
            if isinstance(form, SignWeights):
                form.clip(originals(site.module, site.name)[0])


def sign_weights(site: Site, size: float = 1.0, *, stochastic: bool = False) -> SignWeights:
    """Signs times the mean size of each output channel's surviving weights, times `size`."""
    axis = channel_axis(site)
    scale = mean_sizes(site.weight, axis, site.keep.to(site.weight.device))
    return SignWeights(scale * size, axis, stochastic=stochastic)


def power_of_two(value: Tensor) -> Tensor:
    """`AP2(x) = sign(x) 2^round(log2|x|)`: the nearest power of two, in the logarithm.

    >>> power_of_two(torch.tensor([0.3, -5.0, 0.0])).tolist()
    [0.25, -4.0, 0.0]
    """
    return torch.where(value == 0, value, value.sign() * value.abs().log2().round().exp2())


def add_mean(model: nn.Module, site: Site, start: Start) -> None:
    """Puts into a layer's bias, if it has one, what the layer makes of the mean that signs are taken around.

    A form on the bias is taken off: the sum need not lie on its grid.
    """
    take_off(model, site.module, "bias")
    bias = site.module._parameters.get("bias")
    if bias is not None:
        bias.data += constant_part(site.weight, start.shift, getattr(site.module, "groups", 1))


def constant_part(weight: Tensor, shift: Tensor, groups: int = 1) -> Tensor:
    """What a weight makes of an input that is `shift` everywhere, shape (out,); borders of images apart.

    >>> constant_part(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 4.0])).tolist()
    [11.0]
    """
    taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    rows = shift.to(taps).view(groups, 1, -1).expand(-1, len(taps) // groups, -1)
    return (taps * rows.reshape(len(taps), -1)).sum(1)
