"""Li and Hoiem 2016: nothing is forgotten at the start, fine-tuning without the old term, less forgotten with it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import Task
from featherweight.errors import BadData, BadOption
from featherweight.recipes.lwf import widen
from matches import watched


def old_and_new():
    """Classes 0 to 3, and 4 to 7: other patterns, laid over the old ones, so that old answers mean something."""
    generator = torch.Generator().manual_seed(1)
    centres, y = torch.randn(8, 1, 8, 8, generator=generator), torch.arange(256) % 4
    noise = 0.5 * torch.randn(2, 256, 1, 8, 8, generator=generator)
    beneath = torch.randint(0, 4, (256,), generator=generator)
    old, new = Batches(centres[y] + noise[0], y), Batches(0.7 * centres[beneath] + centres[4 + y] + noise[1], 4 + y)
    return Task(train=old, valid=old), Task(train=new, valid=new)


def accuracy(model, task, old):
    """Of the outputs of one task."""
    with torch.no_grad():
        out = model.eval()(task.valid.x)
    part = out[:, :4] if old else out[:, 4:]
    return float((part.argmax(1) + (0 if old else 4) == task.valid.y).float().mean())


def test_old_outputs_are_what_they_were_when_the_joint_training_starts():
    old, new = old_and_new()
    teacher = fit(small_cnn(), old, epochs=4, lr=0.01).eval()
    starts = []

    def watching(model, task, **options):
        starts.append((copy.deepcopy(model), options["step"]))
        return fit(model, task, **options)

    entry("lwf")(
        copy.deepcopy(teacher), replace(new, teacher=teacher, fit=watching), new_classes=4, warm_up=2, epochs=1
    )
    (_, _), (joint, step) = starts
    with torch.no_grad():
        assert torch.equal(joint.eval()(new.valid.x)[:, :4], teacher(new.valid.x))
    terms = step(joint, next(iter(new.train)), 0.0)
    assert abs(float(terms["old"].detach())) < 1e-6
    assert not torch.equal(joint[8].weight[4:], starts[0][0][8].weight[4:]), "the new outputs were warmed up"
    assert torch.equal(joint[1].running_mean, teacher[1].running_mean)


def test_without_the_old_term_it_is_fine_tuning():
    task = small_task(teacher=small_mlp())
    start = small_mlp()
    plain = fit(copy.deepcopy(start), task, epochs=2)
    tuned = entry("lwf")(copy.deepcopy(start), task, old_weight=0.0, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), tuned.parameters(), strict=True))


def test_less_is_forgotten_than_by_fine_tuning():
    old, new = old_and_new()
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 4))  # both tasks share few features
    teacher = fit(narrow, old, epochs=10, lr=0.02).eval()
    options = {"new_classes": 4, "warm_up": 2, "epochs": 15, "lr": 0.03}
    kept = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        model = entry("lwf")(copy.deepcopy(teacher), replace(new, teacher=teacher), old_weight=weight, **options)
        kept[weight] = accuracy(model, old, old=True)
        assert accuracy(model, new, old=False) >= 0.95
    assert accuracy(teacher, old, old=True) >= 0.95
    assert kept[1.0] >= kept[0.0] + 0.1


def test_old_term_has_no_factor_of_the_temperature():
    steps = []
    task = small_task(teacher=small_mlp().eval(), fit=watched(steps))
    model = entry("lwf")(small_mlp(), task, temperature=2.0)
    x, y = next(iter(task.train))
    p, q = (task.teacher(x) / 2).softmax(1), (model(x) / 2).softmax(1)
    wanted = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(steps[0][0](model, (x, y), 0.0)["old"], wanted, rtol=1e-4, atol=1e-7)


def test_widening_keeps_the_old_outputs():
    model, x = small_mlp(), torch.randn(3, 1, 8, 8)
    before = model(x)
    widen(model, 4, 2)
    assert model(x).shape == (3, 6)
    torch.testing.assert_close(model(x)[:, :4], before)


def test_bad_input():
    with pytest.raises(BadOption, match="pass new_classes="):
        entry("lwf")(small_mlp(3), small_task(teacher=small_mlp(4)))
    with pytest.raises(BadData, match="follow those of the 4 old classes"):
        entry("lwf")(small_mlp(), small_task(teacher=small_mlp()), new_classes=4)
    conv = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    with pytest.raises(BadOption, match="no last linear layer with 4 outputs"):
        entry("lwf")(conv, small_task(teacher=small_mlp()), new_classes=4)
