"""Czarnecki et al. 2017: values and Jacobians, an unbiased projection, and a fit that is better between the samples."""

import copy

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.task import Metric, Task
from featherweight.distill import tapped, unchanged
from featherweight.errors import BadOption
from featherweight.ingredients.match.sobolev import values_and_derivatives


def taps_of(model, task, batch, hold=False):
    if hold:
        with unchanged(model):
            return tapped(model, model, task, batch, [], inputs=True)[0]
    return tapped(model, model, task, batch, [], inputs=True)[0]


def test_projection_is_unbiased():
    task, student, teacher = small_task(), nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), small_mlp()
    batch = tuple(t[:6] for t in next(iter(task.train)))
    values = []
    for _ in range(400):
        ours, theirs = taps_of(student, task, batch), taps_of(teacher, task, batch, hold=True)
        values.append(float(values_and_derivatives(ours, theirs, batch, 0.0).detach()))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: student(x[None])[0] - teacher(x[None])[0]))(batch[0])
    exact = jacobian.square().flatten(1).sum(1).mean()
    exact = exact + 0.5 * (student(batch[0]) - teacher(batch[0])).square().sum(1).mean()
    assert sum(values) / 400 == pytest.approx(float(exact.detach()), rel=0.03)


def test_zero_iff_values_and_derivatives_agree_and_the_teacher_learns_nothing():
    task, teacher = small_task(), small_mlp()
    batch = next(iter(task.train))
    student = copy.deepcopy(teacher)

    def value():
        ours, theirs = taps_of(student, task, batch), taps_of(teacher, task, batch, hold=True)
        return values_and_derivatives(ours, theirs, batch, 0.0)

    assert float(value().detach()) < 1e-10
    with torch.no_grad():
        student[3].weight += 0.1
    loss = value()
    loss.backward()
    assert float(loss.detach()) > 1e-3
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert student[1].weight.grad.abs().sum() > 0
    with torch.no_grad():
        student[3].weight -= 0.1
        student[3].bias += 1  # other values, the same derivatives
    assert float(value().detach()) == pytest.approx(2.0, rel=1e-4)


class Square(nn.Module):
    def forward(self, x):
        return x.square()


def test_derivatives_of_three_samples_of_a_parabola_help_between_them():
    x = torch.tensor([[-1.0], [0.0], [1.0]])
    score = Metric("error", per_sample=lambda o, t: (o - t).square().flatten(), higher_is_better=False)
    task = Task(train=Batches(x, x), valid=Batches(x, x), metric=score, teacher=Square())
    start = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))
    with torch.no_grad():
        start[0].weight *= 4  # steep units: much can happen between the samples
    grid = torch.linspace(-1, 1, 41)[:, None]
    errors = {}
    for derivative in (0.0, 1.0):
        student = entry("sobolev")(copy.deepcopy(start), task, settings={"derivative": derivative}, epochs=150, lr=0.03)
        errors[derivative] = float((student(grid) - grid.square()).square().mean().detach())
    assert errors[1.0] < 0.5 * errors[0.0]


def test_inputs_without_a_gradient():
    tokens = torch.randint(0, 5, (8, 3))
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 4))
    task = Task(train=Batches(tokens, torch.arange(8) % 4), valid=[], teacher=copy.deepcopy(net))
    with pytest.raises(BadOption, match="inputs of real numbers"):
        entry("sobolev")(net, task, epochs=1)
    assert entry("sobolev")(small_cnn(), small_task(teacher=small_cnn()), epochs=1)
