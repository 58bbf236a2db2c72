"""Rows of layers are what the layers compute; sums over them give least squares; memory does not grow with the data."""

import copy
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.core import reconstruct
from featherweight.core.reconstruct import Moments, augmented, drawn, gather, layer_rows, put, refusal
from featherweight.errors import BadData, BadOption

LAYERS = [
    (nn.Linear(5, 3), (4, 5)),
    (nn.Linear(5, 3, bias=False), (4, 6, 5)),
    (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 3, 7, 8)),
    (nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (2, 3, 5, 5)),
    (nn.Conv2d(3, 4, 4, padding="same"), (2, 3, 5, 6)),
    (nn.Conv2d(3, 4, 2, padding=1, padding_mode="circular", bias=False), (2, 3, 5, 5)),
    (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 4, 6)),
    (nn.Conv2d(3, 4, 3), (3, 5, 5)),  # a sample without a batch
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v) if isinstance(v, tuple) else None)
@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("positions", [None, 2])
def test_rows_times_the_weight_are_the_outputs(layer, shape, positions, monkeypatch):
    monkeypatch.setattr(reconstruct, "CHUNK", 12)  # several pieces
    x = torch.randn(shape)
    with torch.no_grad():
        parts = list(gather(layer, x, layer(x), positions, torch.Generator().manual_seed(0)))
    assert len(parts) > 1
    inputs, outputs = (torch.cat(found) for found in zip(*parts, strict=True))
    torch.testing.assert_close(
        inputs @ augmented(layer)[:, :-1].mT + augmented(layer)[:, -1], outputs, rtol=1e-5, atol=1e-5
    )
    assert positions is None or len(inputs) <= shape[0] * positions


def test_positions_are_different_and_the_same_at_every_call():
    sample, place = drawn(3, 50, 10, torch.Generator().manual_seed(0))
    assert sample.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert all(len(set(part.tolist())) == 10 for part in place.split(10))
    model, task = small_cnn(), small_task()
    once, twice = (Moments.of(layer_rows(model, "3", task, task.train, positions=3)) for _ in range(2))
    assert once.n == 96 * 3
    assert torch.equal(once.xx, twice.xx)


def planted(rows=200, columns=8, outputs=3):
    x, y = torch.randn(rows, columns).double(), torch.randn(rows, outputs).double()
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]
    return x, y


@pytest.mark.parametrize("intercept", [True, False])
def test_least_squares_from_streamed_sums_are_those_on_all_data(intercept):
    x, y = planted()
    moments = Moments.of(zip(x.split(17), y.split(17), strict=True))
    free = torch.tensor([True] * 8 + [intercept])
    found = moments.refit(torch.zeros(3, 9), free, ridge=0)
    full = torch.cat([x, torch.full((200, 1), float(intercept), dtype=torch.float64)], 1).numpy()
    expected = np.linalg.lstsq(full, y.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
    error = ((y.numpy() - full @ expected.T) ** 2).mean(0)
    np.testing.assert_allclose(moments.error(found).numpy(), error, rtol=1e-9)
    np.testing.assert_allclose(moments.energy.numpy(), y.var(0, unbiased=False).numpy(), rtol=1e-9)


def test_ridge_pulls_towards_the_weight_that_is_there_and_never_raises_the_error():
    x, y = planted()
    moments, start = Moments.of([(x, y)]), torch.randn(3, 9).double()
    free = torch.ones(9, dtype=torch.bool)
    errors = [float(moments.error(moments.refit(start, free, ridge)).sum()) for ridge in (0, 1e-3, 1e-1, 10, 1e6)]
    assert errors == sorted(errors)
    assert errors[-1] <= float(moments.error(start).sum())
    torch.testing.assert_close(moments.refit(start, free, 1e9), start, atol=1e-6, rtol=0)


def test_entries_that_are_not_free_stay_and_every_output_may_have_its_own():
    x, y = planted()
    moments, start = Moments.of([(x, y)]), torch.randn(3, 9).double()
    free = torch.rand(3, 9) > 0.5
    free[2] = False
    found = moments.refit(start, free, 0)
    assert torch.equal(found[~free], start[~free])
    for o in range(2):
        rest = y[:, o] - torch.cat([x, torch.ones(200, 1)], 1)[:, ~free[o]] @ start[o, ~free[o]]
        expected = np.linalg.lstsq(torch.cat([x, torch.ones(200, 1)], 1)[:, free[o]].numpy(), rest.numpy(), rcond=None)[
            0
        ]
        np.testing.assert_allclose(found[o, free[o]].numpy(), expected, atol=1e-9)


def test_dependent_columns_are_solved_too():
    x, y = planted()
    x[:, 3], x[:, 5] = x[:, 2], 0  # the same twice, and nothing
    y = x @ torch.randn(8, 3).double()
    moments = Moments.of([(x, y)])
    for ridge in (0, 1e-9):
        found = moments.refit(torch.zeros(3, 9), torch.ones(9, dtype=torch.bool), ridge)
        assert float(moments.error(found).sum()) < 1e-12
        assert float(found.abs().max()) < 10


def test_a_layer_is_repaired_behind_a_damaged_prefix():
    original, task = small_mlp(), small_task()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model[1].weight.mul_(0.5)
        model[1].bias.mul_(0.5)
    rows = layer_rows(model, "3", task, task.train, original=original)
    moments = Moments.of(rows)
    put(model[3], moments.refit(augmented(model[3]), torch.ones(33, dtype=torch.bool), 1e-9))
    for x, _ in task.train:
        torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-3)


def test_only_sums_and_one_piece_of_rows_are_held(monkeypatch):
    monkeypatch.setattr(reconstruct, "CHUNK", 1000)
    model, task, pieces, alive = nn.Sequential(nn.Conv2d(4, 8, 3)), small_task(), [], []
    batches = ((torch.randn(8, 4, 12, 12), torch.zeros(8)) for _ in range(20))

    def watched():
        for x, y in layer_rows(model, "0", task, batches, positions=20):
            pieces.append(weakref.ref(x))
            alive.append(sum(piece() is not None for piece in pieces))
            assert x.numel() <= 1000
            yield x, y

    moments = Moments.of(watched())
    assert moments.n == 20 * 8 * 20
    assert moments.xx.shape == (37, 37)
    assert max(alive) <= 2
    assert len(pieces) > 100


def test_what_cannot_be_reconstructed_says_why(monkeypatch):
    assert "2 groups" in refusal(nn.Conv2d(4, 4, 3, groups=2))
    assert "BatchNorm2d" in refusal(nn.BatchNorm2d(3))
    assert refusal(nn.Linear(4, 4)) == ""
    assert "GiB" in refusal(nn.Linear(25088, 64, device="meta"))
    model, task = small_cnn(), small_task()
    with pytest.raises(BadOption, match="1: a BatchNorm2d"):
        list(layer_rows(model, "1", task, task.train))
    with pytest.raises(BadData, match="no rows"):
        Moments.of([])
    broken = Batches(torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4))
    with pytest.raises(BadData, match="not finite"):
        Moments.of(layer_rows(model, "0", task, broken))
