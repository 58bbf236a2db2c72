"""Ratios from a sensitivity analysis: every layer loses as much as it can for one drop of the metric, the same for all.

Song Han, Jeff Pool, John Tran, William Dally, "Learning both weights and connections for efficient neural networks",
NeurIPS 2015, arXiv:1506.02626, sec. 4 and fig. 6, and Hao Li et al., "Pruning filters for efficient ConvNets", ICLR
2017, arXiv:1608.08710, sec. 3.2: prune each layer alone at growing ratios, without retraining, watch the accuracy on
validation data, and prune those layers more that bear more.

Departs from the paper: the papers choose the ratios by eye; here layer `l` gets the largest ratio that was tried with
`A - A_l(r) <= delta`, and `delta` is the smallest with which the whole is saved that was asked for. Layers that bear
more than that need are scaled back together. What layers cost together is taken for what they cost alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping

from featherweight.catalogue import ingredient
from featherweight.core.sensitivity import Curve


@ingredient(
    "allocation",
    family="prune",
    paper="Han et al., NeurIPS 2015, arXiv:1506.02626; Li et al., ICLR 2017, arXiv:1608.08710",
)
def layer_sensitivity(curves: Mapping[str, Curve], share: float) -> dict[str, float]:
    """The largest ratio of every layer whose own drop stays within one tolerance, the least that saves enough.

    Where not even all of it saves the share, every layer gets its largest ratio.

    >>> even = Curve((0.0, 0.5, 0.9), (0.0, 0.01, 0.2), (0.0, 0.25, 0.45))
    >>> deaf = Curve((0.0, 0.5, 0.9), (0.0, 0.0, 0.01), (0.0, 0.25, 0.45))
    >>> layer_sensitivity({"conv": even, "fc": deaf}, 0.6)
    {'conv': 0.5, 'fc': 0.9}
    """
    drops = sorted({drop for curve in curves.values() for drop in curve.drops})
    at = bisect_left(drops, True, key=lambda drop: _saved(curves, _within(curves, drop)) >= share - 1e-12)
    places = _within(curves, drops[min(at, len(drops) - 1)])
    return {layer: curves[layer].ratios[place] for layer, place in _scaled_back(curves, places, share).items()}


def _within(curves: Mapping[str, Curve], drop: float) -> dict[str, int]:
    """The last place of every curve whose drop is no more."""
    return {layer: bisect_right(curve.drops, drop) - 1 for layer, curve in curves.items()}


def _saved(curves: Mapping[str, Curve], places: Mapping[str, int]) -> float:
    return sum(curves[layer].saved[place] for layer, place in places.items())


def _scaled_back(curves: Mapping[str, Curve], places: Mapping[str, int], share: float) -> dict[str, int]:
    """The places at the least common factor of the ratios, rounded up to what was tried, that still save the share."""

    def at(factor: float) -> dict[str, int]:
        return {
            layer: bisect_left(curves[layer].ratios, factor * curves[layer].ratios[place] - 1e-12)
            for layer, place in places.items()
        }

    # the factors at which some layer takes a step
    steps = {r / curves[n].ratios[p] for n, p in places.items() if p for r in curves[n].ratios[: p + 1]} | {1.0}
    factors = sorted(steps)
    enough: Callable[[float], bool] = lambda factor: _saved(curves, at(factor)) >= share - 1e-12  # noqa: E731
    place = bisect_left(factors, True, key=enough)
    return at(factors[min(place, len(factors) - 1)])
