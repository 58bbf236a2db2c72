"""Rate-distortion optimised quantization: weights on an integer grid, rounded for the coder that writes them.

Simon Wiedemann et al., "DeepCABAC: A Universal Compression Algorithm for Deep Neural Networks", IEEE JSTSP 14(4), 2020,
section III-C: of all integers the one with the least `eta (w / d - q)^2 + lambda * bits(q)`. See `trellis`, of which it
is the case of one state.

Departs from the paper: as `trellis`, with feedback of the errors and a fit of each layer to the ones before; in the
place of `eta` stands the curvature of the loss, and steps follow from it.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import nn

from featherweight.allowed import Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.recipes.trellis import aimed, rounded


@recipe(
    paper="Wiedemann et al., IEEE JSTSP 2020, arXiv:1905.08318",
    family="quantize",
    needs={"labels", "calibration"},
    shrinks={"bits"},
    small={"loss": 0.01, "calibration_batches": 2},
)
def rdoq(
    model: nn.Module,
    task: Task,
    *,
    loss: Positive = 0.003,
    within: str | None = None,
    rate: Annotated[float, Ge(0)] = 1.0,
    calibration_batches: Count = 8,
    where: WhereWeighted = None,
) -> nn.Module:
    """Rounds weights to a grid so that error and bits together are least; errors are fed on, as in `trellis`.

    Args:
        loss: by how much the mean loss may grow, foretold from its curvature; a smaller file for a larger one.
        within: in place of a loss, a budget such as "size<=40kB" or "drop<=0.5pt", as in `trellis`.
        rate: how much a bit counts, 1 for the slope of the rate-distortion curve; 0 for the integer nearest to the
            weight and the errors that were fed to it.
        calibration_batches: how many batches of the calibration (or training) data to look at.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: the loss is so small that weights are more than 2^24 steps from zero.
        BadData: weights are not finite.
        CompressionError: every chosen layer is zero.
    """

    def at(one: nn.Module, much: float) -> nn.Module:
        return rounded(one, task, much, states=1, rate=rate, batches=calibration_batches, where=where)

    return at(model, loss) if within is None else aimed(model, task, within, at)
