"""Yim et al. 2017: what Gram matrices do not see, their value by hand, and two stages."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import evaluate
from featherweight.errors import BadOption
from featherweight.ingredients.match.gram_matrices import gram, gram_matrices
from matches import loss, watched


def test_positions_and_inverse_scales_do_not_matter_and_channels_do():
    a, b = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 5, 4, 4, dtype=torch.float64)
    order = torch.randperm(16)
    mixed = [f.flatten(2)[:, :, order].view_as(f) for f in (a, b)]
    for same in (mixed, [3 * a, b / 3], [a.flip(2), b.flip(2)], [a.rot90(1, (2, 3)), b.rot90(1, (2, 3))]):
        assert float(loss(gram_matrices, same, [a, b])) < 1e-20
    swapped = [a[:, [1, 0, 2]], b]
    assert float(loss(gram_matrices, swapped, [a, b])) > 0.01
    assert float(loss(gram_matrices, swapped, [a[:, [1, 0, 2]], b])) == 0


def test_value_by_hand():
    first, second = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 1, 1), 3.0)
    assert gram(first, second).tolist() == [[[6.0]]]
    zeros = [torch.zeros_like(first), torch.zeros_like(second)]
    assert float(loss(gram_matrices, [first, second], zeros)) == 36
    assert float(loss(gram_matrices, [first, second, second], [*zeros, zeros[1]])) == 36 + 81


def test_stage_1_trains_below_the_last_layer_only_and_stage_2_on_the_task_alone():
    stages = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(stages))
    student = entry("fsp")(small_cnn(), task)
    (flow, trunk), (plain, _) = stages
    assert {id(p) for p in trunk} == {id(p) for p in student[:6].parameters()}
    assert flow(student, next(iter(task.train)), 0.0).keys() == {"flow"}
    assert plain is None


def test_stage_1_brings_the_flow_nearer_and_leaves_the_head():
    task = small_task()
    teacher = fit(small_cnn(), task, epochs=6, lr=0.01).eval()
    start = small_cnn()

    def gap(model):
        model.eval()
        with torch.no_grad():
            sides = [[m[:3](task.valid.x), m[:6](task.valid.x)] for m in (model, teacher)]
            return float(loss(gram_matrices, *sides))

    options = {"flow_epochs": 20, "flow_lr": 0.01}
    taught = entry("fsp")(copy.deepcopy(start), small_task(teacher=teacher), epochs=0, **options)
    assert gap(taught) < 0.5 * gap(start)
    assert torch.equal(taught[8].weight, start[8].weight)
    assert evaluate(entry("fsp")(start, small_task(teacher=teacher), epochs=8, lr=0.01, **options), task).value >= 0.9


def test_one_layer_gives_no_matrix():
    one = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(BadOption, match="pass pairs= with more layers"):
        entry("fsp")(one, small_task(teacher=one.__class__(*copy.deepcopy(list(one)))), flow_epochs=1)
