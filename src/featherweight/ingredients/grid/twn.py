"""Ternary weight networks: weights of -alpha, 0 and alpha, trained through the rounding.

Fengfu Li, Bo Zhang, Bin Liu, "Ternary Weight Networks", 2016, arXiv:1605.04711. With a threshold D a weight becomes
`alpha sign(w) 1[|w| > D]`; for any D the best alpha is the mean size of the weights above it, and the squared error is
`sum w^2 - (sum_{|w|>D} |w|)^2 / k`, k of them above (eq. 5). The paper sets D = 0.7 E|w| (eq. 6), which is near the
best for normal and uniform weights. Latent float weights take the gradient that arrives at the ternary ones.

Departs from the paper: training starts from the network that is given, not from scratch, with Adam, not SGD; the
threshold is the exact best one (sorted by size, the k of the largest `(sum of k largest)^2 / k`), and every output
channel has its own, where the paper has the rule of 0.7 and one threshold a layer (`weights="ternary_rule"`; rule and
optimum differ by 7 % in error for Laplacian weights). With a mask, both are those of the surviving weights.

Executed as int8 weights by the ONNX file; kernels that only add and subtract are not there.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.forms import Affine, Codes, Form, along
from featherweight.core.grids import from_rows, only_bits, rows
from featherweight.core.site import Site, channel_axis

RULE = 0.7


@final
class TernaryWeights(Form):
    """`alpha * t` with t in {-1, 0, 1}; the gradient of a ternary weight is that of its latent weight.

    Threshold and alpha are computed anew at every call, in all or per index of `axis`.
    """

    stands = ("weight",)
    settings = ("axis", "exact")

    def __init__(self, axis: int | None = 0, *, exact: bool = True) -> None:
        super().__init__()
        self.axis, self.exact = axis, exact

    def unsound(self) -> str:
        axis = self.axis is None or (isinstance(self.axis, int) and 0 <= self.axis < 32)
        bare = not self._buffers and not self._parameters
        return "" if axis and bare and isinstance(self.exact, bool) else "whose axis or rule is impossible"

    def symbols(self, weight: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The symbols, still as floats, and alpha, one in all or of shape (channels,)."""
        size = weight.abs() if keep is None else torch.where(keep, weight.abs(), torch.zeros_like(weight))
        held = rows(size, self.axis)
        counted = torch.full_like(held[:, 0], held.shape[1]) if keep is None else rows(keep, self.axis).sum(1).clamp(1)
        above = best_ternary(held) if self.exact else held > RULE * (held.sum(1) / counted).unsqueeze(1)
        alpha = (held * above).sum(1) / above.sum(1).clamp(1)
        alpha = torch.where(alpha > 0, alpha, torch.ones_like(alpha))
        chosen = from_rows(above, weight.shape, self.axis)
        return torch.where(chosen, weight.sign(), torch.zeros_like(weight)), alpha[0] if self.axis is None else alpha

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        symbols, alpha = self.symbols(weight.detach(), keep)
        snapped = symbols * along(alpha, self.axis, weight.dim())
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return snapped
        return snapped + (weight - weight.detach())  # adds exactly zero, and the gradient

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (weight,) = free
        symbols, alpha = self.symbols(weight.detach(), keep)
        rule = Affine(alpha.cpu(), torch.zeros((), dtype=torch.int32), self.axis)
        return Codes(symbols.to(torch.int8).cpu(), rule, tuple(weight.shape))


def best_ternary(size: Tensor) -> Tensor:
    """Which of each row of sizes `|w|`, shape (rows, n), the ternary weights of least squared error do not set to zero.

    They are the k largest, of which alpha is the mean; the k with the largest `(their sum)^2 / k`, the smaller of two.

    >>> best_ternary(torch.tensor([[1.0, 0.1, 0.9]])).tolist()
    [[True, False, True]]
    """
    ordered, order = size.sort(dim=1, descending=True, stable=True)
    count = torch.arange(1, size.shape[1] + 1, dtype=torch.float64, device=size.device)
    k = (ordered.double().cumsum(1).square() / count).argmax(1, keepdim=True)
    among = (count - 1 <= k) & (ordered > 0)
    return torch.zeros_like(among).scatter(1, order, among)


@ingredient("grid")
def ternary(site: Site, bits: int) -> Form:
    """The ternary weights of least squared error, one alpha per output channel.

    >>> site = Site.of(torch.tensor([[1.0, -0.1, -0.8], [0.0, 0.2, 0.2]]))
    >>> [[round(v, 3) for v in row] for row in ternary(site, bits=2)(site.weight).tolist()]
    [[0.9, 0.0, -0.9], [0.0, 0.2, 0.2]]
    """
    only_bits(bits, 2, "ternary")
    return TernaryWeights(channel_axis(site))


@ingredient("grid")
def ternary_tensor(site: Site, bits: int) -> Form:
    """The same with one alpha for the whole tensor."""
    only_bits(bits, 2, "ternary")
    return TernaryWeights(None)


@ingredient("grid")
def ternary_rule(site: Site, bits: int) -> Form:
    """The paper's: zero below 0.7 E|w|, one alpha for the whole tensor."""
    only_bits(bits, 2, "ternary")
    return TernaryWeights(None, exact=False)


twn = method(
    "quantize",
    weights=ternary,
    weight_bits=2,
    epochs=10,
    lr=1e-3,
    paper="Li, Zhang and Liu, 2016, arXiv:1605.04711",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
