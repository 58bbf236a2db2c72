"""Shares of the gradient: where all terms meet, as often as was promised, and nothing about the training changes."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import attach
from featherweight.core.ledger import recording
from featherweight.core.shares import POINTS
from featherweight.ingredients.grid.dorefa import DoReFaGradient


def table(model: nn.Module, task: fw.Task, step, **options):
    with recording() as ledger:
        fit(model, task, step=step, **options)
    (found,) = ledger.tables["gradient_shares"]
    return found


def test_shares_are_those_of_the_gradients_at_the_last_weight_that_all_terms_reach():
    model, task = small_mlp(), small_task()
    x, _ = next(iter(task.train))
    first = model[1].weight

    def step(net, batch, progress):
        hidden = net[1](batch[0].flatten(1))
        return {"hidden": 3 * hidden.square().mean(), "logits": net[3](hidden.relu()).square().mean()}

    hidden = first @ x.flatten(1).T + model[1].bias[:, None]
    logits = model[3].weight @ hidden.relu() + model[3].bias[:, None]
    norms = [
        torch.autograd.grad(t, first, retain_graph=True)[0].norm()
        for t in (3 * hidden.square().mean(), logits.square().mean())
    ]
    found = table(model, task, step, epochs=1)
    assert found["at"] == "1.weight", "the second layer knows nothing of the first term"
    assert found["points"][0]["shares"] == pytest.approx([float(n / sum(norms)) for n in norms], rel=1e-4)
    assert found["points"][0]["progress"] == 0


def test_measured_as_often_however_long_the_training_is():
    task = small_task()
    long = replace(task, train=Batches(task.train.x, task.train.y, 1))
    for epochs, steps in ((1, 96), (3, 288)):
        found = table(small_mlp(), long, lambda n, b, p: {"a": n(b[0]).mean(), "b": n(b[0]).var()}, epochs=epochs)
        assert len(found["points"]) == POINTS, steps
        assert found["points"][-1]["progress"] > 0.95
    assert len(table(small_mlp(), task, lambda n, b, p: {"a": n(b[0]).mean(), "b": n(b[0]).var()}, epochs=1)) == 4


def test_terms_that_come_later_or_have_no_gradient_and_layers_that_share_nothing():
    task, halves = small_task(), nn.ModuleList([nn.Linear(64, 4), nn.Linear(64, 4)])

    def apart(net, batch, progress):
        x = batch[0].flatten(1)
        terms = {"one": net[0](x).square().mean(), "two": net[1](x).square().mean()}
        return {**terms, "fixed": torch.ones(()), **({"late": terms["one"] * 2} if progress > 0.5 else {})}

    found = table(halves, task, apart, epochs=2)
    assert found["at"] == "all parameters"
    assert found["terms"] == ["one", "two", "late"]
    assert found["points"][0]["shares"][2] is None
    assert found["points"][-1]["shares"][2] > 0


@pytest.mark.parametrize("rounded", [False, True])
def test_looking_changes_nothing(rounded):
    """Not even where gradients are rounded at random."""
    task, students = small_task(teacher=small_cnn().eval()), [small_mlp()]
    if rounded:
        attach(students[0][1], DoReFaGradient(3), "grad")
    students.append(copy.deepcopy(students[0]))
    torch.manual_seed(1)
    entry("kd")(students[0], task, epochs=2)
    torch.manual_seed(1)
    with recording() as ledger:
        entry("kd")(students[1], task, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True))
    assert "gradient_shares" in ledger.tables


def test_a_report_holds_and_draws_them(tmp_path):
    task, options = small_task(), {"hint_epochs": 1, "epochs": 1}
    fw.compress(
        small_cnn(), task, [("fitnets", options), ("kd", {"epochs": 1})], out=tmp_path, measure=False, onnx=False
    )
    report = json.loads((tmp_path / "report.json").read_text())
    (guided,), (taught,) = (stage["tables"]["gradient_shares"] for stage in report["stages"])
    assert guided["terms"] == taught["terms"] == ["labels", "softened"]
    page = (tmp_path / "report.html").read_text()
    assert 'data-figure="stages.1.tables.gradient_shares.0.points.0.shares.1"' in page
    assert page.count('<figure class="chart shares">') == 2
