"""Lopes et al. 2017: made-up inputs are of the class that was asked for, and worth more than noise."""

import copy

import pytest
import torch

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import Task, evaluate
from featherweight.recipes.data_free_kd import factor, made_up, metadata


@pytest.fixture(scope="module")
def taught():
    torch.manual_seed(0)
    task = small_task()
    return Task(valid=task.valid, calibration=task.train, teacher=fit(small_cnn(), task, epochs=8, lr=0.01).eval())


def test_metadata_are_means_and_covariances_of_each_class(taught):
    known = metadata(taught.teacher, taught)
    assert sorted(known.means) == [0, 1, 2, 3]
    with torch.no_grad():
        logits = taught.teacher(taught.calibration.x)
    mine = logits[logits.argmax(1) == 2]
    torch.testing.assert_close(known.means[2], mine.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(known.factors[2] @ known.factors[2].T, mine.T.cov(correction=0), rtol=1e-3, atol=1e-4)
    assert known.shape == (1, 8, 8)
    rank_1 = torch.arange(4.0)[:, None] * torch.ones(4, 3)
    torch.testing.assert_close(factor(rank_1), rank_1.std(0, correction=0).diag())


def test_made_up_inputs_are_of_their_class_and_excite_as_it_did(taught):
    known = metadata(taught.teacher, taught)
    for c in (0, 3):
        (x,) = made_up(taught.teacher, taught, known, c, 48, steps=150, lr=0.05, batch=48)
        with torch.no_grad():
            a = taught.teacher(x)
        assert float((a.argmax(1) == c).float().mean()) > 0.9
        gap = (a.relu().mean(0) - known.means[c].relu()).norm()
        assert float(gap) < 0.2 * float(known.means[c].relu().norm())
    assert all(p.grad is None and p.requires_grad for p in taught.teacher.parameters())


def test_a_student_learns_more_from_them_than_from_noise(taught):
    start = small_mlp()
    options = {"inputs": 32, "batch": 32, "epochs": 15, "lr": 0.01}
    torch.manual_seed(2)
    made = entry("data_free_kd")(copy.deepcopy(start), taught, steps=60, **options)
    torch.manual_seed(2)
    noise = entry("data_free_kd")(copy.deepcopy(start), taught, steps=1, input_lr=1e-9, **options)
    assert evaluate(made, taught).value >= 0.7
    assert evaluate(made, taught).value > evaluate(noise, taught).value


def test_data_serve_for_the_metadata_alone(taught):
    class Counted(Batches):
        passes = 0

        def __iter__(self):
            Counted.passes += 1
            return super().__iter__()

    data = Counted(taught.calibration.x, taught.calibration.y)
    task = Task(valid=taught.valid, calibration=data, teacher=taught.teacher)
    entry("data_free_kd")(small_mlp(), task, inputs=8, steps=2, batch=8, epochs=3)
    assert Counted.passes == 2
