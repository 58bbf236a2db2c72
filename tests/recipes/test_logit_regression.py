"""Ba and Caruana 2014: zero iff logits agree, the limit of distillation at high temperatures, no labels needed."""

import pytest
import torch

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import Task, evaluate
from featherweight.ingredients.match.logit_regression import squared_logits
from featherweight.ingredients.match.softened import softened
from matches import on_logits


def test_half_the_squared_distance_and_zero_iff_equal():
    ours, theirs = torch.randn(5, 7), torch.randn(5, 7)
    assert float(on_logits(squared_logits, ours, theirs)) == pytest.approx(float((ours - theirs).square().sum() / 10))
    assert float(on_logits(squared_logits, theirs, theirs)) == 0
    shifted = theirs + torch.randn(5, 1)
    assert float(on_logits(squared_logits, shifted, theirs)) > 1e-3
    assert float(on_logits(squared_logits, shifted, theirs, centred=True)) < 1e-9


def test_gradient_is_the_limit_of_softened_probabilities_but_for_the_number_of_classes():
    ours, theirs = torch.randn(6, 10, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    squares = torch.func.grad(lambda z: on_logits(squared_logits, z, theirs, centred=True))(ours)
    soft = torch.func.grad(lambda z: on_logits(softened, z, theirs, temperature=1000.0))(ours)
    assert float((10 * soft - squares).norm() / squares.norm()) < 0.003


def test_learns_from_unlabelled_data():
    task = small_task()
    teacher = fit(small_cnn(), task, epochs=8, lr=0.01)
    unlabelled = Task(train=Inputs(task.train.x), valid=task.valid, teacher=teacher)
    student = entry("logit_regression")(small_mlp(), unlabelled, epochs=20, lr=0.01)
    assert evaluate(student, task).value >= 0.9


class Inputs(Batches):
    def __init__(self, x):
        super().__init__(x, x)

    def __iter__(self):
        return ((x,) for x in self.x.split(self.size))
