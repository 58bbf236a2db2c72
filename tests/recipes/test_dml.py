"""Zhang et al. 2018: identical peers stay so if they move at once, alone it is plain training, gradients stay."""

import copy

import pytest
import torch
import torch.nn.functional as F

from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import evaluate
from featherweight.errors import BadOption
from matches import watched


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_identical_peers_stay_identical_only_if_they_move_at_once():
    for update, stays in (("simultaneous", True), ("alternating", False)):
        model = small_mlp()
        peer = copy.deepcopy(model)
        entry("dml")(model, small_task(), peers=[peer], update=update, epochs=2, lr=0.01)
        assert same(model, peer) is stays, update


def test_one_network_alone_is_plain_training():
    model = small_mlp()
    plain = fit(copy.deepcopy(model), small_task(), epochs=2)
    assert same(plain, entry("dml")(copy.deepcopy(model), small_task(), cohort=1, epochs=2))
    assert same(plain, entry("dml")(copy.deepcopy(model), small_task(), weight=0.0, epochs=2))


def test_loss_of_three_and_no_gradient_crosses():
    steps = []
    task, models = small_task(fit=watched(steps)), [small_mlp() for _ in range(3)]
    entry("dml")(models[0], task, peers=models[1:])
    x, y = next(iter(task.train))
    terms = steps[0][0](models[0], (x, y), 0.0)
    p = [m(x).softmax(1) for m in models]
    peers = sum((p[k] * (p[k] / p[0]).log()).sum(1).mean() for k in (1, 2)) / 2
    torch.testing.assert_close(terms["labels"] + terms["peers"], F.cross_entropy(models[0](x), y) + peers)
    sum(terms.values()).backward()
    assert all(q.grad is None for m in models[1:] for q in m.parameters())
    assert all(q.grad is not None for q in models[0].parameters())


def test_peers_learn_too_and_start_elsewhere():
    task, peer = small_task(), small_mlp()
    before = evaluate(peer, task).value
    model = entry("dml")(small_mlp(), task, peers=[peer], epochs=8, lr=0.01)
    assert evaluate(model, task).value >= 0.9
    assert evaluate(peer, task).value >= max(0.9, before)


def test_a_peer_that_is_the_model():
    model = small_mlp()
    with pytest.raises(BadOption, match="very model"):
        entry("dml")(model, small_task(), peers=[model])
