"""Optimal brain damage: remove the weights whose loss of curvature is smallest, retrain, repeat.

Yann LeCun, John S. Denker, Sara A. Solla, "Optimal Brain Damage", NIPS 1989: at a minimum with a diagonal Hessian `h`,
deleting the weight `w_k` costs `s_k = h_kk w_k^2 / 2`; delete the lowest few percent, retrain to a minimum, repeat.

Departs from the paper: `h` is the exact diagonal of the generalised Gauss-Newton matrix over the calibration batches,
sample by sample (of cross-entropy, the Fisher matrix), where the paper propagates an approximation of it from layer to
layer and adds second derivatives of the nonlinearities; it is never negative, so nothing needs clipping. Weights alone
are ranked, not biases. How much goes is given, in equal steps; the paper decides from the saliencies.
"""

from __future__ import annotations

from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.curvature import ggn_diagonal
from featherweight.core.site import Site
from featherweight.core.study import Study


@ingredient("score", grain="weight")
def obd_saliency(site: Site) -> Tensor:
    """The predicted cost of every weight, `h w^2 / 2`, of the weight's shape, float64."""
    return site.data.once(_curvature)[site.path] * site.weight.cpu().double().square() / 2


def _curvature(study: Study) -> dict[str, Tensor]:
    found = {path: Site(path, study.model.get_submodule(path)) for path in study.paths}
    return ggn_diagonal(study.model, study.task, found, study.batches())


obd = method(
    "prune",
    score=obd_saliency,
    paper="LeCun et al., NIPS 1989",
    needs={"labels", "train"},
    shrinks={"weights"},
    sparsity=0.75,
    scope="global",
    schedule="linear",
    rounds=10,
    epochs=10,
    small={"epochs": 1, "finetune": 0, "rounds": 2, "calibration_batches": 2},
)
