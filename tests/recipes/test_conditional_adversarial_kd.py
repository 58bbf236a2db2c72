"""Xu et al. 2018: what each term sees when logits change places, and a discriminator that cannot tell equals apart."""

import pytest
import torch

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.adversary import Discriminator
from featherweight.core.fit import fit
from featherweight.core.task import evaluate
from featherweight.recipes.conditional_adversarial_kd import misleading, telling
from matches import watched


def terms(judge, ours, theirs, y):
    return {name: float(term.detach()) for name, term in misleading(judge, ours, theirs, y, 1.0, 1.0).items()}


def test_what_sees_logits_that_change_places():
    y = torch.tensor([0, 0, 1, 1])
    theirs = 4 * torch.eye(2)[y] + 0.5 * torch.randn(4, 2)
    judge = Discriminator(2, 2)
    for _ in range(200):  # a discriminator that knows the classes
        loss = telling(judge, theirs + 0.1 * torch.randn(4, 2), theirs, y)
        grads = torch.autograd.grad(loss, list(judge.parameters()))
        with torch.no_grad():
            for p, g in zip(judge.parameters(), grads, strict=True):
                p.sub_(0.05 * g)
    placed = terms(judge, theirs, theirs, y)
    within, across = (terms(judge, theirs[order], theirs, y) for order in ([1, 0, 3, 2], [2, 3, 0, 1]))
    for name in ("origin", "category"):
        assert within[name] == pytest.approx(placed[name], rel=1e-4)
    assert within["absolute"] > placed["absolute"] == 0
    assert across["origin"] == pytest.approx(placed["origin"], rel=1e-4)
    assert across["category"] > placed["category"] + 1
    assert across["absolute"] > within["absolute"]


def test_equal_logits_cannot_be_told_apart():
    judge, z, y = Discriminator(3, 3), torch.randn(64, 3), torch.randint(0, 3, (64,))
    optimizer = torch.optim.Adam(judge.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        telling(judge, z, z, y).backward()
        optimizer.step()
    assert torch.allclose(judge(z)[0].sigmoid(), torch.full((64,), 0.5), atol=0.1)


def test_a_discriminator_that_stands_still_teaches_all_the_same():
    steps = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(steps))
    student = entry("conditional_adversarial_kd")(small_mlp(), task)
    step, params = steps[0]
    found = step(student, next(iter(task.train)), 0.0)
    assert found.keys() == {"labels", "absolute", "origin", "category"}
    for name in ("origin", "category"):
        grads = torch.autograd.grad(found[name], params, retain_graph=True)
        assert all(torch.isfinite(g).all() for g in grads)
        assert any((g != 0).any() for g in grads)
    assert {id(p) for p in params} == {id(p) for p in student.parameters()}


def test_learns():
    task = small_task()
    teacher = fit(small_cnn(), task, epochs=6, lr=0.01)
    student = entry("conditional_adversarial_kd")(small_mlp(), small_task(teacher=teacher), epochs=6, lr=0.01)
    assert evaluate(student, task).value >= 0.9
