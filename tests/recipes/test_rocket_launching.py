"""Zhou et al. 2018: the hint stops at the booster, the booster drops off, and without either nets are on their own."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.recipes.rocket_launching import share
from matches import watched


def light():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 4)),
    )


def test_hint_does_not_reach_what_is_the_boosters_alone():
    steps = []
    task = small_task(teacher=small_cnn(), fit=watched(steps))
    model = entry("rocket_launching")(light(), task)
    step, params = steps[0]
    x, y = next(iter(task.train))
    terms = step(model, (x, y), 0.0)
    own = {id(p) for p in model.parameters()}
    hints = torch.autograd.grad(terms["hint"], params, allow_unused=True, retain_graph=True)
    assert all(g is None for g, p in zip(hints, params, strict=True) if id(p) not in own)
    assert all(g is not None for g, p in zip(hints, params, strict=True) if id(p) in own)
    boosts = torch.autograd.grad(terms["booster"], params, allow_unused=True)
    reached = [id(p) for g, p in zip(boosts, params, strict=True) if g is not None and id(p) in own]
    assert reached == [id(model[0].weight)], "of the light network the booster's loss reaches what is shared, no norm"


def test_value_by_hand():
    steps = []
    task = small_task(teacher=small_mlp(), fit=watched(steps))
    model = entry("rocket_launching")(small_mlp(), task, shared=0, hint=0.1)
    x, y = next(iter(task.train))
    terms = steps[0][0](model, (x, y), 0.0)
    a, b = model(x), task.teacher(x)
    torch.testing.assert_close(terms["light"], F.cross_entropy(a, y))
    torch.testing.assert_close(terms["booster"], F.cross_entropy(b, y))
    torch.testing.assert_close(terms["hint"], 0.1 * (a - b).square().sum(1).mean())


def test_without_hint_and_sharing_it_is_plain_training():
    model, task = small_mlp(), small_task(teacher=small_mlp())
    held = copy.deepcopy(task.teacher.state_dict())
    plain = fit(copy.deepcopy(model), task, epochs=2)
    alone = entry("rocket_launching")(model, task, shared=0, hint=0.0, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), alone.parameters(), strict=True))
    assert all(torch.equal(held[k], v) for k, v in task.teacher.state_dict().items()), "the booster is a copy"


def test_layers_of_other_shapes_are_not_shared():
    booster = small_cnn()
    assert share(light(), booster, 5) == ["0"]
    assert share(nn.Sequential(nn.Conv2d(1, 9, 3), nn.ReLU()), small_cnn(), 5) == []
    assert share(light(), small_cnn(), 0) == []


def test_learns_and_says_what_is_shared():
    task = small_task(teacher=small_cnn())
    with recording() as ledger:
        model = entry("rocket_launching")(light(), task, epochs=10, lr=0.01)
    assert any("light network and booster share 0; the booster" in text for text in ledger.notes)
    assert evaluate(model, task).value >= 0.9
    assert list(model.state_dict()) == list(light().state_dict())
