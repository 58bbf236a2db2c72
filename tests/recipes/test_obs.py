"""Hassibi and Stork 1992: exact on quadratics, one by one as all at once, the inverse by recursion over examples."""

import copy

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.reconstruct import Moments
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData, BadOption, MissingNeed, UnknownName
from featherweight.recipes.obs import inverse_hessian, loss_roots, prune_rows, removed, saliency, trace

obs = entry("obs")


def quadratic(n=9):
    x, w = torch.randn(40, n).double(), torch.randn(n).double()
    hessian = x.mT @ x / 40
    return w, hessian, lambda v: float((v - w) @ hessian @ (v - w) / 2)


def test_the_error_rises_by_the_saliency_and_the_weight_is_zero():
    w, hessian, error = quadratic()
    inverse = torch.linalg.inv(hessian)
    scores = saliency(w, inverse)
    for q in range(9):
        moved = w.clone()
        cost = removed(moved, inverse.clone(), torch.tensor([q]))
        assert moved[q] == 0
        assert error(moved) == pytest.approx(float(scores[q]), rel=1e-9)
        assert float(cost) == pytest.approx(float(scores[q]), rel=1e-9)
        torch.testing.assert_close(moved, w - w[q] / inverse[q, q] * inverse[:, q])


def test_no_other_move_is_cheaper():
    w, hessian, error = quadratic()
    moved = w.clone()
    removed(moved, torch.linalg.inv(hessian), torch.tensor([3]))
    for _ in range(20):
        other = moved + 0.1 * torch.randn(9).double()
        other[3] = 0
        assert error(other) > error(moved)


def test_one_by_one_with_down_dating_equals_the_block_formula():
    w, hessian, error = quadratic()
    inverse, one_by_one, total = torch.linalg.inv(hessian), w.clone(), 0.0
    down_dated = inverse.clone()
    for q in (4, 0, 7):
        total += float(removed(one_by_one, down_dated, torch.tensor([q])))
    at_once = w.clone()
    cost = removed(at_once, inverse.clone(), torch.tensor([0, 4, 7]))
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-9, atol=1e-12)
    assert total == pytest.approx(float(cost), rel=1e-9)
    assert error(at_once) == pytest.approx(float(cost), rel=1e-9)
    rest = [1, 2, 3, 5, 6, 8]  # what is left of the inverse is the inverse of what is left
    torch.testing.assert_close(down_dated[rest][:, rest], torch.linalg.inv(hessian[rest][:, rest]))


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_recursion_equals_the_inverse(outputs):
    roots, alpha = torch.randn(30, 12, outputs).double(), 1e-8
    found = inverse_hessian(roots, 12, 30, alpha)
    matrix = alpha * torch.eye(12, dtype=torch.float64) + (roots @ roots.mT).sum(0) / 30
    torch.testing.assert_close(found, torch.linalg.inv(matrix), rtol=1e-6, atol=1e-8)


def test_the_order_is_greedy_and_costs_never_fall():
    w, hessian, _ = quadratic()
    order, costs = trace(w, torch.linalg.inv(hessian), 0, 9)
    assert sorted(order.tolist()) == list(range(9))
    assert (costs.diff() >= 0).all()
    weight, inverse, gone, highest = w.clone(), torch.linalg.inv(hessian), [], 0.0
    for q, cost in zip(order.tolist(), costs.tolist(), strict=True):
        scores = saliency(weight, inverse)
        scores[gone] = torch.inf
        assert q == int(scores.argmin())
        highest = max(highest, float(removed(weight, inverse, torch.tensor([q]))))
        assert cost == pytest.approx(highest, rel=1e-9)
        gone.append(q)


def layer(rows=300, columns=10, outputs=4):
    x = torch.randn(rows, columns).double() @ torch.randn(columns, columns).double()
    weight = torch.randn(outputs, columns + 1).double()
    y = x @ weight[:, :-1].mT + weight[:, -1]
    return Moments.of([(x, y)]), weight


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_ends_where_the_removals_of_its_rows_lead(bias):
    moments, weight = layer()
    if not bias:
        weight[:, -1] = 0
        moments = Moments.of([(x := torch.randn(300, 10).double(), x @ weight[:, :-1].mT)])
    alpha = 1e-3
    found, kept = prune_rows(moments, weight, torch.ones(4, 10, dtype=torch.bool), bias, 0.6, alpha=alpha)
    assert int((~kept).sum()) == 24
    assert torch.equal(found[:, :-1] != 0, kept)
    damped = moments.xx / moments.n
    damped.diagonal().add_(alpha * float(damped.diagonal()[:-1].mean()))
    here = torch.arange(11 if bias else 10)
    for row in range(4):
        moved = weight[row, here].clone()
        removed(moved, torch.linalg.inv(damped[here][:, here]), (~kept[row]).nonzero().flatten())
        torch.testing.assert_close(found[row, here], moved, rtol=1e-6, atol=1e-8)


def test_the_error_of_a_layer_is_the_sum_of_what_the_removals_cost():
    moments, weight = layer()
    found, kept = prune_rows(moments, weight, torch.ones(4, 10, dtype=torch.bool), True, 0.5, alpha=1e-12)
    inverse, total = torch.linalg.inv(moments.xx / moments.n), 0.0
    for row in range(4):
        total += float(removed(weight[row].clone(), inverse.clone(), (~kept[row]).nonzero().flatten()))
    assert float(moments.error(found).sum()) == pytest.approx(2 * total, rel=1e-6)  # a half in the quadratic


def test_repairs_what_magnitude_does_not():
    moments, weight = layer()
    found, _ = prune_rows(moments, weight, torch.ones(4, 10, dtype=torch.bool), True, 0.5, alpha=1e-9)
    small = weight[:, :-1].abs().flatten().argsort()[:20]
    keep = torch.ones(40, dtype=torch.bool)
    keep[small] = False
    masked = weight.clone()
    masked[:, :-1] *= keep.view(4, 10)
    refitted = moments.refit(masked, torch.cat([keep.view(4, 10), torch.ones(4, 1, dtype=torch.bool)], 1), 0)
    errors = [float(moments.error(w).sum()) for w in (found, refitted, masked)]
    assert errors[0] < errors[1] < errors[2]


def test_the_tolerance_bounds_the_error():
    moments, weight = layer()
    everything = torch.ones(4, 10, dtype=torch.bool)
    found, kept = prune_rows(moments, weight, everything, True, 0.95, alpha=1e-10, tolerance=0.02)
    share = float(moments.error(found).sum() / moments.energy.sum())
    assert 0 < share <= 0.02 * (1 + 1e-6)
    assert 0 < int((~kept).sum()) < 38


def test_what_the_loss_sees_of_cross_entropy_is_its_gauss_newton_matrix():
    model, task = small_mlp(), small_task()
    with torch.no_grad():
        model[1].weight.mul_(0.1)
    params = [model[3].weight]
    roots = list(loss_roots(model, task, params, 1))
    assert len(roots) == 32
    x, _ = next(iter(task.train))
    for i in (0, 5):
        hidden = model[:3](x[i : i + 1]).detach()[0].double()
        p = model(x[i : i + 1]).softmax(1)[0].detach().double()
        curvature = torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(hidden, hidden))
        torch.testing.assert_close(roots[i] @ roots[i].mT, curvature, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"step": 0.0}, {"mode": "network", "where": ["3", "8"], "alpha": 1e-5}])
def test_prunes_a_trained_network_better_than_magnitude(options):
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2).eval()
    truth = model(task.valid.x).detach()
    pruned, masked = copy.deepcopy(model), copy.deepcopy(model)
    obs(pruned, task, sparsity=0.7, **options)
    zeros = 0
    for ours, theirs in zip(pruned, masked, strict=True):
        if isinstance(ours, (nn.Conv2d, nn.Linear)):
            count = int((ours.weight == 0).sum())
            with torch.no_grad():
                theirs.weight.view(-1)[theirs.weight.abs().flatten().argsort()[:count]] = 0
            zeros += count
    assert zeros >= 0.69 * sum(
        model.get_submodule(path).weight.numel() for path in options.get("where", ["0", "3", "8"])
    )
    assert float((pruned(task.valid.x) - truth).square().mean().detach()) < 0.5 * float(
        (masked(task.valid.x) - truth).square().mean().detach()
    )
    assert evaluate(pruned, task).value >= evaluate(model, task).value - 0.05


def test_earlier_masks_stay_and_count_and_rounds_prune_in_parts():
    model, task = small_cnn(), small_task()
    keep = torch.rand(16, 8, 3, 3) > 0.3
    attach(model[3], Mask(keep))
    obs(model, task, sparsity=0.6, rounds=2)
    found = mask_of(model[3])
    assert not (found & ~keep).any()
    assert int((~found).sum()) == int(0.6 * found.numel())
    assert torch.equal(model[3].weight != 0, found)


def test_a_fraction_for_each_layer_and_layers_that_cannot_be_done():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2)
            self.fc, self.unused = nn.Linear(64, 4), nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(self.b(self.a(x).relu()).relu().flatten(1))

    model = Odd()
    before = model.b.weight.clone()
    with recording() as ledger:
        obs(model, small_task(), sparsity={"*": 0.5, "fc": 0.75})
    assert int((model.fc.weight == 0).sum()) == 192
    assert int((model.a.weight == 0).sum()) == 18
    assert torch.equal(model.b.weight, before)
    assert "2 groups" in ledger.skipped["b"]
    assert "called 0 times" in ledger.skipped["unused"]
    assert any(text.startswith("fc: 75.0% of its weights removed") for text in ledger.notes)


def test_bad_input():
    task = small_task()
    with pytest.raises(BadOption, match="all weights"):
        obs(small_cnn(), task, mode="network", sparsity={"3": 0.5})
    with pytest.raises(BadOption, match="at most 8192"):
        obs(nn.Sequential(nn.Flatten(), nn.Linear(64, 200)), task, mode="network")
    with pytest.raises(BadOption, match="tolerance"):
        obs(small_cnn(), task, mode="network", tolerance=0.1)
    with pytest.raises(UnknownName, match="conv9"):
        obs(small_cnn(), task, where="conv9")
    bare = Batches(torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4).long())
    unlabelled = Task(valid=task.valid, calibration=[torch.randn(4, 1, 8, 8)])
    with pytest.raises(MissingNeed, match="the loss needs labels"):
        obs(small_mlp(), unlabelled, mode="network", where="3")
    obs(small_mlp(), unlabelled)  # outputs of layers need none
    with pytest.raises(BadData, match="not finite"):
        obs(small_cnn(), Task(valid=bare, calibration=bare))
