"""Romero et al. 2015: stage 1 touches nothing above the guided layer; a copied sub-network has no hint loss."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.errors import BadOption, UnknownName
from featherweight.ingredients.match.hint import Hint, regressor


def thin_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def test_stage_1_changes_no_layer_above_the_guided_one():
    task = small_task(teacher=small_cnn())
    start = thin_cnn()
    student = entry("fitnets")(copy.deepcopy(start), task, hint="2", guided="2", hint_epochs=2, epochs=0)
    same = {k: torch.equal(v, start.state_dict()[k]) for k, v in student.state_dict().items()}
    assert not same["0.weight"]
    assert not same["1.running_mean"]
    assert all(equal for name, equal in same.items() if int(name.split(".")[0]) > 2)


def test_identity_regressor_on_a_copied_network_has_no_loss():
    x = torch.randn(4, 8, 5, 5).relu()
    match = Hint("a", "b", x, x)
    assert match.rectified
    with torch.no_grad():
        match.regressor.weight.copy_(torch.eye(8).view(8, 8, 1, 1))
        match.regressor.bias.zero_()
        assert float(match({"a": x}, {"b": x}, None, 0.0)) == 0
        assert float(match({"a": x}, {"b": x + 1}, None, 0.0)) == pytest.approx(0.5)


def test_regressor_fits_shapes():
    conv = regressor(torch.zeros(2, 6, 9, 9), torch.zeros(2, 10, 7, 5))
    assert conv(torch.zeros(2, 6, 9, 9)).shape == (2, 10, 7, 5)
    assert conv.weight.numel() == 6 * 10 * 3 * 5
    smaller = Hint("a", "b", torch.zeros(2, 6, 4, 4), torch.zeros(2, 10, 8, 8))
    assert smaller.regressor.kernel_size == (1, 1)
    assert smaller({"a": torch.ones(2, 6, 4, 4)}, {"b": torch.ones(2, 10, 8, 8)}, None, 0.0).isfinite()
    tokens = regressor(torch.zeros(2, 5, 8), torch.zeros(2, 5, 16))
    assert tokens(torch.zeros(2, 5, 8)).shape == (2, 5, 16)
    with pytest.raises(BadOption, match="both maps"):
        regressor(torch.zeros(2, 8), torch.zeros(2, 8, 4, 4))


def test_learns_and_names_the_layers_it_chose():
    task = small_task()
    teacher = fit(small_cnn(), task, epochs=5)
    student = thin_cnn()
    before = evaluate(student, task).value
    with recording() as ledger:
        entry("fitnets")(student, type(task)(train=task.train, valid=task.valid, teacher=teacher), epochs=15, lr=1e-2)
    assert any("guides the student's layer" in text for text in ledger.notes)
    assert any("in training only" in text for text in ledger.notes)
    assert evaluate(student, task).value > before
    assert not any(isinstance(m, Hint) for m in student.modules())


def test_vectors_work_too():
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    assert evaluate(entry("fitnets")(student, small_task(teacher=small_mlp()), hint_epochs=1, epochs=1), small_task())


def test_bad_layers():
    task = small_task(teacher=small_cnn())
    with pytest.raises(UnknownName, match="teacher"):
        entry("fitnets")(thin_cnn(), task, hint="nope")
    with pytest.raises(UnknownName, match="student"):
        entry("fitnets")(thin_cnn(), task, guided="stage")
    flat = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (64,)), nn.Linear(64, 4))
    with pytest.raises(BadOption, match="no parameter"):
        entry("fitnets")(flat, small_task(teacher=small_mlp()), guided="0", hint="1")
