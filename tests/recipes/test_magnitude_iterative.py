"""Iterative magnitude pruning: retraining repairs, and removing in rounds is better than removing at once."""

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


def test_rounds_are_better_than_one_shot_at_equal_sparsity_and_training():
    rounds, at_once = (
        [loss_after(seed, rounds=n, epochs=6, finetune=2, schedule=schedule) for seed in range(6)]
        for n, schedule in ((6, "cubic"), (1, "constant"))
    )
    assert sum(rounds) < 0.85 * sum(at_once)
    assert all(a < b for a, b in zip(rounds, at_once, strict=True))


def test_the_default_schedule_leaves_something_to_remove_for_every_round():
    seen = []

    def record(model, task, **options):
        seen.append(sum(int((model[i].weight == 0).sum()) for i in (1, 3)))
        return model

    entry("magnitude_iterative")(small_mlp(), small_task(fit=record), sparsity=0.9, rounds=4)
    cubic = [int(0.9 * (1 - (1 - t / 4) ** 3) * 2176) for t in (1, 2, 3, 4)]
    assert seen == [*cubic, cubic[-1]]


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
