"""You et al. 2017: votes on triplets by order alone, and a hinge that is zero where the student agrees."""

import pytest
import torch
import torch.nn.functional as F

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.ensemble import Ensemble
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.recipes.multi_teacher_triplet import Triplets, distances
from matches import watched


def value(ours, *theirs, **options):
    torch.manual_seed(4)
    hints = [str(i) for i in range(len(theirs))]
    match = Triplets("s", hints, **options)
    return match({"s": ours}, dict(zip(hints, theirs, strict=True)), None, 0.0)


def circle(*degrees):
    angles = torch.tensor(degrees) * torch.pi / 180
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_one_teacher_is_a_triplet_loss_in_its_order():
    ours, theirs = torch.randn(6, 4), torch.randn(6, 3)
    d, t = distances(ours), distances(theirs)
    terms = [
        F.relu(0.2 + (1 if t[i, j] < t[i, k] else -1) * (d[i, j] - d[i, k]))
        for i in range(6)
        for j in range(6)
        for k in range(6)
        if len({i, j, k}) == 3
    ]
    assert float(value(ours, theirs, count=60000)) == pytest.approx(float(torch.stack(terms).mean()), rel=0.01)


def test_only_the_order_of_a_teachers_distances_counts():
    ours = torch.randn(4, 5)
    near, far = circle(0.0, 10.0, 30.0, 90.0), circle(0.0, 20.0, 61.0, 170.0)  # the same order of all distances
    assert float(value(ours, near)) == float(value(ours, far))
    assert float(value(ours, near)) != float(value(ours, circle(0.0, 90.0, 30.0, 10.0)))


def test_majority_decides_and_ties_are_left_out():
    ours, a, b = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4)
    assert float(value(ours, a, a, b)) == float(value(ours, a))
    tied = value(ours, a, b)
    d, da, db = distances(ours), distances(a), distances(b)
    agreed = [
        F.relu(0.2 + (1 if da[i, j] < da[i, k] else -1) * (d[i, j] - d[i, k]))
        for i, j, k in torch.cartesian_prod(*[torch.arange(5)] * 3).tolist()
        if len({i, j, k}) == 3 and (da[i, j] < da[i, k]) == (db[i, j] < db[i, k])
    ]
    assert float(value(ours, a, b, count=60000)) == pytest.approx(float(torch.stack(agreed).mean()), rel=0.02)
    assert torch.isfinite(tied)


def test_zero_where_the_student_agrees_with_the_margin():
    f = circle(0.0, 10.0, 30.0, 90.0)
    assert float(value(f, f, margin=1e-4)) == 0
    assert float(value(f, f, margin=3.0)) > 0


def test_terms_with_one_and_with_three_teachers():
    for teacher, count in ((small_cnn().eval(), 1), (Ensemble([small_cnn().eval() for _ in range(3)]), 3)):
        steps = []
        task = small_task(teacher=teacher, fit=watched(steps))
        with recording() as ledger:
            student = entry("multi_teacher_triplet")(small_mlp(), task)
        assert any(text.startswith(f"{count} teacher(s) vote") for text in ledger.notes)
        terms = steps[0][0](student, next(iter(task.train)), 0.0)
        assert terms.keys() == {"labels", "softened", "triplets"}
        assert all(torch.isfinite(t) for t in terms.values())


def test_learns():
    task = small_task()
    teachers = Ensemble([fit(small_cnn(), task, epochs=6, lr=0.01) for _ in range(2)])
    student = entry("multi_teacher_triplet")(small_mlp(), small_task(teacher=teachers), epochs=8, lr=0.01)
    assert evaluate(student, task).value >= 0.9
