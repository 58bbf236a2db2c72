"""Lan et al. 2018: as many steps as plain training, a restart between the halves, and the first half as teacher."""

import copy

import torch

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import evaluate
from featherweight.ingredients.match.softened import softened
from matches import on_logits


def test_as_many_steps_as_plain_training_and_two_complete_schedules():
    rates = []

    def counted(params, lr):
        optimizer = torch.optim.Adam(params, lr=lr)
        optimizer.register_step_pre_hook(lambda o, a, k: rates.append(o.param_groups[0]["lr"]))
        return optimizer

    entry("srdl")(small_cnn(), small_task(), epochs=8, optimizer=counted, lr=1.0)
    assert len(rates) == 8 * 3
    assert rates[:12] == rates[12:]
    assert rates[0] == 1.0
    assert rates[11] < 0.02


def test_second_half_starts_anew_under_the_first():
    held = []

    def watching(model, task, **options):
        held.append((copy.deepcopy(model), task.teacher, options.get("step")))
        fit(model, task, **options)
        held.append((copy.deepcopy(model), task.teacher, options.get("step")))
        return model

    task = small_task(fit=watching)
    entry("srdl")(small_cnn().eval(), task, epochs=2)
    first, (second, teacher, step) = held[1][0], held[2]
    assert not torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(first[0].weight, teacher[0].weight)
    x, y = next(iter(task.train))
    terms = step(second, (x, y), 0.0)
    torch.testing.assert_close(
        terms["self"], on_logits(softened, second(x), teacher(x), temperature=3.0), rtol=1e-4, atol=1e-6
    )


def test_learns():
    task = small_task()
    assert evaluate(entry("srdl")(small_cnn(), task, epochs=16, lr=0.01), task).value >= 0.9
