"""The smallest file under a budget: what was measured to work best, in one method.

Without training, hidden units that are alike are put beside each other (`canonical_order`), and weights on the best
paths of a trellis with errors fed back (`trellis`). With training, integers are trained with the bits of their code in
the loss, down to the size asked for (`entropy_penalized`), and ordered afterwards where that saves bytes. Either way
`context_mixing` writes the file. Sources are those of the three methods.

Departs from the paper: as the three methods do; the order of the steps is ours.
"""

from __future__ import annotations

import copy

from torch import nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.forms import bake
from featherweight.core.ledger import note
from featherweight.core.task import Task
from featherweight.errors import FeatherweightError
from featherweight.recipes.canonical_order import canonical_order
from featherweight.recipes.entropy_penalized import entropy_penalized, file_size
from featherweight.recipes.trellis import trellis


@recipe(
    paper="Haase et al., ICIP 2020; Oktay et al., ICLR 2020, arXiv:1906.06624",
    family="quantize",
    coder="context_mixing",
    needs={"labels", "calibration"},
    shrinks={"bits"},
    small={"loss": 0.01},
)
def smallest(
    model: nn.Module,
    task: Task,
    *,
    within: str | None = None,
    loss: Positive = 0.003,
    epochs: Amount = 0,
    lr: Positive = 0.05,
) -> nn.Module:
    """Orders units and rounds along a trellis, or trains integers for the coder; give it a budget, "size<=40kB".

    Args:
        within: "size<=40kB" or, without training, "drop<=0.5pt"; `compress` hands on its own budget.
        loss: without a budget and training, by how much the mean loss may grow, foretold from its curvature.
        epochs: passes over the training data; with none nothing is trained, which calibration data are enough for.
        lr: of the training, in steps of the grid.

    Raises:
        BadOption: the budget is of something else, or of a drop where the network is trained.
        MissingNeed: the network is to be trained, without training data.
        CompressionError: every layer is zero, or training cannot make the file so small.
    """
    if epochs:
        entropy_penalized(model, task, within=within, epochs=epochs, lr=lr)
        trained = bake(model)
        again = ordered(trained, task)
        return again if file_size(again) < file_size(trained) else trained
    return trellis(ordered(model, task), task, within=within, loss=loss)


def ordered(model: nn.Module, task: Task) -> nn.Module:
    """The network with its hidden units in the canonical order, where they may trade places and that saves bytes."""
    try:
        return canonical_order(copy.deepcopy(model), task)  # which has moved units by the time that it refuses
    except FeatherweightError as error:
        note(f"hidden units stay in their order: {error}")
        return model
