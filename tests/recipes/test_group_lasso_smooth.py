"""Wang et al. 2018: the penalty joins |x| twice smoothly, full-batch descent never rises, short neurons die and go."""

import pytest
import torch
from torch import nn

from conftest import blobs, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups
from featherweight.core.fit import fit
from featherweight.core.groups import makers, readers
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.group_lasso_smooth import slope_over_length, smoothed

smooth = entry("group_lasso_smooth")
SGD = {"optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr)}


@pytest.mark.parametrize("a", [1e-2, 0.3, 2.0])
def test_the_pieces_join_in_value_slope_and_curvature(a):
    x = torch.tensor([a * (1 - 1e-9)], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(smoothed(x, a).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    value = smoothed(x, a).detach()
    assert [float(value), float(slope.detach()), float(curvature) * a] == pytest.approx([a, 1, 0], abs=1e-6)


def test_the_gradient_is_that_of_the_penalty_and_bounded_at_zero():
    v = torch.tensor([[0.0, 0.0], [0.03, 0.04], [0.3, 0.4], [3.0, 4.0]], dtype=torch.float64)
    for a in (0.1, 1.0):
        free = v.clone().requires_grad_()
        (expected,) = torch.autograd.grad(smoothed((free.square().sum(1) + 1e-30).sqrt(), a).sum(), free)
        found = slope_over_length(v.norm(dim=1), a)[:, None] * v
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert (found.norm(dim=1) <= 1 + 1e-12).all()


def test_full_batch_descent_never_rises():
    x, y = blobs((1, 8, 8))
    data = [(x, y)]
    losses = []

    def watched(model, task, **options):
        groups = makers(model, channel_groups(model, task.inputs()))

        def objective(progress):
            with torch.no_grad():
                penalty = 0.05 * smoothed(groups.norms(model), 0.1).sum()
                losses.append(float(task.loss(model(x), y) + penalty))

        objective(0.0)
        return fit(model, task, **{**options, "after_step": objective, "decay": "constant"})

    task = Task(train=data, valid=data, fit=watched)
    smooth(small_mlp(), task, penalty=0.05, a=0.1, threshold=3.0, epochs=150, finetune=0, lr=0.05, round_to=1, **SGD)
    losses = torch.tensor(losses[:151])
    assert (losses.diff() <= 1e-6).all()
    assert losses[-1] < 0.7 * losses[0]


def test_short_vectors_decay_and_long_ones_lose_the_same_length():
    model = small_mlp()
    with torch.no_grad():
        model[1].weight[:8] *= 1e-3
    start = model[1].weight.detach().flatten(1).norm(dim=1)
    task = small_task(loss=lambda output, target: 0 * output.sum())
    smooth(model, task, penalty=0.1, a=0.1, epochs=2, lr=0.1, finetune=0, threshold=1e-9 + 1e-3, round_to=1, **SGD)
    end = model[1].weight.detach().flatten(1).norm(dim=1)
    assert model[1].out_features == 24  # the eight shortest were below the threshold
    lost = (start[8:] - end) / (start[8:] - end).mean()
    torch.testing.assert_close(lost, torch.ones(24), rtol=0, atol=1e-3)


def test_removal_changes_nothing_when_the_vectors_are_zero():
    model, task = small_mlp(), small_task()
    with torch.no_grad():
        model[1].weight[::4] = 0
    before = model(task.valid.x)
    smooth(model, task, epochs=0, finetune=0, round_to=1)
    assert (model[1].out_features, model[3].in_features) == (24, 24)
    torch.testing.assert_close(model(task.valid.x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vectors", ["in", "out"])
def test_prunes_neurons_that_are_not_needed(vectors):
    task = small_task()
    model = fit(small_mlp(), task, epochs=10, lr=0.01)
    before = evaluate(model, task).value
    smooth(model, task, penalty=0.03, vectors=vectors, a=0.1, epochs=60, lr=0.05, finetune=5, round_to=1)
    assert model[1].out_features <= 20
    assert evaluate(model, task).value >= before - 0.04
    channels = channel_groups(model, task.inputs())
    held = makers(model, channels) if vectors == "in" else readers(model, channels)
    assert float(held.norms(model).min()) > 0.1


def test_bad_options():
    with pytest.raises(CompressionError, match="raise the penalty"):
        smooth(small_mlp(), small_task(), epochs=0)
    with pytest.raises(BadOption, match="choose a method that masks weights"):
        smooth(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), small_task())
    with pytest.raises(BadOption, match="a=0"):
        smooth(small_mlp(), small_task(), a=0.0)
