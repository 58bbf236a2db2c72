"""Chen et al. 2021, the eight equations, the gradient and the update; what it costs, and that it collapses alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import Batches, blobs, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.features import squared_distances
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption
from featherweight.ingredients.match.hint import Hint
from featherweight.ingredients.match.locality_preserving import affinities, chosen, locality
from matches import loss, rotation, watched


def sides(m=12, ours=5, theirs=7):
    return torch.randn(m, ours, dtype=torch.float64), torch.randn(m, theirs, dtype=torch.float64)


def affinity(f_t, k, sigma2=None):
    return affinities(squared_distances(f_t), chosen(f_t, None, k, "teacher"), sigma2)


def test_eq_5_affinities_of_the_k_nearest_but_itself():
    _, t = sides()
    alpha = affinity(t, 3, 2.0)
    for i in range(12):
        distance = (t - t[i]).square().sum(1)
        nearest = sorted((j for j in range(12) if j != i), key=lambda j: float(distance[j]))[:3]
        for j in range(12):
            wanted = float(torch.exp(-distance[j] / 2)) if j in nearest else 0.0
            assert float(alpha[i, j]) == pytest.approx(wanted, abs=1e-12)
    assert not torch.equal(alpha > 0, (alpha > 0).T), "neighbourhoods are not symmetric"


def test_eq_4_and_6_the_weighted_sum_and_its_matrix_form():
    s, t = sides()
    alpha = affinity(t, 3)
    by_hand = sum(alpha[i, j] * (s[i] - s[j]).square().sum() for i in range(12) for j in range(12)) / 24
    torch.testing.assert_close(loss(locality, s, t, neighbours=3), by_hand)
    w = alpha + alpha.T
    trace = torch.trace(s.T @ (torch.diag(w.sum(1)) - w) @ s) / 24
    torch.testing.assert_close(loss(locality, s, t, neighbours=3), trace)


def test_eq_9_the_gradient_needs_both_alphas():
    s, t = sides()
    alpha = affinity(t, 3)
    grad = torch.func.grad(lambda f: loss(locality, f, t, neighbours=3))(s)
    differences = s[:, None] - s[None]
    both = ((alpha + alpha.T)[:, :, None] * differences).sum(1) / 12
    torch.testing.assert_close(grad, both, rtol=1e-12, atol=1e-15)
    for factor in (1, 2, 4):
        one_sided = factor * (alpha[:, :, None] * differences).sum(1) / 12
        assert float((grad - one_sided).abs().max()) > 1e-2 * float(grad.abs().max())


def test_eq_1_2_7_8_the_total_is_labels_plus_softened_plus_gamma_times_locality():
    steps = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(steps))
    student = small_mlp().eval()
    entry("locality_preserving")(student, task, weight=0.7)
    entry("locality_preserving")(student, task, weight=0.7, soft=2.0, temperature=3.0)
    x, y = next(iter(task.train))
    a_s, a_t, f_s, f_t = student(x), task.teacher(x), student[:3](x), task.teacher[:8](x)
    eq_7 = F.cross_entropy(a_s, y) + 0.7 * loss(locality, f_s, f_t)
    p_t, p_s = (a_t / 3).softmax(1), (a_s / 3).softmax(1)  # eq. 1
    eq_2 = F.cross_entropy(a_s, y) - (2 * 3**2) * (p_t * p_s.log()).sum(1).mean()
    entropy = -(2 * 3**2) * (p_t * p_t.log()).sum(1).mean()  # has no gradient, and is left out
    eq_8 = eq_2 - entropy + 0.7 * loss(locality, f_s, f_t)
    for (step, _), wanted in zip(steps, (eq_7, eq_8), strict=True):
        torch.testing.assert_close(sum(step(student, (x, y), 0.0).values()), wanted, rtol=1e-4, atol=1e-5)


def test_eq_3_the_hint_that_it_does_without_has_a_parameter_for_every_pair_of_features():
    hint = Hint("a", "b", torch.zeros(2, 20), torch.zeros(2, 30))
    assert sum(p.numel() for p in hint.parameters()) == 20 * 30 + 30
    bridge = 7 * 7 * 2048 * 7 * 7 * 1024
    assert bridge * 4 / 2**30 == pytest.approx(18.8, abs=0.1)
    with recording() as ledger:
        entry("locality_preserving")(small_mlp(), small_task(teacher=small_cnn()), epochs=1)
    assert ledger.tables["distill"]["locality"]["training_only_parameters"] == 0


def test_eq_10_the_update_reaches_the_layers_up_to_the_features_and_no_further():
    steps = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(steps))
    student = small_mlp()
    entry("locality_preserving")(student, task, labels=0)
    step, params = steps[0]
    grads = torch.autograd.grad(step(student, next(iter(task.train)), 0.0)["locality"], params, allow_unused=True)
    assert [g is not None for g in grads] == [True, True, False, False]


def test_zero_iff_neighbours_coincide_and_constant_features_do():
    s, t = sides()
    assert float(loss(locality, torch.ones_like(s), t)) == 0
    pairs = torch.randn(4, 5, dtype=torch.float64)
    together, groups = pairs.repeat_interleave(3, 0), 9 * torch.eye(4).repeat_interleave(3, 0).double()
    near = groups + 0.01 * torch.randn_like(groups)
    assert float(loss(locality, together, near, neighbours=2)) < 1e-15
    assert float(loss(locality, s, near, neighbours=2)) > 0.1


def test_moves_do_not_matter_and_scale_counts_squared():
    s, t = sides()
    plain = float(loss(locality, s, t))
    assert float(loss(locality, s @ rotation(5) + 3, t)) == pytest.approx(plain)
    assert float(loss(locality, 3 * s, t)) == pytest.approx(9 * plain)
    spread = float(loss(locality, s, t, normalise="batch_std"))
    assert float(loss(locality, 3 * s, t, normalise="batch_std")) == pytest.approx(spread)


def test_controls_have_other_neighbours_and_as_many():
    t = sides()[1]
    teacher, symmetric, random = (chosen(t, None, 3, g) for g in ("teacher", "symmetric", "random"))
    assert (teacher.sum(1) == 3).all()
    assert (random.sum(1) == 3).all()
    assert not random.diagonal().any()
    assert not torch.equal(random, teacher)
    assert torch.equal(symmetric, symmetric.T)
    assert (symmetric | ~teacher).all()
    labels = torch.arange(12) % 3
    by_label = chosen(t, (t, labels), 3, "labels")
    assert torch.equal(by_label, (labels[:, None] == labels) & ~torch.eye(12, dtype=torch.bool))
    with pytest.raises(BadOption, match="choose another graph"):
        chosen(t, (t,), 3, "labels")


def test_alone_it_collapses_and_labels_keep_it_from_that():
    task = small_task(teacher=small_cnn().eval())
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 4))

    def spread(model):
        with torch.no_grad():
            f = model[:2](task.valid.x)
            return float((f - f.mean(0)).square().sum(1).mean())

    before = spread(student)
    alone = entry("locality_preserving")(copy.deepcopy(student), task, labels=0, epochs=30, lr=0.01)
    beside = entry("locality_preserving")(copy.deepcopy(student), task, epochs=30, lr=0.01, weight=0.1)
    assert spread(alone) < 0.05 * before
    assert spread(beside) > 10 * spread(alone)
    assert evaluate(beside, task).value >= 0.9


def test_small_batches_are_said():
    x, y = blobs((1, 8, 8))
    task = Task(train=Batches(x, y, 16), valid=Batches(x, y), teacher=fit(small_cnn(), small_task(), epochs=1))
    with recording() as ledger:
        entry("locality_preserving")(small_mlp(), task, epochs=1)
    assert any("batches of 16 samples" in text for text in ledger.notes)
