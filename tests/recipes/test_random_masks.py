"""Anwar and Sung 2016: the best of N random masks; more are never worse; all of them is exhaustive search."""

import copy
import math

import pytest
import torch
from test_network_slimming import Residual
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, bake, mask_of
from featherweight.core.study import Study
from featherweight.core.task import Metric, evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.random_masks import quality, subsets, without

masks = entry("random_masks")
NOW = {"finetune": 0, "round_to": 1, "calibration_batches": 3}


def trained(model):
    torch.manual_seed(0)
    return fit(model, small_task(), epochs=4, lr=1e-2)


def accuracy(model, task):
    return quality(Study(model, task, ["0"], 3))


def test_subsets_are_different_and_all_of_them_where_there_are_few():
    assert len({tuple(one.tolist()) for one in subsets(10, 4, 50)}) == 50
    assert len(subsets(6, 3, 1000)) == math.comb(6, 3)
    assert all(len(one.unique()) == 4 for one in subsets(10, 4, 50))


def test_more_trials_are_never_worse_and_better_on_average():
    task, start, found = small_task(), trained(small_cnn()), {1: [], 4: [], 16: []}
    for seed in range(3):
        for trials, kept in found.items():
            torch.manual_seed(seed)  # the first masks of many are those of few
            model = copy.deepcopy(start)
            masks(model, task, prune_ratio=0.5, trials=trials, where="3", **NOW)
            kept.append(accuracy(model, task))
    for few, many in ((1, 4), (4, 16)):
        assert all(b >= a for a, b in zip(found[few], found[many], strict=True))
    assert sum(found[16]) > sum(found[1])


def test_with_all_subsets_it_is_exhaustive_search():
    task, model = small_task(), trained(small_cnn())
    study = Study(model, task, ["0"], 3)
    ids, none = study.channels().outputs["0"], torch.empty(0, dtype=torch.long)
    best = max(without(study, none, ids[mask]) for mask in subsets(8, 3, 56))
    masks(model, task, prune_ratio=0.38, trials=56, where="0", **NOW)
    assert model[0].out_channels == 5
    assert accuracy(model, task) == best


def test_what_was_chosen_with_gates_is_what_the_smaller_network_does():
    task, model = small_task(), trained(small_cnn())
    seen = []

    def watched(output, target):
        right = (output.argmax(1) == target).float()
        seen.append(float(right.sum()))
        return right

    metric = Metric("accuracy", per_sample=watched)
    masks(model, small_task(metric=metric), prune_ratio=0.5, trials=3, where="3", **NOW)
    tries = [sum(seen[i : i + 3]) / 96 for i in range(0, 9, 3)]  # three batches a trial
    assert accuracy(model, task) == pytest.approx(max(tries))


def test_the_next_layer_is_chosen_with_the_earlier_ones_gone_and_coupled_layers_go_as_one():
    torch.manual_seed(0)
    model = Residual()
    masks(model, small_task(), prune_ratio=0.5, trials=2, **NOW)
    assert {model.stem[0].out_channels, model.blocks[0][3].out_channels, model.fc.in_features} == {4}
    assert {block[0].out_channels for block in model.blocks} == {8}


def test_kernels_are_masked_exactly_and_both_combine():
    task, model = small_task(), trained(small_cnn())
    weight = model[3].weight.detach().clone()
    masks(model, task, grain="kernel", sparsity=0.4, trials=3, **NOW)
    keep = mask_of(model[3])
    kernels = keep.flatten(2)
    assert torch.equal(kernels.any(2), kernels.all(2)), "whole kernels"
    assert int((~kernels.any(2)).sum()) == int(0.4 * 128)
    assert torch.equal(model[3].weight[keep], weight[keep])
    assert mask_of(model[8]) is None

    both = trained(small_cnn())
    masks(both, task, grain="both", prune_ratio=0.5, sparsity=0.25, trials=3, finetune=2, round_to=1)
    assert (both[0].out_channels, both[3].out_channels) == (4, 8)
    assert int((bake(both)[3].weight.flatten(2).abs().sum(2) == 0).sum()) == 8


def test_earlier_masks_stand():
    model = trained(small_cnn())
    first = torch.rand(16, 8, 3, 3) > 0.3
    attach(model[3], Mask(first))
    masks(model, small_task(), grain="kernel", sparsity=0.3, trials=2, **NOW)
    assert bool((mask_of(model[3]) <= first).all())


def test_an_error_to_minimise_is_minimised_and_training_recovers():
    error = Metric("error", per_sample=lambda o, t: (o.argmax(1) != t).float(), higher_is_better=False)
    task, model = small_task(metric=error), trained(small_cnn())
    before = evaluate(model, task).value
    masks(model, task, prune_ratio=0.5, trials=8, finetune=12, lr=1e-2, round_to=1)
    assert evaluate(model, task).value <= before + 0.1


def test_nothing_to_choose_among_is_said():
    with pytest.raises(BadOption, match="choose a method that masks weights"):
        masks(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), small_task(), **NOW)
    with pytest.raises(BadOption, match="no layer that was chosen is a convolution"):
        masks(small_mlp(), small_task(), grain="kernel", **NOW)
    with pytest.raises(CompressionError, match="none of"):
        masks(small_cnn(), small_task(), prune_ratio=0.05, **NOW)
    assert channel_groups(small_cnn(), small_task().inputs()).count == 24
