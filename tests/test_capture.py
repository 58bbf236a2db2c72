"""One layer's inputs and outputs: the pairs that a layer-wise reconstruction learns from."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_mlp, small_task
from featherweight.core.capture import layer_io, observe


def test_symmetric_pairs_are_what_the_layer_takes_and_gives():
    model, task = small_mlp(), small_task()
    pairs = list(layer_io(model, "3", task, task.train))
    assert [(tuple(a.shape), tuple(b.shape)) for a, b in pairs] == [((32, 32), (32, 4))] * 3
    for (x, _), (seen, output) in zip(task.train, pairs, strict=True):
        torch.testing.assert_close(seen, model[:3](x))
        torch.testing.assert_close(output, model(x))
        assert not seen.requires_grad


def test_asymmetric_pairs_go_from_the_compressed_prefix_to_the_original_output():
    original, task = small_mlp(), small_task()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model[1].weight.mul_(0.5)
    pairs = list(layer_io(model, "3", task, task.train, original=original))
    for (x, _), (seen, output) in zip(task.train, pairs, strict=True):
        torch.testing.assert_close(seen, model[:3](x))
        torch.testing.assert_close(output, original(x))
        assert not torch.allclose(model(x), output)


def test_what_comes_after_the_layer_does_not_run_and_no_hook_or_mode_stays():
    model, task = nn.Sequential(*small_mlp(), nn.Dropout()).train(), small_task()
    later = []
    model[4].register_forward_hook(lambda *_: later.append(1))
    list(layer_io(model, "1", task, task.train))
    assert not later
    assert not model[1]._forward_hooks
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(("at", "widths"), [("input", (64, 32)), ("output", (32, 4))])
def test_observing_many_layers_takes_one_pass(at, widths):
    model, task, seen = small_mlp(), small_task(), []
    count = observe(model, ["1", "3"], task, task.train, lambda path, value: seen.append((path, *value.shape)), at=at)
    assert count == 3
    assert seen == [("1", 32, widths[0]), ("3", 32, widths[1])] * 3
