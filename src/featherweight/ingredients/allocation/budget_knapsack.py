"""Allocation as an integer program: one ratio a layer, the least sum of drops that saves what is asked for.

A representative of pruning by mathematical programming, with the relaxed program of R. Yu et al., "NISP: pruning
networks using neuron importance score propagation", CVPR 2018, arXiv:1711.05908, as its published instance.
With `d_lj` what ratio `j` costs layer `l` alone, `c_lj` what it saves of the whole, and `B` what is to be saved:

    min sum_lj d_lj m_lj   subject to   sum_j m_lj = 1 for every l,   sum_lj c_lj m_lj >= B,   m_lj in {0, 1}

a multiple-choice knapsack (two choices a unit, nothing and all of it, are the plain one), solved exactly by branch and
bound (HiGHS).

Departs from the paper: NISP maximises importance scores that it propagates, relaxes the program and rounds; here drops
are measured and the program is solved as it stands. Drops and savings of layers are taken to add up. Channels' MACs do
not quite, being products of neighbouring layers' widths: `prune` asks for more until its budget really holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from featherweight.catalogue import ingredient
from featherweight.core.sensitivity import Curve
from featherweight.errors import CompressionError

LESS = 1e-6  # what the whole network is worth beside the largest drop: of equal drops, the one that removes less
UNITS = 1e4  # of the objective: the solver's tolerances are absolute


@ingredient("allocation", family="prune", paper="class: programming; Yu et al., CVPR 2018, arXiv:1711.05908")
def budget_knapsack(curves: Mapping[str, Curve], share: float) -> dict[str, float]:
    """The ratios with the least sum of drops that together save a share of the whole, by integer programming.

    Where not even all of it saves the share, every layer gets its largest ratio.

    Raises:
        CompressionError: the solver gave up.

    >>> curve = Curve((0.0, 0.5, 0.9), (0.0, 0.01, 0.2), (0.0, 0.25, 0.45))
    >>> budget_knapsack({"a": curve, "b": curve}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag

    if sum(curve.saved[-1] for curve in curves.values()) <= share:
        return {layer: curve.ratios[-1] for layer, curve in curves.items()}
    drops, saved = (np.concatenate([getattr(curve, key) for curve in curves.values()]) for key in ("drops", "saved"))
    one_each = block_diag([np.ones((1, len(curve.ratios))) for curve in curves.values()], format="csr")
    solved = milp(
        UNITS * (drops / (float(drops.max()) or 1.0) + LESS * saved),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(saved[None], lb=share)],
        integrality=np.ones(len(drops)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise CompressionError(f"no allocation saves {share:.4g} of the whole: {solved.message}; ask for less")
    ratios = np.concatenate([curve.ratios for curve in curves.values()])
    return dict(zip(curves, (one_each @ (ratios * solved.x.round())).tolist(), strict=True))
