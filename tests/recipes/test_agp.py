"""Zhu and Gupta 2017: the sparsity follows the cubic curve, in steps and in the rounds of the verb."""

import itertools

import pytest
import torch

from conftest import small_mlp, small_task
from featherweight.core.fit import fit
from featherweight.core.forms import mask_of
from featherweight.core.task import Task
from featherweight.ingredients.schedule.cubic import agp, sparsity_at
from featherweight.prune import prune


def test_the_curve_is_the_equation_of_the_paper():
    initial, final, begin, interval, count = 0.1, 0.9, 200, 50, 12
    steps = [begin + k * interval for k in range(count + 1)]
    found = [sparsity_at(s, initial=initial, final=final, begin=begin, interval=interval, count=count) for s in steps]
    wanted = [final + (initial - final) * (1 - (s - begin) / (count * interval)) ** 3 for s in steps]
    assert found == pytest.approx(wanted, abs=1e-12)
    assert (found[0], found[-1]) == pytest.approx((initial, final), abs=1e-15)
    grown = [b - a for a, b in itertools.pairwise(found)]
    assert all(a > b > 0 for a, b in itertools.pairwise(grown)), "it grows, and by less every time"
    between = {"initial": initial, "final": final, "begin": begin, "interval": interval, "count": count}
    assert sparsity_at(begin - 1, **between) == initial
    assert sparsity_at(begin + 1, **between) == found[0]
    assert sparsity_at(steps[3] + interval - 1, **between) == found[3]
    assert sparsity_at(10**9, **between) == found[-1]


def test_rounds_of_the_verb_follow_it_exactly():
    model, rounds, seen = small_mlp(), 5, []

    def watched(model: torch.nn.Module, task: Task, **options):
        seen.append(sum(int((~mask_of(layer)).sum()) for layer in (model[1], model[3])))
        return fit(model, task, **options)

    task = small_task(fit=watched)
    prune(
        model, task, schedule="agp", start=0.2, sparsity=0.8, rounds=rounds, epochs=rounds, finetune=0, scope="global"
    )
    wanted = [0.8 + (0.2 - 0.8) * (1 - k / rounds) ** 3 for k in range(1, rounds + 1)]
    assert seen == [int(share * 2176 + 1e-9) for share in wanted]
    assert agp(1.0) == 1
