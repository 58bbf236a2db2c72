"""Iterative magnitude pruning: retraining repairs, and removing in rounds is no worse than removing at once."""

import torch

from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import bake
from featherweight.core.task import evaluate


def loss_after(seed: int, **options) -> float:
    torch.manual_seed(seed)
    model, task = small_mlp(), small_task()
    fit(model, task, epochs=4, lr=1e-2)
    entry("magnitude_iterative")(model, task, sparsity=0.97, lr=5e-3, **options)
    bake(model)
    with torch.no_grad():
        return float(torch.stack([task.loss(model(x), y) for x, y in task.valid]).mean())


def test_rounds_are_not_worse_than_one_shot_at_equal_sparsity_and_training():
    seeds = range(6)
    rounds = sum(loss_after(s, rounds=6, epochs=6, finetune=2, schedule="cubic") for s in seeds) / 6
    at_once = sum(loss_after(s, rounds=1, epochs=6, finetune=2, schedule="constant") for s in seeds) / 6
    assert rounds <= at_once * 1.1 + 0.02


def test_retraining_the_survivors_repairs_the_damage():
    model, task = small_mlp(), small_task()
    fit(model, task, epochs=4, lr=1e-2)
    method = entry("magnitude_iterative")
    method(model, task, sparsity=0.95, rounds=1, epochs=0, finetune=0)
    damaged = evaluate(model, task).value
    method(model, task, sparsity=0.95, rounds=1, epochs=8, finetune=0, lr=1e-2)
    assert evaluate(model, task).value >= damaged + 0.1
    bake(model)
    assert int((model[1].weight == 0).sum() + (model[3].weight == 0).sum()) == int(0.95 * 2176)


def test_facts():
    found = entry("magnitude_iterative")
    assert (found.family, found.kind, found.needs) == ("prune", "method", {"labels", "train"})
    options = {option.name: option for option in found.options()}
    assert options["sparsity"].default == 0.9
    assert "fraction" in options["sparsity"].meaning
    assert options["score"].default == "magnitude"
