"""Hinton et al. 2015: the softened loss, its two forms, its limit, and a student that learns from a teacher."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import Batches, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import evaluate
from featherweight.distill import distill
from featherweight.errors import BadOption, MissingNeed
from featherweight.ingredients.match.softened import softened


def loss(student, teacher, temperature=4.0):
    return softened({"": student}, {"": teacher}, None, 0.0, temperature=temperature)


@given(t=st.floats(0.5, 50), shift=st.floats(-5, 5))
def test_zero_iff_logits_differ_by_a_constant_a_row(t, shift):
    z = torch.randn(5, 7, dtype=torch.float64)
    rows = shift * torch.randn(5, 1, dtype=torch.float64)
    assert float(loss(z, z + rows, t)) == pytest.approx(0, abs=1e-5)
    other = z.clone()
    other[0, 0] += 3
    assert float(loss(z, other, t)) > 1e-6
    assert float(loss(z + rows, other, t)) == pytest.approx(float(loss(z, other, t)), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("t", "gap"), [(4, 0.35), (20, 0.07), (100, 0.015)])
def test_gradient_tends_to_matching_centred_logits(t, gap):
    ours, theirs = torch.randn(6, 10), torch.randn(6, 10)
    grad = torch.func.grad(lambda z: loss(z, theirs, t))(ours)
    limit = ((ours - ours.mean(1, keepdim=True)) - (theirs - theirs.mean(1, keepdim=True))) / ours.numel()
    assert float((grad - limit).norm() / limit.norm()) < gap


def test_pixels_count_as_samples():
    ours, theirs = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    flat = [z.permute(0, 2, 3, 1).reshape(-1, 3) for z in (ours, theirs)]
    assert float(loss(ours, theirs)) == pytest.approx(float(loss(*flat)), rel=1e-5)


def test_alpha_0_is_plain_training_bit_for_bit():
    task = small_task(teacher=small_mlp())
    model = small_mlp()
    plain = fit(copy.deepcopy(model), task, epochs=2)
    distilled = entry("kd")(model, task, alpha=0.0, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), distilled.parameters(), strict=True))


def test_both_parameterisations_have_the_same_gradients():
    alpha, t = 0.7, 3.0
    task = small_task(teacher=small_mlp())
    start = small_mlp()

    def learned(scale, **options):
        sgd = partial(torch.optim.SGD, lr=0.1 * scale)
        return entry("kd")(
            copy.deepcopy(start), task, temperature=t, epochs=1, optimizer=lambda p, lr: sgd(p), lr=1.0, **options
        )

    mixed, weighted = learned(1.0, alpha=alpha), learned(1 - alpha, weight=alpha * t**2 / (1 - alpha))
    a, b, c = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (start, mixed, weighted))
    assert float((c - b).abs().max()) < 1e-4 * float((b - a).abs().max())


def test_student_learns_a_class_that_it_is_not_shown():
    task = small_task()
    teacher = fit(small_mlp(), task, epochs=20)
    shown = task.train.y != 3
    partly = type(task)(train=Batches(task.train.x[shown], task.train.y[shown]), valid=task.valid, teacher=teacher)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    alone = fit(copy.deepcopy(student), partly, epochs=60, lr=1e-2)
    taught = entry("kd")(student, partly, alpha=1.0, epochs=60, lr=1e-2)

    def of_class_3(model):
        with torch.no_grad():
            scores = model(task.valid.x[task.valid.y == 3]).log_softmax(1)
        return float(scores[:, 3].mean())

    assert of_class_3(taught) > of_class_3(alone) + 1
    assert evaluate(taught, task).value >= 0.7


def test_teacher_stays_as_it_was():
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 4)).train()
    held = copy.deepcopy(teacher.state_dict())
    entry("kd")(small_mlp(), small_task(teacher=teacher), epochs=1)
    assert all(torch.equal(held[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.training


def test_bad_options():
    model = small_mlp()
    with pytest.raises(MissingNeed, match="teacher"):
        distill(model, small_task())
    with pytest.raises(BadOption, match="very model"):
        distill(model, small_task(teacher=model))
    with pytest.raises(BadOption, match="same classes"):
        distill(model, small_task(teacher=small_mlp(5)), epochs=1)
    with pytest.raises(BadOption, match="two classes"):
        entry("kd")(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), small_task(classes=1, teacher=small_mlp(1)), epochs=1
        )
    with pytest.raises(BadOption, match="alpha"):
        entry("kd")(model, small_task(teacher=small_mlp()), alpha=1.2)
