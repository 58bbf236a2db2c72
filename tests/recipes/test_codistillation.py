"""Anil et al. 2018: mutual learning where checkpoints are fresh and data shared, nothing without them, and shards."""

import copy

import pytest
import torch

from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import evaluate
from featherweight.errors import BadData
from featherweight.recipes.codistillation import Shard, mean_logits

SGD = {"optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr), "lr": 0.1, "epochs": 2}


def close(a, b):
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def drawn(name, **options):
    """The model after training; its peers start from the same draws."""
    torch.manual_seed(1)
    model = small_mlp()
    torch.manual_seed(2)
    return entry(name)(model, small_task(), **SGD, **options)


def test_fresh_checkpoints_of_shared_data_are_simultaneous_mutual_learning():
    ours = drawn("codistillation", exchange=1, burn_in=0.0, disjoint=False)
    assert close(ours, drawn("dml", update="simultaneous"))
    assert not close(ours, drawn("dml", weight=0.0))
    assert not close(ours, drawn("codistillation", exchange=4, burn_in=0.0, disjoint=False))


def test_no_weight_or_a_burn_in_without_end_leaves_networks_on_their_own():
    alone = drawn("dml", weight=0.0)
    assert close(alone, drawn("codistillation", weight=0.0, disjoint=False))
    assert close(alone, drawn("codistillation", burn_in=1.0, disjoint=False))


def test_shards_share_no_batch_and_together_are_all():
    shards = [list(Shard(range(7), i, 3)) for i in range(3)]
    assert shards == [[0, 3, 6], [1, 4], [2, 5]]


def test_mean_of_probabilities():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(mean_logits([a, b]).softmax(1), (a.softmax(1) + b.softmax(1)) / 2)


def test_learns_what_its_own_shard_alone_holds_and_more():
    task = small_task()
    model = entry("codistillation")(small_mlp(), task, exchange=2, epochs=10, lr=0.01)
    assert evaluate(model, task).value >= 0.9


def test_two_trainings_disagree_less_than_on_their_own():
    task = small_task()

    def churn(train):
        a, b = (train()(task.valid.x).softmax(1).detach() for _ in range(2))
        return float((a - b).abs().sum(1).mean())

    alone = churn(lambda: fit(small_mlp(), task, epochs=2, lr=0.01))
    options = {"epochs": 2, "lr": 0.01, "exchange": 1, "burn_in": 0.0, "disjoint": False, "copies": 4, "weight": 3.0}
    assert churn(lambda: entry("codistillation")(small_mlp(), task, **options)) < alone


def test_fewer_batches_than_copies():
    with pytest.raises(BadData, match="3 training batches make no 4 shards"):
        entry("codistillation")(copy.deepcopy(small_mlp()), small_task(), copies=4)
