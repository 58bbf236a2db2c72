"""Which share of the gradient each term of a loss has while a network trains, where all terms meet.

What the terms share ends at one layer: the last weight that every term reaches. The norms of their gradients by this
weight tell who leads, and cost little, as the way back to it is short.
Source: Chen, Badrinarayanan, Lee and Rabinovich, ICML 2018, arXiv:1711.02257 (GradNorm), sec. 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from featherweight.core import ledger, tracking
from featherweight.core.draws import undrawn

POINTS = 32  # about so many measurements of one training, however long it is


@final
@dataclass
class Shares:
    """The shares during one training of `total` steps, measured every so many of them.

    Args:
        label: what the training is called.
        names: the parameters that may be the shared ones, by name, in the order of the network.
    """

    label: str
    total: int
    names: Mapping[str, nn.Parameter]
    points: list[dict[str, float]] = field(default_factory=list)
    place: str | None = None

    def look(self, terms: Mapping[str, Tensor], index: int, progress: float) -> None:
        """Measures, if it is time to and there are terms to compare."""
        if not (ledger.is_open() or tracking.is_open()) or len(terms) < 2:
            return
        if index < len(self.points) * self.total / POINTS:
            return
        terms = {name: term for name, term in terms.items() if term.requires_grad}
        with undrawn():  # gradients on grids are rounded at random
            if self.place is None:
                self.place = _shared(terms, self.names)
            params = [self.names[self.place]] if self.place else [*self.names.values()]
            norms = {name: _norm(term, params) for name, term in terms.items()}
        whole = sum(norms.values())
        if not 0 < whole < math.inf:
            return
        shares = {name: norm / whole for name, norm in norms.items()}
        self.points.append({"progress": progress, **{f"share/{name}": share for name, share in shares.items()}})
        tracking.record({f"gradient/{name}": share for name, share in shares.items()})

    def close(self) -> None:
        """Hands what was measured to the report."""
        if not self.points:
            return
        names = list(dict.fromkeys(key[6:] for point in self.points for key in point if key != "progress"))
        rows = [{"progress": p["progress"], "shares": [p.get(f"share/{n}") for n in names]} for p in self.points]
        place = (self.place or "all parameters").replace("parametrizations.", "")
        ledger.add("gradient_shares", {"training": self.label, "at": place, "terms": names, "points": rows})


def _shared(terms: Mapping[str, Tensor], names: Mapping[str, nn.Parameter]) -> str:
    """The last parameter that all terms reach; nothing where there is none."""
    params = list(names.values())
    reached = [torch.autograd.grad(t, params, retain_graph=True, allow_unused=True) for t in terms.values()]
    common = [name for name, *grads in zip(names, *reached, strict=True) if all(g is not None for g in grads)]
    weights = [name for name in common if names[name].dim() > 1]
    return (weights or common or [""])[-1]


def _norm(term: Tensor, params: Sequence[nn.Parameter]) -> float:
    grads = torch.autograd.grad(term, list(params), retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(g.detach().double().square().sum()) for g in grads if g is not None))
