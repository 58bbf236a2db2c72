"""Entropy-penalised training: the price of a bit, the size that is asked for, and what it costs beside rounding."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import featherweight as fw
import featherweight.recipes.entropy_penalized as training
from conftest import small_cnn, small_mlp, small_task
from featherweight import zoo
from featherweight.core.forms import bake, codes_of
from featherweight.core.site import sites
from featherweight.core.task import evaluate
from featherweight.errors import BadData, CompressionError
from featherweight.prune import prune
from featherweight.recipes.entropy_penalized import (
    CodeLength,
    Goal,
    bytes_of,
    entropy_penalized,
    file_size,
    latent,
    on_latents,
    price,
)
from featherweight.recipes.rdoq import rdoq


def entropy(mean: float) -> float:
    """Bits of a two-sided geometric distribution of this mean magnitude, summed term by term."""
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(200):  # its parameter, by bisection on the mean
        t = (low + high) / 2
        low, high = (t, high) if 2 * t / (1 - t * t) < mean else (low, t)
    sizes = np.arange(-4000, 4001)
    p = (1 - low) / (1 + low) * low ** np.abs(sizes)
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


@pytest.mark.parametrize("mean", [0.2, 0.6, 1.0, 3.0])
def test_the_price_is_what_entropy_grows_by_with_the_mean(mean: float) -> None:
    x = torch.full((40, 60), mean)
    x[::2] *= -1
    size = 0.5 * float((x.abs() + x.abs().round()).mean())  # half-way between the latents and their integers
    grown = (entropy(size + 1e-4) - entropy(size - 1e-4)) / 2e-4
    assert float(price(x).mean()) == pytest.approx(grown, rel=0.06)  # rows and columns lean on 0.02 more
    assert price(x).std() < 1e-5


def test_a_weight_is_dear_where_its_row_and_column_are_empty() -> None:
    x = torch.zeros(12, 20)
    x[:3], x[:, 5] = 2.0, 1.0
    dear = price(x)
    assert dear[0, 5] < dear[0, 0] < dear[8, 0]
    assert dear[8, 5] < dear[8, 0]


def test_bits_push_towards_zero_and_large_weights_less() -> None:
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.tensor([[4.0, -1.0, 0.5], [0.0, 2.0, -3.0]])
    tensors = on_latents(model, sites(model), levels=1.0)
    x = latent(tensors[0])
    CodeLength(tensors)().backward()
    slope = price(x.detach()) / (1 + x.detach().abs()) / np.log(2)
    assert torch.allclose(x.grad, slope * x.detach().sign(), atol=1e-6)
    assert x.grad[1, 0] == 0


def test_lambda_rises_while_the_file_is_too_large_and_falls_below() -> None:
    model = small_mlp()
    tensors = on_latents(model, sites(model), levels=2.0)
    rates = {}
    for wanted in (60, 40000):
        goal = Goal(model, tensors, 1e-4, wanted)
        goal.follow(0.9)
        rates[wanted] = goal.rate
    assert rates[60] > 1e-4 > rates[40000]


@pytest.mark.parametrize("wanted", [500, 150])
def test_the_file_is_as_small_as_was_asked(wanted: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bake(entropy_penalized(small_mlp(), small_task(), within=f"size<={wanted}B", epochs=6, lr=0.05))
    fw.save(model, tmp_path / "a.fw", coder="context_mixing", bare=True)
    assert 0.6 * wanted < (tmp_path / "a.fw").stat().st_size <= wanted
    again = fw.load(tmp_path / "a.fw", into=small_mlp())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert codes_of(model[1]) is not None
    assert codes_of(model[1], "bias") is not None


def test_it_beats_rounding_afterwards_at_the_same_size() -> None:
    """A small network on digits trained for 600 bytes, against as many epochs of float, rounded to as many."""
    torch.manual_seed(0)
    task = zoo.task("mnist5k", batch_size=100)
    base = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))
    fw.fit(base, task, epochs=3, lr=3e-3)
    trained = bake(entropy_penalized(copy.deepcopy(base), task, within="size<=600B", epochs=16, rate=1e-5))
    fw.fit(base, task, epochs=16, lr=1e-3)
    loss, rounded = 0.02, base
    while file_size(rounded) > 600:
        loss *= 1.5
        rounded = bake(rdoq(copy.deepcopy(base), task, loss=loss, rate=1.0))
    assert file_size(trained) <= 600
    assert evaluate(trained, task).value > evaluate(rounded, task).value + 0.02


def test_what_masks_hold_stays_zero() -> None:
    torch.manual_seed(0)
    task, model = small_task(), small_cnn()
    model = prune(model, task, sparsity=0.5, finetune=0)
    gone = {name: w == 0 for name, w in bake(copy.deepcopy(model)).state_dict().items() if w.dim() > 1}
    model = bake(entropy_penalized(model, task, epochs=1))
    assert all(bool((model.state_dict()[name][zero] == 0).all()) for name, zero in gone.items())
    assert any(bool(zero.any()) for zero in gone.values())


def test_too_small_a_file_is_refused_with_what_is_left() -> None:
    with pytest.raises(CompressionError, match=r"size<=20B: with all chosen weights zero the file still has \d+"):
        entropy_penalized(small_cnn(), small_task(), within="size<=20B", epochs=0)


def test_such_a_file_is_refused_before_anything_is_trained() -> None:
    task = replace(small_task(), fit=lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(CompressionError, match="with all chosen weights zero"):
        entropy_penalized(small_cnn(), task, within="size<=20B", epochs=3)


def test_the_size_is_reached_in_few_looks_and_by_no_more_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = small_mlp()
    tensors, looks = on_latents(model, sites(model), levels=2.0), 0
    before = torch.cat([latent(place).detach().flatten() for place in tensors])

    def counted(model: nn.Module) -> int:
        nonlocal looks
        looks += 1
        return file_size(model)

    wanted = file_size(model) // 2
    monkeypatch.setattr(training, "file_size", counted)
    Goal(model, tensors, 1e-5, wanted).reach()
    after = torch.cat([latent(place).detach().flatten() for place in tensors])
    assert 0.97 * wanted < file_size(model) <= wanted
    assert looks < 20
    assert before[after == 0].abs().max() < before[after != 0].abs().min()
    assert torch.equal(after[after != 0], before[after != 0])


def test_a_share_of_the_size_is_that_of_the_network_without_its_masks() -> None:
    model = prune(small_cnn(), small_task(), sparsity=0.5, finetune=0)
    whole = bytes_of(bake(copy.deepcopy(model)), "size<=0.5x")
    seen: list[int | None] = []

    def watched(model: nn.Module, tensors: list, rate: float, wanted: int | None) -> Goal:
        seen.append(wanted)
        return Goal(model, tensors, rate, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Goal", watched)
        entropy_penalized(model, small_task(), within="size<=0.5x", epochs=0)
    assert seen == [whole]


def test_steps_stay_in_their_list_and_biases_that_are_no_numbers_are_told() -> None:
    model = bake(entropy_penalized(small_mlp(), small_task(), epochs=1, step_lr=1e3))
    assert all(bool(value.isfinite().all()) for value in model.parameters())
    model = small_mlp()
    model[1].bias.data[0] = float("nan")
    with pytest.raises(BadData, match="the bias of 1 is not finite"):
        entropy_penalized(model, small_task(), epochs=1)
