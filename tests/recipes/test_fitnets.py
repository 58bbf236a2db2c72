"""Romero et al. 2015: stage 1 touches nothing above the guided layer; a copied sub-network has no hint loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
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


def watched(stages):
    """A `fit` that trains nothing and keeps what each stage would minimise."""

    def fit_nothing(model, task, **options):
        stages.append((options["step"], list(options["params"])))
        return model

    return fit_nothing


def test_stage_2_minimises_the_labels_loss_and_an_annealed_divergence_of_softened_probabilities():
    stages = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(stages))
    student = entry("fitnets")(thin_cnn().eval(), task, hint="2", guided="2", temperature=3.0)
    (x, y), (step, params) = next(iter(task.train)), stages[1]
    assert {id(p) for p in params} == {id(p) for p in student.parameters()}
    with torch.no_grad():
        ours, theirs = student(x), task.teacher(x)
        labels = F.cross_entropy(ours, y)
        p, q = (theirs / 3).softmax(1), (ours / 3).softmax(1)
        divergence = (p * (p / q).log()).sum(1).mean()
        for progress, weight in ((0.0, 4.0), (0.5, 2.5), (1.0, 1.0)):
            terms = step(student, (x, y), progress)
            torch.testing.assert_close(sum(terms.values()), labels + weight * divergence, rtol=1e-4, atol=1e-6)


def test_stage_1_compares_the_student_with_the_teacher_and_nothing_else():
    stages = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(stages))
    student = entry("fitnets")(copy.deepcopy(task.teacher), task, hint="2", guided="2")
    batch, (step, params) = next(iter(task.train)), stages[0]
    weight, bias = params[-2:]
    with torch.no_grad():
        weight.copy_(torch.eye(8).view(8, 8, 1, 1))
        bias.zero_()
        assert float(sum(step(student, batch, 0.0).values())) < 1e-9
        student[1].bias += 0.5
        assert float(sum(step(student, batch, 0.0).values())) > 1e-3


def test_stage_1_brings_the_students_features_nearer_to_the_hint():
    teacher, seen = fit(small_cnn(), small_task(), epochs=3).eval(), []

    def measured_fit(model, task, **options):
        if len(seen) < 2:
            weight, bias = list(options["params"])[-2:]

            def distance():
                with torch.no_grad():
                    guess = F.conv2d(model.eval()[:3](task.valid.x), weight, bias).relu()
                    return float(F.mse_loss(guess, teacher[:3](task.valid.x)))

            seen.append(distance())
            fit(model, task, **options)
            seen.append(distance())
        return model

    task = small_task(teacher=teacher, fit=measured_fit)
    entry("fitnets")(thin_cnn(), task, hint="2", guided="2", hint_epochs=15, hint_lr=1e-2, epochs=0)
    assert seen[1] < 0.7 * seen[0]


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
