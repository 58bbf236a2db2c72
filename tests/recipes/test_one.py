"""Lan et al. 2018: one branch has the network's own parameters, gates add up to 1, one branch has nothing to match."""

import pytest
import torch
import torch.nn.functional as F

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.ledger import recording
from featherweight.core.peers import branch
from featherweight.core.task import evaluate
from featherweight.errors import UnknownName
from featherweight.recipes.one import Gate, mixed
from matches import watched


def test_what_comes_back_is_the_network_and_what_is_dropped_is_said():
    start = small_cnn()
    names = list(start.state_dict())
    with recording() as ledger:
        model = entry("one")(start, small_task(), epochs=1)
    assert list(model.state_dict()) == names
    branches = 2 * (8 * 16 * 9 + 32 + 16 * 4 + 4)
    gate = 8 * 3 + 3 + 6
    assert any(f"3 branches behind 2; {branches + gate:,} parameters in training only" in t for t in ledger.notes)


def test_branches_share_the_trunk_and_start_elsewhere():
    model = small_cnn()
    twin = branch(model, {id(p) for p in model[:3].parameters()})
    assert twin[0] is model[0]
    assert twin[1] is model[1]
    assert twin[3] is not model[3]
    assert not torch.equal(twin[3].weight, model[3].weight)
    assert twin[4] is not model[4]


def test_gates_add_up_to_1_and_mix_logits():
    gate = Gate(8, 3)
    for features in (torch.randn(5, 8, 4, 4), torch.randn(5, 8), torch.randn(1, 8)):
        gates = gate(features)
        torch.testing.assert_close(gates.sum(1), torch.ones(len(features)))
    logits = [torch.randn(5, 4) for _ in range(3)]
    wanted = sum(g[:, None] * z for g, z in zip(gate(torch.zeros(5, 8)).T, logits, strict=True))
    torch.testing.assert_close(mixed(gate(torch.zeros(5, 8)), logits), wanted)
    assert mixed(torch.ones(5, 1), [torch.randn(5, 4, 2, 2)]).shape == (5, 4, 2, 2)


def test_a_single_branch_has_twice_the_labels_loss_and_nothing_to_match():
    steps = []
    task = small_task(fit=watched(steps))
    model = entry("one")(small_mlp(), task, branches=1)
    x, y = next(iter(task.train))
    terms = steps[0][0](model, (x, y), 1.0)
    torch.testing.assert_close(sum(terms.values()), 2 * F.cross_entropy(model(x), y))
    assert abs(float(terms["match"].detach())) < 1e-6


def test_the_divergence_rises_and_its_teacher_is_constant():
    steps = []
    task = small_task(fit=watched(steps))
    model = entry("one")(small_mlp(), task, branches=2, ramp=0.5)
    step, params = steps[0]
    batch = next(iter(task.train))
    terms = [step(model, batch, progress)["match"] for progress in (0.0, 0.25, 0.5, 1.0)]
    values = [float(t.detach()) for t in terms]
    assert values[0] == pytest.approx(values[3] * 2.718281828**-5, rel=1e-3)
    assert values[1] == pytest.approx(values[3] * 2.718281828**-1.25, rel=1e-3)
    assert values[2] == pytest.approx(values[3])
    grads = torch.autograd.grad(terms[3], params, allow_unused=True)
    assert sum(g is None for g in grads) >= 4, "the gate learns from the labels alone"


def test_learns_and_knows_its_layers():
    task = small_task()
    assert evaluate(entry("one")(small_cnn(), task, epochs=6, lr=0.01), task).value >= 0.9
    with pytest.raises(UnknownName, match="unknown layer of the student 'x'"):
        entry("one")(small_cnn(), task, split="x")
