"""Park et al. 2019: distances and angles survive rotation, translation, scaling and an embedding in more dimensions."""

import pytest
import torch
import torch.nn.functional as F

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import evaluate
from featherweight.ingredients.match.rkd import angles, distances, relations
from matches import loss, rotation


@pytest.mark.parametrize("weights", [{"angle": 0.0}, {"distance": 0.0}])
def test_similar_configurations_have_no_loss(weights):
    f = torch.randn(6, 5, dtype=torch.float64)
    wider = f @ rotation(12)[:5]
    for same in (f @ rotation(5), f + torch.randn(5).double(), 7 * f, wider):
        assert float(loss(relations, same, f, **weights)) < 1e-13
    assert float(loss(relations, torch.randn_like(f), f, **weights)) > 0.01


def test_potentials_by_hand():
    f = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    torch.testing.assert_close(distances(f), torch.tensor([[0.0, 3, 4], [3, 0, 5], [4, 5, 0]]) / 4)
    assert angles(f)[0, 1, 2] == pytest.approx(0, abs=1e-6)
    assert angles(f)[1, 0, 2] == pytest.approx(0.6)
    assert angles(f)[2, 0, 1] == pytest.approx(0.8)


def test_huber_means_over_all_pairs_and_triplets_with_the_weights():
    ours, theirs = torch.randn(5, 3), torch.randn(5, 4)
    wanted = 25 * F.smooth_l1_loss(distances(ours), distances(theirs))
    wanted = wanted + 50 * F.smooth_l1_loss(angles(ours), angles(theirs))
    torch.testing.assert_close(loss(relations, ours, theirs), wanted)


def test_equal_samples_have_finite_gradients():
    ours = torch.ones(4, 3, requires_grad=True)
    loss(relations, ours, torch.randn(4, 3)).backward()
    assert torch.isfinite(ours.grad).all()


def test_a_network_of_another_kind_learns_the_relations():
    task = small_task()
    teacher = fit(small_cnn(), task, epochs=6, lr=0.01)
    student = entry("rkd")(small_mlp(), small_task(teacher=teacher), epochs=10, lr=0.01)
    assert evaluate(student, task).value >= 0.9
