"""The preset: fewer bytes than its parts alone, the budget of a run kept, and training worth what it costs."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import small_cnn, small_mlp, small_task
from featherweight import zoo
from featherweight.core.forms import bake
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption
from featherweight.recipes.canonical_order import canonical_order
from featherweight.recipes.entropy_penalized import file_size
from featherweight.recipes.smallest import ordered, smallest
from featherweight.recipes.trellis import trellis


@cache
def digits() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    task = zoo.task("mnist5k", batch_size=100)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))
    return fw.fit(model, task, epochs=6, lr=3e-3).eval(), task


def test_without_training_it_is_the_trellis_on_units_in_order() -> None:
    model, task = digits()
    torch.manual_seed(0)
    alone = bake(trellis(canonical_order(copy.deepcopy(model), task), task, loss=0.02))
    torch.manual_seed(0)
    whole = bake(smallest(copy.deepcopy(model), task, loss=0.02))
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in whole.state_dict().items())
    assert file_size(whole) < 0.03 * sum(4 * p.numel() for p in model.parameters())
    assert evaluate(whole, task).value > evaluate(model, task).value - 0.03


def test_training_keeps_more_at_the_same_size() -> None:
    model, task = digits()
    rounded = bake(smallest(copy.deepcopy(model), task, within="size<=350B"))
    trained = bake(smallest(copy.deepcopy(model), task, within="size<=350B", epochs=40))
    assert file_size(rounded) <= 350
    assert file_size(trained) <= 350
    assert evaluate(trained, task).value > evaluate(rounded, task).value + 0.05


@pytest.mark.parametrize("epochs", [0, 3])
def test_a_run_hands_on_its_budget(epochs: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    chain = [("smallest", {"epochs": epochs})]
    result = fw.compress(small_mlp(), small_task(), chain, until="size<=0.25x", out=tmp_path)
    assert result.reached
    assert (tmp_path / "model.fw").stat().st_size <= 0.25 * sum(p.numel() * 4 for p in small_mlp().parameters())


def test_training_follows_no_drop() -> None:
    with pytest.raises(BadOption, match="training follows a size"):
        smallest(small_mlp(), small_task(), within="drop<=1pt", epochs=1)


def test_units_whose_order_would_cost_bytes_do_stay_in_it() -> None:
    torch.manual_seed(0)
    task = small_task()
    laid = bake(trellis(small_cnn().eval(), task, loss=1e-4, calibration_batches=2))
    before = copy.deepcopy(laid.state_dict())
    with recording() as ledger:
        found = ordered(laid, task)
    assert "stay in their order: the file would grow" in ledger.notes[-1]
    assert all(torch.equal(value, before[name]) for name, value in found.state_dict().items())
