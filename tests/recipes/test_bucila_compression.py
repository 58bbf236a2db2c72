"""Bucila et al. 2006: what MUNGE keeps of the data, and made-up data near them are worth more than noise."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.ensemble import Ensemble
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData
from featherweight.recipes.bucila_compression import munge, neighbours


def test_neighbours_are_the_nearest_others():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.5], [0.9]])
    assert neighbours(x).tolist() == [4, 4, 3, 2, 1]
    assert torch.equal(neighbours(torch.randn(30, 4), chunk=7), neighbours(torch.randn(30, 4), chunk=7)) is False
    y = torch.randn(30, 4)
    assert torch.equal(neighbours(y, chunk=7), neighbours(y, chunk=100))


def test_nothing_is_redrawn_without_a_probability_and_everything_swapped_with_it():
    x = torch.randn(40, 3, 2)
    assert torch.equal(munge(x, 0.0, 2.0), x)
    swapped = munge(x, 1.0, 1e12)
    assert not torch.allclose(swapped, x)
    torch.testing.assert_close(swapped.flatten(1).sort(0).values, x.flatten(1).sort(0).values, rtol=1e-5, atol=1e-6)


def test_mean_and_covariance_stay_close():
    mixing = torch.tensor([[2.0, 0.0], [1.5, 0.5]])
    x = torch.randn(600, 2) @ mixing.T + torch.tensor([3.0, -1.0])
    made = munge(x, 0.5, 3.0)
    torch.testing.assert_close(made.mean(0), x.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(made.T.cov(), x.T.cov(), rtol=0.1, atol=0.05)
    assert not torch.equal(made, x)


def test_made_up_data_are_worth_more_than_noise():
    task = small_task()
    teacher = Ensemble([fit(small_cnn(), task, epochs=6, lr=0.01) for _ in range(2)])
    few = Task(train=Batches(task.train.x[:24], task.train.y[:24], 12), valid=task.valid, teacher=teacher)
    start = small_mlp()
    options = {"copies": 4, "real": False, "epochs": 6, "lr": 0.01}
    with recording() as ledger:
        made = entry("bucila_compression")(copy.deepcopy(start), few, **options)
    low, high = task.train.x.amin(), task.train.x.amax()
    noise = low + (high - low) * torch.rand_like(task.train.x[:24])
    noisy = replace(few, train=Batches(noise, few.train.y, 12))
    random = entry("bucila_compression")(
        copy.deepcopy(start), noisy, **options | {"copies": 4, "real": True, "swap": 0.0}
    )
    assert any("96 inputs made from 24, labelled by 2 network(s)" in text for text in ledger.notes)
    assert evaluate(made, task).value >= max(0.9, evaluate(random, task).value)


class Two(nn.Module):
    def forward(self, a, b):
        return torch.cat([a, b], 1)


def test_several_inputs():
    x = torch.randn(8, 2)
    task = Task(train=[(x, x, torch.zeros(8).long())], valid=[], teacher=Two())
    with pytest.raises(BadData, match="one input of real numbers"):
        entry("bucila_compression")(Two(), task)
