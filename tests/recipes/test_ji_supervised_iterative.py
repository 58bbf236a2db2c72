"""Quantize and retrain in turns: better than once; weights change their cluster, activations lie on grids."""

import copy
import re

import pytest
import torch
from torch import nn

from featherweight.catalogue import entry
from featherweight.core.forms import Mask, activation_form, attach, bake
from featherweight.core.grids import ActivationGrid
from featherweight.core.ledger import recording
from featherweight.errors import BadOption, CompressionError

ji = entry("ji_supervised_iterative")
LAYERS = (0, 3, 8)


def losses(notes: list[str]) -> list[tuple[float, float]]:
    found = [re.search(r"from (\S+) to (\S+)", one) for one in notes if one.startswith("round")]
    return [(float(m[1]), float(m[2])) for m in found]


def test_rounds_close_the_gap_that_one_quantization_leaves(trained):
    model, task = copy.deepcopy(trained[0]), trained[1]
    with recording() as ledger:
        ji(model, task, weight_bits=1, act_bits=None, rounds=5, epochs=16, lr=5e-3, tolerance=0.0)
    found = losses(ledger.notes)
    gaps = [bound - free for free, bound in found]
    assert len(found) > 2
    assert gaps[-1] <= gaps[0]
    assert min(bound for _, bound in found) < 0.8 * found[0][1]
    with torch.no_grad():
        reached = float(torch.stack([task.loss(model.eval()(x), y) for x, y in task.train]).mean())
    assert reached == pytest.approx(min(bound for _, bound in found), rel=0.02)  # the best round is the result


def test_final_weights_are_in_the_codebook_and_activations_on_their_grid(trained):
    model = copy.deepcopy(trained[0])
    ji(model, trained[1], weight_bits=2, act_bits=5, rounds=2, epochs=2)
    bake(model)
    for at in LAYERS:
        assert model[at].weight.unique().numel() <= 4
        grid = activation_form(model[at], "input")
        assert isinstance(grid, ActivationGrid)
        assert grid.steps().high == 31


def test_weights_change_their_cluster_unlike_in_trained_sharing(trained):
    def clusters(model: nn.Module) -> torch.Tensor:
        return bake(model)[3].weight.unique(return_inverse=True)[1]

    once, more, tied = (copy.deepcopy(trained[0]) for _ in range(3))
    ji(once, trained[1], weight_bits=2, act_bits=None, rounds=1)
    ji(more, trained[1], weight_bits=2, act_bits=None, rounds=4, epochs=16, lr=5e-3, tolerance=0.0)
    entry("kmeans_share")(tied, trained[1], cluster="exact", weight_bits=2, epochs=4, lr=5e-3)
    assert torch.equal(clusters(once), clusters(tied))
    assert not torch.equal(clusters(once), clusters(more))


def test_it_stops_when_quantization_costs_nothing(trained):
    model = copy.deepcopy(trained[0])
    with recording() as ledger:
        ji(model, trained[1], weight_bits=8, rounds=4, epochs=4, tolerance=0.5)
    assert len(losses(ledger.notes)) == 1


def test_earlier_masks_are_kept(trained):
    model, keep = copy.deepcopy(trained[0]), torch.rand(16, 8, 3, 3) > 0.6
    attach(model[3], Mask(keep))
    ji(model, trained[1], weight_bits=3, rounds=3, epochs=3, lr=5e-3, tolerance=0.0)
    weight = bake(model)[3].weight
    assert bool((weight[~keep] == 0).all())
    assert 1 < weight.unique().numel() <= 9


def test_bad_input(trained):
    with pytest.raises(BadOption, match="weight_bits=17"):
        ji(copy.deepcopy(trained[0]), trained[1], weight_bits=17)
    model = copy.deepcopy(trained[0])
    with torch.no_grad():
        for at in LAYERS:
            model[at].weight.zero_()
    with pytest.raises(CompressionError, match="nothing to share"):
        ji(model, trained[1], rounds=1)
