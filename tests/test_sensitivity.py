"""A scan of layers and ratios: what it measures is what pruning that layer alone really does; measured once."""

import copy
import json
from dataclasses import replace

import pytest
import torch

import featherweight as fw
from conftest import small_cnn, small_mlp, small_task
from featherweight.core import sensitivity as core
from featherweight.core.channels import channel_groups, remove_channels
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.forms import bake
from featherweight.core.sensitivity import Left, Row, Sensitivity
from featherweight.core.site import sites
from featherweight.core.task import evaluate
from featherweight.core.widths import Shrinking
from featherweight.ingredients.score.magnitude import magnitude
from featherweight.prune import prune, scan_channels, scan_weights
from featherweight.report.html import page
from featherweight.zoo.networks import build
from test_report import same

ALONE = {"scope": "layer", "rounds": 1, "epochs": 0, "finetune": 0}


@pytest.fixture(autouse=True)
def _forget():
    core._known.clear()


def test_a_row_is_what_masking_that_layer_alone_does():
    task = small_task()
    model = fit(small_mlp(), task, epochs=6, lr=0.01)
    before = copy.deepcopy(model.state_dict())
    found = scan_weights(model, task, sites(model), magnitude)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the model is left as it was"
    assert found.metric == evaluate(model, task).value
    for row in (r for r in found.rows if r.ratio in (0.5, 0.9)):
        alone = copy.deepcopy(model)
        prune(alone, task, sparsity=row.ratio, where=row.layer, **ALONE)
        counted = cost(bake(alone), task.inputs())
        assert row.metric == evaluate(alone, task).value
        assert (row.left.params, row.left.macs) == (counted.nonzeros, counted.macs)
    rows = [r for r in found.rows if r.layer == "1"]
    assert rows[4].left.bytes == 4 * rows[4].left.params + 2048 / 8  # half of them: a bit each
    assert rows[-1].left.units == 2176 - int(0.95 * 2048)


def test_a_row_of_channels_is_what_removing_them_costs():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=0.01)
    channels = channel_groups(model, task.inputs())
    shrinking = Shrinking(channels, torch.rand(channels.count, dtype=torch.float64), round_to=1)
    found = scan_channels(model, task, shrinking, ["0", "3"])
    row = next(r for r in found.rows if r.layer == "3" and r.ratio == 0.5)
    assert row.left.units == 24 - 8
    alone = copy.deepcopy(model)
    remove_channels(alone, shrinking.by_layer({"3": 0.5}), channels=channels)
    counted = cost(alone, task.inputs())
    assert (row.left.params, row.left.macs, row.left.bytes) == (counted.params, counted.macs, 4 * counted.params)
    assert row.metric == evaluate(alone, task).value
    assert fw.sensitivity(model, task, grain="filter", ratios=(0.5,), round_to=1).layers == ["0", "3"]


def test_coupled_layers_are_scanned_once():
    model, task = build("resnet:depth=8,width=0.5"), small_task((1, 28, 28), classes=10)
    channels = channel_groups(model, task.inputs())
    found = scan_channels(
        model, task, Shrinking(channels, torch.rand(channels.count), 1), list(channels.outputs), [0.5]
    )
    assert len(found.layers) == len(channels.groups) < len(channels.outputs)


def test_curves_never_fall_and_leave_out_what_saves_nothing():
    whole = Left(10, 100, 1000, 400)
    rows = [(0.1, 0.95, 10), (0.2, 0.85, 8), (0.3, 0.88, 8), (0.4, 0.90, 6), (0.5, 0.5, 4)]
    found = Sensitivity(
        "accuracy", 0.9, True, whole, tuple(Row("a", r, m, replace(whole, units=u)) for r, m, u in rows)
    )
    curve = found.curves()["a"]
    assert curve.ratios == (0.0, 0.2, 0.4, 0.5)
    assert curve.drops == pytest.approx((0.0, 0.05, 0.05, 0.4))
    assert curve.saved == pytest.approx((0.0, 0.2, 0.4, 0.6))
    error = replace(found, higher_is_better=False)
    assert error.curves()["a"].drops == pytest.approx((0.0, 0.0, 0.0, 0.0))
    assert found.curves("macs")["a"].ratios == (0.0,)


def test_it_is_measured_once_for_the_same_weights_data_and_scores(monkeypatch):
    task = small_task()
    model = fit(small_mlp(), task, epochs=2, lr=0.01)
    count = []
    monkeypatch.setattr(core, "evaluate", lambda *a, **o: count.append(1) or evaluate(*a, **o))
    first = fw.sensitivity(model, task, score="magnitude")
    measured = len(count)
    assert measured == 1 + 2 * len(core.RATIOS)
    assert scan_weights(copy.deepcopy(model), task, sites(model), magnitude) is first
    prune(copy.deepcopy(model), task, sparsity=0.8, allocation="layer_sensitivity", **ALONE)
    prune(copy.deepcopy(model), task, sparsity=0.6, allocation="budget_knapsack", **ALONE)
    assert len(count) == measured
    scan_weights(model, task, sites(model), lambda site: -magnitude(site))
    assert len(count) == 2 * measured, "other scores"
    scan_weights(model, replace(task, valid=task.train), sites(model), magnitude)
    assert len(count) == 3 * measured, "other data"
    with torch.no_grad():
        model[1].bias.add_(1)
    scan_weights(model, task, sites(model), magnitude)
    assert len(count) == 4 * measured, "other weights"


def test_the_run_keeps_it_and_the_page_draws_it(tmp_path):
    task = small_task()
    model = fit(small_cnn(), task, epochs=4, lr=0.01)
    options = {"finetune": 0, "round_to": 1, "onnx": False}
    result = fw.compress(model, task, "pfec_l1", allocation="layer_sensitivity", out=tmp_path, **options)
    table = json.loads((tmp_path / "report.json").read_text())["stages"][0]["tables"]["sensitivity"]
    assert [row["path"] for row in table["layers"]] == ["0", "3"]
    html = page(result.report)
    assert same(html, result.report) > 80
    assert "Sensitivity of layers" in html
    for layer in range(2):
        assert f'data-figure="stages.0.tables.sensitivity.layers.{layer}.chosen"' in html
    plain = fw.compress(model, task, "pfec_l1", measure=False, **options)
    assert "Sensitivity of layers" not in page(plain.report)
