"""Precision cast: weights in a narrower floating-point format, rounded to the nearest even."""

from __future__ import annotations

from typing import Annotated, Literal, final

import torch
from torch import Tensor, nn

from featherweight.catalogue import recipe
from featherweight.core.forms import Form, attach
from featherweight.core.ledger import note
from featherweight.core.levels import Levels, not_zero, straight_through
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WEIGHTED, Layers, Where
from featherweight.core.task import Task
from featherweight.errors import BadData

Format = Literal["fp32", "fp16", "bf16", "e4m3", "e5m2", "e2m1"]
Half = Literal["fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NARROW = {"e4m3": (4, 3, 448.0), "e5m2": (5, 2, 57344.0), "e2m1": (2, 1, 6.0)}
"""Exponent bits, mantissa bits and largest number of the formats of 8 and 4 bits."""
CASTABLE = (*WEIGHTED, nn.Embedding)


@final
class Cast(Form):
    """Values that a floating-point type of 16 or 32 bits holds exactly: the nearest, half-way the even one.

    What lies beyond the largest number becomes the largest number. The gradient passes straight through.
    """

    stands = ("weight", "input", "output")
    settings = ("kind",)

    def __init__(self, kind: Literal["fp32", "fp16", "bf16"]) -> None:
        super().__init__()
        self.kind = kind

    def unsound(self) -> str:
        return "" if self.kind in DTYPES and not self._buffers and not self._parameters else "of an unknown type"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (value,) = free
        if not value.is_floating_point():
            return value
        dtype = DTYPES[self.kind]
        top = torch.finfo(dtype).max
        return straight_through(value, value.detach().clamp(-top, top).to(dtype).to(value.dtype))


def float_levels(exponent: int, mantissa: int, top: float) -> Tensor:
    """All finite numbers of a format with subnormals, ascending, float64; the bias is `2^(exponent - 1) - 1`.

    >>> float_levels(2, 1, 6.0).tolist()[7:]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    bias, parts = 2 ** (exponent - 1) - 1, 2**mantissa
    small = [part / parts * 2.0 ** (1 - bias) for part in range(parts)]
    normal = [(1 + part / parts) * 2.0 ** (e - bias) for e in range(1, 2**exponent) for part in range(parts)]
    sizes = torch.tensor([size for size in small + normal if size <= top], dtype=torch.float64)
    return torch.cat([-sizes[1:].flip(0), sizes])


def even_edges(levels: Tensor) -> Tensor:
    """The edges between the numbers of a format with which half-way goes to the one whose mantissa ends with 0."""
    middle = (levels[1:] + levels[:-1]) / 2
    upper = torch.arange(len(middle)) - len(levels) // 2 + 1  # the code of the number above, 0 for zero
    return torch.where(upper % 2 == 0, middle, torch.nextafter(middle, torch.full_like(middle, torch.inf)))


@recipe(paper="IEEE 754-2019; OCP 8-bit FP, 2023", family="quantize", shrinks={"bits"}, small={"format": "e4m3"})
def precision_cast(
    model: nn.Module,
    task: Task,
    *,
    format: Format = "fp16",
    overflow: Literal["saturate", "inf"] = "saturate",
    scaled: bool | None = None,
    activations: Half | None = None,
    where: Annotated[Where, Layers(CASTABLE)] = None,
) -> nn.Module:
    """Casts weights to fp32, fp16, bf16, fp8 (e4m3, e5m2) or fp4 (e2m1), rounding to the nearest even number.

    IEEE 754 binary32 and binary16, bfloat16, the 8-bit formats of the Open Compute Project (Micikevicius et al., 2022,
    arXiv:2209.05433) and the 4-bit one of its microscaling formats, subnormals included. For weights of normal size the
    error is at most `2^-(p + 1) |w|` with p mantissa bits: 10, 7, 3, 2 and 1.

    Storage only: the file holds the narrow numbers, and networks run in the precision that they had. Biases, norms and
    their statistics stay as they are: a small variance would underflow to zero.

    Departs from the paper: formats of 8 and 4 bits scale each layer by its largest weight unless `scaled` says
    otherwise, because weights of usual size would mostly round to zero; e4m3 and e2m1 have no infinity.

    Args:
        format: "fp32", "fp16", "bf16", "e4m3", "e5m2" or "e2m1".
        overflow: what happens to a weight above the largest number: it becomes that number ("saturate"), or, as the
            format's own rounding has it, infinite, which is refused with the numbers ("inf").
        scaled: divide each layer by a number such that its largest weight becomes the largest number; for formats of 8
            and 4 bits when left out. Formats of 16 and 32 bits are not scaled.
        activations: also round the inputs of these layers to "fp16" or "bf16".
        where: which layers; all linear, convolution and embedding layers when left out.

    Raises:
        BadData: a weight is not finite, or would become infinite.
        CompressionError: every chosen layer is zero.
    """
    for path, site in not_zero(sites(model, where, CASTABLE)).items():
        before = site.weight
        form = cast_form(site, format, scaled=True if scaled is None else scaled)
        if overflow == "inf":
            refuse_infinite(site, form)
        attach(site.module, form, at=site.name, root=model)
        lost = int(((site.weight == 0) & (before != 0)).sum())
        if lost:
            note(f"{path}: {lost} of {before.numel()} weights are too small for {format} and become zero")
        if activations is not None:
            attach(site.module, Cast(activations), "input")
    note(f"storage only: weights are held as {format}, the network runs in the precision that it had")
    return model


def cast_form(site: Site, format: Format, *, scaled: bool) -> Form:
    """The form that holds a site's weights in a format."""
    if format in ("fp32", "fp16", "bf16"):
        return Cast(format)
    levels = float_levels(*NARROW[format])
    widest = float((site.weight.cpu().double() * site.keep).abs().max())
    scale = widest / NARROW[format][2] if scaled and widest else 1.0
    return Levels((levels * scale).to(site.weight), (even_edges(levels) * scale).to(site.weight.device))


def refuse_infinite(site: Site, form: Form) -> None:
    """Refuses weights that round to no finite number of the format.

    Raises:
        BadData: there is one.
    """
    if isinstance(form, Cast):
        beyond = ~site.weight.to(DTYPES[form.kind]).isfinite()
        top = torch.finfo(DTYPES[form.kind]).max
    else:
        assert isinstance(form, Levels)
        high = form.levels.double()
        top = float(high[-1])
        beyond = site.weight.abs().double() >= high[-1] + (high[-1] - high[-2]) / 2
    if bool(beyond.any()):
        raise BadData(
            f"{int(beyond.sum())} weights of {site.path} are above {top:.6g}, the largest number of the format: "
            'pass overflow="saturate", or a format of a wider range'
        )
