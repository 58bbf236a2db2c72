"""McClure and Kriegeskorte 2016: rotations and translations do not matter, nor scales of divided matrices."""

import pytest
import torch

from featherweight.ingredients.match.rdl import distance_matrices
from matches import loss, rotation


@pytest.mark.parametrize("normalise", ["mean", "dimension"])
def test_isometric_configurations_have_no_loss(normalise):
    f = torch.randn(6, 5, dtype=torch.float64)
    for same in (f @ rotation(5), f + torch.randn(5).double()):
        assert float(loss(distance_matrices, same, f, normalise=normalise)) < 1e-20
    assert float(loss(distance_matrices, torch.randn_like(f), f, normalise=normalise)) > 1e-3


def test_scale_matters_unless_matrices_are_divided_by_their_mean():
    f = torch.randn(6, 5, dtype=torch.float64)
    assert float(loss(distance_matrices, 3 * f, f)) < 1e-20
    assert float(loss(distance_matrices, 3 * f, f, normalise="dimension")) > 0.1
    wider = f @ rotation(12)[:5]
    assert float(loss(distance_matrices, wider, f)) < 1e-20
    scaled = wider * (12 / 5) ** 0.5
    assert float(loss(distance_matrices, scaled, f, normalise="dimension")) < 1e-20
    assert float(loss(distance_matrices, wider, f, normalise="dimension")) > 1e-3


def test_value_by_hand():
    ours, theirs = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [2.0], [2.0]])
    wanted = ((1 - 4) ** 2 + (9 - 4) ** 2 + (4 - 0) ** 2) / 3
    assert float(loss(distance_matrices, ours, theirs, normalise="dimension")) == pytest.approx(wanted)


def test_layers_add_up():
    a, b = torch.randn(4, 3), torch.randn(4, 6)
    both = loss(distance_matrices, [a, a], [b, b])
    torch.testing.assert_close(both, 2 * loss(distance_matrices, a, b))
