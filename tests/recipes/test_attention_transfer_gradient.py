"""Zagoruyko and Komodakis 2017, sec. 3.2: gradients of each sample's own loss by its input."""

import copy

import pytest
import torch
import torch.nn.functional as F

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.distill import tapped, unchanged
from featherweight.errors import BadOption
from featherweight.ingredients.match.attention_transfer_gradient import input_gradients


def value(student, teacher, task, batch):
    ours = tapped(student, student, task, batch, [], inputs=True)[0]
    with unchanged(teacher):
        theirs = tapped(teacher, teacher, task, batch, [], inputs=True)[0]
    return input_gradients(ours, theirs, batch, 0.0)


def test_half_the_mean_norm_of_the_difference_sample_by_sample():
    task, student, teacher = small_task(), small_mlp(), small_mlp()
    x, y = (t[:5] for t in next(iter(task.train)))
    each = []
    for i in range(5):
        leaf = x[i : i + 1].clone().requires_grad_(True)
        grads = [torch.autograd.grad(F.cross_entropy(m(leaf), y[i : i + 1]), leaf)[0] for m in (student, teacher)]
        each.append((grads[0] - grads[1]).norm())
    torch.testing.assert_close(value(student, teacher, task, (x, y)), 0.5 * torch.stack(each).mean())


def test_zero_for_the_teacher_itself_and_a_gradient_for_the_student_alone():
    task, teacher = small_task(), small_mlp()
    batch = next(iter(task.train))
    assert float(value(copy.deepcopy(teacher), teacher, task, batch).detach()) < 1e-6
    student = small_mlp()
    value(student, teacher, task, batch).backward()
    assert student[1].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_gradients_come_nearer():
    task = small_task(teacher=small_mlp().eval())
    student, batch = small_mlp(), next(iter(small_task().train))
    before = float(value(student, task.teacher, task, batch).detach())
    entry("attention_transfer_gradient")(student, task, epochs=8, lr=0.02, labels=0, weight=1.0)
    assert float(value(student, task.teacher, task, batch).detach()) < 0.5 * before
    assert entry("attention_transfer_gradient")(small_cnn(), task, epochs=1)


def test_targets_that_are_no_classes():
    task = small_task()
    x, _ = next(iter(task.train))
    with pytest.raises(BadOption, match="choose sobolev"):
        value(small_mlp(), small_mlp(), task, (x, torch.randn(len(x))))
