"""Carreira-Perpinan and Idelbayev 2018: C steps are exact projections, w and theta meet, the LASSO is the limit."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Lasso
from torch import Tensor, nn

from conftest import Batches, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.task import Task
from featherweight.errors import BadOption
from featherweight.recipes.lc_prune import ball, projected

lc_prune = entry("lc_prune")


def one(u: Tensor, kind: str, mu: float = 1.0, **number) -> Tensor:
    return projected({"w": u}, kind, {"w": torch.ones(len(u)).bool()}, mu, **number)["w"]


@pytest.mark.parametrize("seed", range(5))
def test_the_c_step_is_the_exact_projection(seed):
    torch.manual_seed(seed)
    u = torch.randn(6, dtype=torch.float64)
    supports = [list(s) for k in range(7) for s in itertools.combinations(range(6), k)]

    def on(support: list[int]) -> Tensor:
        return torch.zeros(6, dtype=torch.float64).index_copy(0, torch.tensor(support, dtype=torch.long), u[support])

    two = min((on(s) for s in supports if len(s) == 2), key=lambda w: float((w - u).square().sum()))
    assert torch.equal(one(u, "l0", sparsity=4 / 6), two)
    mu, alpha = 3.0, 0.4
    cost = min((on(s) for s in supports), key=lambda w: float(alpha * (w != 0).sum() + mu / 2 * (w - u).square().sum()))
    assert torch.equal(one(u, "l0_penalty", mu, alpha=alpha), cost)
    shrunk = one(u, "l1_penalty", mu, alpha=alpha)
    torch.testing.assert_close(shrunk, u.sign() * (u.abs() - alpha / mu).clamp_min(0))


def test_the_projection_on_the_l1_ball_is_in_it_and_nearest():
    assert one(torch.ones(4), "l1", kappa=2.0).tolist() == [0.5] * 4  # public code leaves it at a sum of 4
    torch.manual_seed(0)
    for _ in range(20):
        u = torch.randn(5, dtype=torch.float64)
        w = one(u, "l1", kappa=1.0)
        assert float(w.abs().sum()) == pytest.approx(min(1.0, float(u.abs().sum())))
        corners = torch.cat([torch.eye(5), -torch.eye(5)]).double()  # optimal: no corner of the ball improves on it
        assert float((corners @ (u - w)).max()) <= float(w @ (u - w)) + 1e-9
    assert ball(torch.tensor([0.1, 0.2]), 1.0) == 0.0


def newton(model: nn.Module, task: Task, *, step=None, **_options) -> nn.Module:
    """An exact L step of a quadratic with a single layer: one Newton step; no fine-tuning."""
    if step is None:
        return model
    (weight,) = model.parameters()
    (batch,) = task.train
    loss = torch.stack(list(step(model, batch, 0.0).values())).sum()
    (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
    rows = [torch.autograd.grad(entry, weight, retain_graph=True)[0].view(-1) for entry in slope.view(-1)]
    with torch.no_grad():
        weight -= torch.linalg.solve(torch.stack(rows), slope.view(-1)).view_as(weight)
    return model


def quadratic(seed: int, size: int, loss=F.mse_loss) -> tuple[nn.Module, Task]:
    """Least squares with correlated regressors, at the dense solution, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(4 * size, size, generator=generator).double()
        @ torch.randn(size, size, generator=generator).double()
    )
    w = torch.randn(size, 1, generator=generator).double()
    y = x @ w + torch.randn(4 * size, 1, generator=generator).double()
    model = nn.Sequential(nn.Linear(size, 1, bias=False)).double()
    model[0].weight.data.copy_(torch.linalg.lstsq(x, y).solution.T)
    return model, Task(train=Batches(x, y, len(x)), valid=Batches(x, y, len(x)), loss=loss, fit=newton)


def gap_note(ledger) -> str:
    (found,) = [text for text in ledger.notes if text.startswith("||w - theta||")]
    return found.split(": ")[1]


def test_on_quadratics_it_beats_one_shot_on_average():
    ours, one_shot = [], []
    for seed in range(100):
        model, task = quadratic(seed, 6)
        x, y = task.train.x, task.train.y
        dense = model[0].weight.detach().clone()
        lc_prune(model, task, sparsity=0.5, mu=1e-2, growth=2.2, steps=14, finetune=0, lr=1.0)
        assert int((model[0].weight == 0).sum()) == 3
        ours.append(float(F.mse_loss(model(x), y).detach()))
        one_shot.append(float(F.mse_loss(x @ one(dense.view(-1), "l0", sparsity=0.5), y.view(-1))))
    assert sum(ours) < 0.5 * sum(one_shot)


def test_with_an_l1_penalty_the_limit_is_the_lasso():
    model, task = quadratic(3, 5, loss=lambda output, target: F.mse_loss(output, target) / 2)
    x, y = task.train.x, task.train.y
    penalty = 0.3 * float((x.T @ y).abs().max()) / len(x)
    with recording() as ledger:
        lc_prune(model, task, kind="l1_penalty", alpha=penalty, mu=1e-8, growth=1.1, steps=250, finetune=0)
    lasso = Lasso(alpha=penalty, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x.numpy(), y.view(-1).numpy())
    found = model[0].weight.detach().view(-1)
    torch.testing.assert_close(found, torch.tensor(lasso.coef_), atol=1e-4, rtol=1e-3)
    assert bool((found == 0).any())
    gaps = [float(g) for g in gap_note(ledger).split()]
    assert gaps[-1] < 1e-4 * max(gaps)


def test_weights_and_their_sparse_copy_meet():
    torch.manual_seed(0)
    model, task = small_mlp(), small_task()
    with recording() as ledger:
        lc_prune(model, task, sparsity=0.8, mu=1e-2, growth=1.5, steps=14, epochs=70, finetune=0, lr=0.05,
                 optimizer="momentum")  # fmt: skip
    gaps = [float(g) for g in gap_note(ledger).split()]
    assert gaps[-1] < 0.1 * max(gaps)
    kept = [int(mask_of(model[i]).sum()) for i in (1, 3)]
    assert sum(kept) == 2176 - int(0.8 * 2176)
    assert kept[1] / 128 > kept[0] / 2048, "the projection is over all layers together"


def test_a_penalty_that_would_empty_a_layer_leaves_one_weight():
    with recording() as ledger:
        model = lc_prune(small_mlp(), small_task(), kind="l0_penalty", alpha=1e6, steps=2, epochs=1, finetune=0)
    assert [int(mask_of(model[i]).sum()) for i in (1, 3)] == [1, 1]
    assert all(model[i].weight.any() for i in (1, 3))
    assert any("1: no weight is large enough" in text for text in ledger.notes)


def test_an_earlier_mask_stands():
    model = small_mlp()
    keep = torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    lc_prune(model, small_task(), sparsity=0.7, steps=2, epochs=2, finetune=1)
    assert not (mask_of(model[1]) & ~keep).any()


def test_a_kind_without_its_number_is_refused():
    with pytest.raises(BadOption, match="needs kappa"):
        lc_prune(small_mlp(), small_task(), kind="l1")
    with pytest.raises(BadOption, match="needs alpha"):
        lc_prune(small_mlp(), small_task(), kind="l1_penalty")
