"""The training loop: equal steps for every process, and the modes of the modules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import small_cnn, small_task
from featherweight.core import processes
from featherweight.core.fit import _batches, fit
from featherweight.core.forms import Mask, activation_form, attach
from featherweight.core.task import Task
from featherweight.errors import BadData
from featherweight.ingredients.grid.lsq import LearnedActivations


def taken(batches, total, count):
    found = []
    for i in range(count):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(processes, "count", lambda: count)
            patched.setattr(processes, "index", lambda i=i: i)
            found.append(list(_batches(batches, total, None)))
    return found


@given(length=st.integers(1, 9), count=st.integers(1, 4), data=st.data())
def test_every_process_takes_equally_many_steps(length, count, data):
    if length < count:
        return
    total = data.draw(st.integers(1, 4 * length))
    found = taken(range(length), total, count)
    steps = [[(index, epoch) for index, epoch, _ in mine] for mine in found]
    assert all(s == steps[0] for s in steps)
    assert steps[0]
    assert all(index < total for index, _ in steps[0])
    for parts in zip(*found, strict=True):
        assert [batch for _, _, batch in parts] == list(range(parts[0][2], parts[0][2] + count))


def test_two_processes_drop_the_odd_batch():
    found = taken("abc", 6, 2)
    assert [[(epoch, batch) for _, epoch, batch in mine] for mine in found] == [
        [(0, "a"), (1, "a")],
        [(0, "b"), (1, "b")],
    ]


def test_one_process_takes_everything():
    (found,) = taken("abc", 7, 1)
    assert found == [(i, i // 3, "abc"[i % 3]) for i in range(7)]


def test_too_few_batches_for_the_processes():
    with pytest.raises(BadData, match="epoch 0 has 1 training batches for 2 processes"):
        taken("a", 4, 2)


def test_data_that_end_after_one_pass():
    with pytest.raises(BadData, match="epoch 1 has 0 training batches"):
        taken(iter("ab"), 4, 1)


def modes(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


def test_a_frozen_batch_norm_stays_frozen():
    model = small_cnn().train()
    model[1].eval()
    before, mean, other = modes(model), model[1].running_mean.clone(), model[4].running_mean.clone()
    fit(model, small_task(), epochs=1)
    assert modes(model) == before
    assert torch.equal(model[1].running_mean, mean)
    assert not torch.equal(model[4].running_mean, other)


def test_a_model_in_evaluation_mode_trains_as_a_whole_and_comes_back_as_it_was():
    model = small_cnn().eval()
    model[4].train()
    attach(model[0], Mask(torch.ones(8, 1, 3, 3)))
    statistics = [model[i].running_mean.clone() for i in (1, 4)]
    fit(model, small_task(), epochs=1)
    assert not any(torch.equal(model[i].running_mean, old) for i, old in zip((1, 4), statistics, strict=True))
    assert [path for path, m in model.named_modules() if m.training] == ["4"]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_leaves_what_forms_train_of_their_own_alone(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    attach(model[0], LearnedActivations(0.5, 0, 255), "input")
    data = [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))] * 4
    before = model[0].weight.detach().clone()
    fit(model, Task(train=data, valid=data), epochs=1, lr=0.1, optimizer=name)
    assert float(model[0].weight.detach().norm()) < float(before.norm()), "weights decay"
    assert float(activation_form(model[0], "input").step.detach()) == 0.5
