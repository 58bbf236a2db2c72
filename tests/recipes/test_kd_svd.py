"""Lee et al. 2018: flips, moves and scales do not matter; gradients as of singular vectors, and no larger than CE's."""

import copy

import pytest
import torch

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.ingredients.match.singular_vectors import aligned, leading, singular_vectors
from matches import loss, watched


def maps(c=5, n=12):
    return torch.randn(2, c, n, 1, dtype=torch.float64)


def test_leading_vectors_are_right_singular_vectors():
    f = maps()
    _, s, vh = torch.linalg.svd(f.flatten(2).mT)
    vectors, values = leading(f, 3)
    torch.testing.assert_close(values, s[:, :3])
    torch.testing.assert_close((vectors * vh[:, :3].mT).sum(1).abs(), torch.ones(2, 3, dtype=torch.float64))


def test_gradient_is_that_of_singular_vectors():
    f = maps().requires_grad_(True)
    probe = torch.randn(2, 5, 2, dtype=torch.float64)

    def projections(f):
        return (leading(f, 2)[0] * probe).sum(1).square().sum()

    (grad,) = torch.autograd.grad(projections(f), f)
    direction, step = torch.randn_like(f), 1e-6
    with torch.no_grad():
        numeric = (projections(f + step * direction) - projections(f - step * direction)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-5, atol=1e-8)
    equal = torch.eye(3).view(1, 3, 3, 1).requires_grad_(True)  # all singular values agree
    leading(equal, 2)[0].sum().backward()
    assert torch.isfinite(equal.grad).all()


def test_positions_scales_and_signs_of_the_student_do_not_matter():
    ours, theirs = [maps(), maps()], [maps(), maps()]
    value = float(loss(singular_vectors, ours, theirs))
    order = torch.randperm(12)
    for same in ([f[:, :, order] for f in ours], [3 * ours[0], ours[1] / 5], [-ours[0], ours[1]]):
        assert float(loss(singular_vectors, same, theirs)) == pytest.approx(value)
    flipped = [-t for t in theirs]
    assert float(loss(singular_vectors, ours, flipped)) == pytest.approx(value)
    assert float(loss(singular_vectors, theirs, theirs)) == pytest.approx(0, abs=1e-20)
    assert value > 1e-4


def test_the_students_vectors_are_those_nearest_to_the_teachers():
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    ours = (q * torch.tensor([5.0, 4, 3, 2, 1, 0.5])).T.reshape(1, 6, 6, 1)  # F^T F is diagonal: unit vectors, in order
    theirs = torch.zeros(1, 6, 6, 1, dtype=torch.float64)
    theirs[0, 1, 0], theirs[0, 0, 1] = -9.0, 1.0  # the teacher's first is the student's second
    s, t = aligned(ours, theirs, 1)
    assert t[0, 1, 0] == 1
    torch.testing.assert_close(s, t)


def test_gradient_is_bounded_by_the_labels_and_gated():
    steps = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(steps))
    student = entry("kd_svd")(copy.deepcopy(small_cnn()), task, epochs=4)
    step, params = steps[0]
    for progress, gate in ((0.0, 0.5), (0.6, 1 / (1 + 2.718281828**-2))):
        terms = step(student, next(iter(task.train)), progress)
        by = torch.autograd.grad(terms["labels"], params, retain_graph=True, allow_unused=True)
        ours = torch.autograd.grad(terms["singular vectors"], params, allow_unused=True)
        for grad, bound in zip(ours, by, strict=True):
            if grad is not None:
                assert float(grad.norm()) <= gate * float(bound.norm()) * 1.001 + 1e-9
