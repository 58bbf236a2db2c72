"""Sun et al. 2017: inputs that do not matter get the factor zero; a network at rest keeps its factors at one."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach
from featherweight.core.ledger import recording
from featherweight.core.task import Metric, Task
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.lasso_mlp import Inputs, fold, joined, linear_layer, projected

lasso_mlp = entry("lasso_mlp")


def mse(output, target):
    return nn.functional.mse_loss(output.squeeze(-1), target)


def regression(n=400, features=10, useful=3, noise=0.1, mean=0.0):
    x = torch.randn(2 * n, features) + mean
    y = (x[:, :useful] - mean).tanh().sum(1) + noise * torch.randn(2 * n)
    score = Metric("error", per_sample=lambda o, t: (o.squeeze(-1) - t).square(), higher_is_better=False)
    return Task(train=Batches(x[:n], y[:n], 40), valid=Batches(x[n:], y[n:], 40), loss=mse, metric=score)


def perceptron(features=10):
    return nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, 1))


def test_the_projection_is_the_nearest_point_under_the_bound():
    for _ in range(20):
        v = torch.randn(8)
        found = projected(v, 1.5)
        assert (found >= 0).all()
        assert float(found.sum()) <= 1.5 + 1e-5
        for _ in range(50):
            other = torch.rand(8) * 2
            other = other * min(1.0, 1.5 / float(other.sum()))
            assert (v - found).norm() <= (v - other).norm() + 1e-6
    assert torch.equal(projected(torch.tensor([0.2, 0.3]), 5.0), torch.tensor([0.2, 0.3]))


def test_of_a_linear_model_it_is_the_garrote_that_another_solver_finds():
    task = regression(mean=0.7)
    model = nn.Linear(10, 1)
    fit(model, task, epochs=10, lr=0.05)
    inputs = Inputs.of(model, task, model, (joined(list(task.train)),))
    x, y = task.train.x.double().numpy(), task.train.y.double().numpy()
    w, b, mean = model.weight[0].detach().double().numpy(), float(model.bias.detach()), x.mean(0)
    for bound in (1.0, 2.5, 8.0):

        def cost(beta):
            return np.square((mean + beta * (x - mean)) @ w + b - y).mean()

        other = minimize(cost, np.full(10, bound / 10), bounds=[(0, None)] * 10, method="SLSQP",
                         constraints={"type": "ineq", "fun": lambda beta, bound=bound: bound - beta.sum()},
                         options={"ftol": 1e-12, "maxiter": 500})  # fmt: skip
        found = inputs.solved(bound, 300)
        assert float(found.sum()) <= bound + 1e-4
        assert inputs.loss(found)[0] == pytest.approx(other.fun, rel=1e-4, abs=1e-6)


def test_a_large_bound_leaves_one_at_rest_of_the_loss_itself_and_not_of_a_decayed_one():
    task = regression(n=200)
    x, y = task.train.x, task.train.y
    found = {}
    for decay in (0.0, 0.05):
        torch.manual_seed(1)
        model = perceptron().double()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-14,
                                      line_search_fn="strong_wolfe")  # fmt: skip

        def closure(model=model, optimizer=optimizer, decay=decay):
            optimizer.zero_grad()
            loss = mse(model(x.double()), y.double()) + decay * model[0].weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        data = Batches(x.double(), y.double(), 40)
        inputs = Inputs.of(model, Task(valid=data, loss=mse), model[0], (joined(list(data)),))
        found[decay] = inputs.solved(1000.0, 50)
    assert (found[0.0] - 1).abs().max() < 0.02
    assert (found[0.05] - 1).abs().max() > 5 * (found[0.0] - 1).abs().max()


def test_inputs_that_do_not_matter_are_dropped_at_no_cost():
    task = regression()
    model = fit(perceptron(), task, epochs=30, lr=0.02)
    before = float(mse(model(task.valid.x), task.valid.y).detach())
    with recording() as ledger:
        lasso_mlp(model, task, batches=10, grid=10, iterations=30, epochs=10)
    dropped = (model[0].weight == 0).all(0)
    assert not dropped[:3].any()
    assert dropped[3:].sum() >= 4
    assert float(mse(model(task.valid.x), task.valid.y).detach()) <= 1.3 * before
    assert any("on the validation data" in text for text in ledger.notes)
    assert any(text.startswith("0: ") and "of 10 inputs kept" in text for text in ledger.notes)


def test_under_the_bound_of_those_that_matter_exactly_these_stay():
    task = regression()
    model = fit(perceptron(), task, epochs=30, lr=0.02)
    lasso_mlp(model, task, total=2.9, batches=10, iterations=60, epochs=0)
    assert (model[0].weight != 0).any(0).nonzero().flatten().tolist() == [0, 1, 2]


def test_a_dropped_input_is_at_its_mean():
    task = regression(mean=2.0)
    model, x = perceptron(), task.train.x
    fit(model, task, epochs=3, lr=0.01)
    mean = x.mean(0)
    beta = torch.tensor([1.0, 0.0, 0.5, 0.0] + [1.0] * 6)
    with torch.no_grad():
        wanted = model(mean + beta * (x - mean))
        fold(model[0], mean, beta)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert not model[0].weight[:, [1, 3]].any()


def test_the_layer_masks_and_training_after_it():
    model, task = small_cnn(), small_task()
    attach(model[3], Mask(torch.rand(16, 8, 3, 3) > 0.5))
    lasso_mlp(model, task, total=4.0, iterations=15, batches=2, epochs=1)
    assert (model[8].weight != 0).any(0).all()
    assert model[8].in_features == model[3].out_channels < 16, "channels that nothing reads are gone"
    assert 0.3 < float((model[3].weight == 0).float().mean()) < 0.7
    other = small_mlp()
    lasso_mlp(other, task, layer="3", total=5.0, iterations=15, batches=2, epochs=1)
    assert other[1].out_features == other[3].in_features < 32
    assert not (other[1].weight == 0).any()


def test_bad_options():
    task = small_task()
    with pytest.raises(BadOption, match="no linear layer"):
        linear_layer(nn.Sequential(nn.Conv2d(1, 4, 3)), None)
    with pytest.raises(BadOption, match="choose one of 1, 3"):
        lasso_mlp(small_mlp(), task, layer="2")
    with pytest.raises(CompressionError, match="smaller total"):
        lasso_mlp(small_mlp(), task, total=1e4, iterations=1, batches=2)
