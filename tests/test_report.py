"""The page of a report, without a browser: its figures are the report's, and text from a run stays text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import featherweight as fw
from conftest import small_cnn, small_mlp, small_task
from featherweight import anatomy, recipe_text, report
from featherweight.cli import app
from featherweight.core.task import evaluate
from featherweight.errors import BadData
from featherweight.report.reproduce import call, command, recipe, start
from featherweight.report.source import NONE, Source
from reports import figure, synthetic

MEGABYTE = 10**6


class Page(HTMLParser):
    """What the tests ask of a page: its figures, its tags, its ids, its text."""

    VOID = frozenset({"meta", "link", "br", "line", "circle", "path", "i"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[tuple[str, float | None, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.tags.append((tag, held))
        if "data-figure" in held:
            value = held.get("data-value")
            self.figures.append((held["data-figure"] or "", None if value is None else float(value), ""))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.figures and self.figures[-1][2] == "":
            self.figures[-1] = (*self.figures[-1][:2], data)

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (held for found, held in self.tags if found == tag)

    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def same(page: str, run: dict) -> int:
    """Asserts that every figure of a page is what its source says; returns how many there are."""
    figures = Page(page).figures
    for source, value, text in figures:
        assert value == figure(run, source), source
        assert (text == NONE) == (value is None), source
    return len(figures)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    model, task = small_cnn(), small_task()
    fw.fit(model, task, epochs=1, lr=0.01)
    chain = [("magnitude_iterative", {"sparsity": 0.5, "epochs": 1}), ("kmeans_share", {"weight_bits": 3, "epochs": 0})]
    result = fw.compress(model, task, chain, out=folder, until="size<=0.4x", guard="drop<=99pt", onnx=False)
    return result, folder


def test_the_figures_of_a_real_run_are_those_of_its_report(ran):
    result, folder = ran
    page = (folder / "report.html").read_text()
    assert same(page, json.loads((folder / "report.json").read_text())) > 80
    told = Page(page).text()
    assert "Budget met" in told
    for layer in result.report["layers"]:
        assert layer["path"] in told
    for stage in result.report["stages"]:
        assert stage["method"] in told


def test_a_run_measures_what_the_page_shows_of_its_layers(ran):
    layers = {row["path"]: row for row in ran[0].report["layers"]}
    conv = layers["3"]
    assert conv["histogram"]["zeros"] + sum(conv["histogram"]["bins"]) == conv["histogram"]["count"] == 16 * 8 * 9
    assert conv["histogram"]["zeros"] == conv["params"] - conv["nonzeros"]
    assert conv["histogram"]["distinct"] <= 9
    assert conv["original"]["histogram"]["low"] == conv["histogram"]["low"]
    for side in ("result", "original"):
        rows = [row if side == "result" else row["original"] for row in layers.values()]
        told = sum(row["latency_share"] or 0.0 for row in rows) + ran[0].report["profile"][side]["elsewhere"]
        assert told == pytest.approx(1)
    limits = ran[0].report["budget"]["limits"]
    assert [limit["text"] for limit in limits] == ["size<=0.4x", "drop<=99pt"]
    assert limits[0]["reached"] == ran[0].report["result"]["bytes"] <= limits[0]["allowed"]
    assert ran[0].report["base"]["metric"] == pytest.approx(ran[0].report["original"]["metric"], abs=0.2)


def test_layers_that_changed_their_kind_are_accounted_for(tmp_path):
    """Scales of activations count with their layer, folded norms are told as gone, the class keeps its name."""
    torch.manual_seed(0)
    model, task = small_cnn(), small_task()
    result = fw.compress(model, task, "int8", out=tmp_path, onnx=False, without_class=True)
    layers = {row["path"]: row for row in result.report["layers"]}
    assert layers.keys() <= dict(result.model.named_modules()).keys()
    sizes = [row["coded_bytes"] for row in layers.values()]
    tensors = fw.inspect(tmp_path / "model.fw")["tensors"]
    assert any("/input/" in row["name"] for row in tensors)
    assert sum(sizes) == pytest.approx(result.report["result"]["size"]["weights"], abs=len(tensors))
    assert [row["path"] for row in result.report["layers_gone"]] == ["1", "4"]
    assert result.report["layers_gone"][0]["histogram"]["count"] == 8
    told = Page((tmp_path / "report.html").read_text()).text()
    assert told.startswith("Sequential, ")
    assert "1 BatchNorm2d 16 0 folded into its neighbour or removed" in told
    for layer, why in result.report["stages"][0]["skipped"].items():
        assert layer in told
        assert why in told


def test_save_and_report_html_write_the_same_page(ran, tmp_path):
    result, folder = ran
    saved = result.save(tmp_path / "saved")
    assert result.report_html(tmp_path / "one.html") == tmp_path / "one.html"
    page = (tmp_path / "one.html").read_text()
    assert page == (saved / "report.html").read_text() == (folder / "report.html").read_text()


def test_the_command_rewrites_the_page_from_the_report_alone(ran, tmp_path):
    (tmp_path / "report.json").write_text((ran[1] / "report.json").read_text())
    told = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert told.exit_code == 0, told.output
    assert (tmp_path / "report.html").read_text() == (ran[1] / "report.html").read_text()
    both = tmp_path / "both.html"
    assert CliRunner().invoke(app, ["report", str(tmp_path), str(ran[1]), "--out", str(both)]).exit_code == 0
    read = json.loads((tmp_path / "report.json").read_text())
    assert same(both.read_text(), {"a": read, "b": read}) > 80
    with pytest.raises(BadData, match=r"there is no report\.json"):
        CliRunner().invoke(app, ["report", str(tmp_path / "none")], catch_exceptions=False)
    with pytest.raises(BadData, match="cannot be written"):
        report.write("", tmp_path / "none" / "page.html")


def test_every_figure_of_a_large_report_and_its_size():
    run = synthetic(300)
    page = report.page(run)
    assert same(page, run) > 300 * 9
    assert len(page.encode()) < 6 * MEGABYTE
    folded = page[page.index("The other 276 layers") :]
    assert folded.count('class="hist"') == 276


def test_a_comparison_tells_what_differs_and_joins_layers_by_name():
    first, second = synthetic(4), synthetic(6)
    second["seed"], second["chain"][0][1] = 8, {"rate": 0.75}
    page = report.comparison(first, second, ("one", "two"))
    assert same(page, {"a": first, "b": second}) > 100
    told = Page(page).text()
    assert "seed 7 8" in told
    assert "method_0 rate=0.5 epochs=0 method_0 rate=0.75" in told
    assert re.findall(r'data-figure="([ab])\.layers\.5\.params"', page) == ["b"]
    assert page.count("no such layer") == 2 * 5, "A has no fifth and no sixth layer"


# --- what may be wrong with a report ----------------------------------------------------------------------------------

EVIL = '<script>alert("x")</script>&amp;\'"'


def test_text_of_a_run_is_text():
    run = synthetic(3, names=EVIL)
    run["source"]["model"] = run["stages"][0]["method"] = run["chain"][0][0] = EVIL
    run["stages"][0] |= {"notes": [EVIL], "options": {EVIL: EVIL}, "skipped": {EVIL: EVIL}}
    run["stages"][-1]["why"] = run["onnx"]["why"] = run["environment"]["python"] = EVIL
    run["budget"]["limits"][0]["text"] = run["result"]["metric_detail"]["name"] = EVIL
    run["layers"][0]["type"] = EVIL
    run["remarks"], run["file"] = [EVIL], {"class_free": False, "why": EVIL}
    run["reproduce"]["recipe"] = {"model": EVIL}
    for page in (report.page(run), report.comparison(run, run, (EVIL, EVIL))):
        held = Page(page)
        assert len(list(held.all("script"))) == 1, "the page's own"
        assert EVIL in " ".join(held.texts)
        assert not any(key.startswith("on") for _, attributes in held.tags for key in attributes)


def test_a_layer_named_like_a_tag_goes_through_a_whole_run(tmp_path):
    model = nn.Sequential()
    model.add_module("flat", nn.Flatten())
    model.add_module("<script>", nn.Linear(64, 4))
    options = {"sparsity": 0.5, "epochs": 0}
    fw.compress(model, small_task(), "magnitude_iterative", out=tmp_path, onnx=False, **options)
    page = Page((tmp_path / "report.html").read_text())
    assert len(list(page.all("script"))) == 1
    assert "<script>" in " ".join(page.texts)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, "many", True, [], {}])
def test_what_is_no_number_is_not_measured(bad):
    run = synthetic(2)
    run["result"]["macs"] = run["layers"][0]["coded_bytes"] = run["stages"][0]["metric"] = bad
    run["latency"][1]["median"] = run["layers"][1]["histogram"]["bins"] = bad
    page = report.page(run)
    same(page, run)
    assert NONE in Page(page).text()
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", Page(page).text())


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_reports_of_earlier_versions_say_what_is_missing(kept):
    run = synthetic(2)
    later = ("base", "accepted", "profile", "sensitivity", "layers_gone")
    for key in later if kept < 2 else ():
        del run[key]
    if kept == 0:
        run = {key: run[key] for key in ("original", "result", "onnx", "split", "stages")}
    if kept == 1:
        del run["budget"]["limits"], run["layers"][0]["histogram"], run["stages"][0]["metric_detail"]
        run["budget"] |= {"reached": False, "binds": ["size is 0.6x, size<=0.5x was asked"]}
    page = report.page(run)
    same(page, run)
    told = Page(page).text()
    assert ("Not in this report" in told) == (kept < 2)
    if kept == 1:
        assert "Budget missed" in told
        assert "✗ missed size<=0.5x" in told
        assert "✓ held drop<=1pt" in told


def test_every_entry_may_be_absent_or_of_another_kind():
    run = synthetic(2)
    for key in run:
        for wrong in (None, 3, "text", [1], {"a": 1}):
            changed = {**run, key: wrong}
            same(report.page(changed), changed)
        rest = {k: v for k, v in run.items() if k != key}
        same(report.comparison(rest, run), {"a": rest, "b": run})


def test_measuring_off_still_gives_a_page(tmp_path):
    result = fw.compress(
        small_mlp(),
        small_task(),
        "magnitude_iterative",
        sparsity=0.5,
        epochs=0,
        measure=False,
        onnx=False,
        out=tmp_path,
    )
    assert result.report["layers"] == []
    assert "Not in this report" in Page((tmp_path / "report.html").read_text()).text()


# --- the page as a document -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [report.page(synthetic(40)), report.comparison(synthetic(40), synthetic(3))])
def test_the_page_needs_nothing_else_and_is_well_formed(page):
    held = Page(page)
    assert not re.search(r"""(?:https?:)?//(?!www\.w3\.org)[a-z]""", page), "no address"
    assert not any({"src", "srcset"} & set(attributes) for _, attributes in held.tags)
    ids = [attributes["id"] for _, attributes in held.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in held.all("a")]
    assert links
    assert all(link and link[0] == "#" and link[1:] in ids for link in links)
    assert len(list(held.all("h1"))) == 1
    assert len(list(held.all("caption"))) == len(list(held.all("table")))
    assert all("scope" in cell for cell in held.all("th"))
    assert all("aria-label" in drawing for drawing in held.all("svg"))
    for tag in ("table", "section", "figure", "details", "div", "tr", "td", "th", "span", "ul", "dl", "svg"):
        assert page.count(f"</{tag}>") == len(list(held.all(tag))), tag


def test_how_to_reproduce_quotes_for_the_shell():
    run = synthetic(1)
    run["command"] = {"network": "my net.py:build", "data": "mnist5k", "weights": None, "train": 3, "batch_size": 64}
    told = Source(run)
    assert command(told).startswith("featherweight compress 'my net.py:build' --data mnist5k \\\n    --batch-size 64")
    assert "--method method_0:rate=0.5,epochs=0" in command(told)
    assert "--until 'size<=0.5x'" in command(told)
    compile(call(told), "call", "eval")
    assert recipe_text.parse(recipe(told))[0] == run["reproduce"]["recipe"]
    assert start(told) == "featherweight run recipe.yaml --out runs/again"
    run["reproduce"]["needs"] = ["model", "task"]
    assert 'fw.run("recipe.yaml", model=model, task=task, out="runs/again")' in start(told)
    run["reproduce"] = {"recipe": None, "needs": [], "why": "only Python can say zero"}
    shown = Page(report.page({**run, "command": None})).text()
    assert "there is no recipe: only Python can say zero" in shown
    assert "fw.compress(" in shown


# --- what is measured of a layer --------------------------------------------------------------------------------------


class Slow(nn.Module):
    """Sleeps, in its own code and in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeper, self.quick = Sleep(), nn.Linear(64, 4)

    def forward(self, x):
        return self.quick(self.sleeper(x.flatten(1)))


class Sleep(nn.Module):
    def forward(self, x):
        import time

        time.sleep(0.004)
        return x


def test_shares_find_where_the_time_goes():
    told = anatomy.shares(Slow(), torch.randn(2, 1, 8, 8), seconds=0.01)
    assert sum(told["layers"].values()) == pytest.approx(1)
    assert told["layers"]["sleeper"] > 0.8
    assert told["milliseconds"] > 4
    assert told["layers"].keys() == {"", "sleeper", "quick"}


def test_shares_leave_no_hooks_behind():
    model = small_cnn()
    anatomy.shares(model, torch.randn(1, 1, 8, 8), seconds=0.0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sensitivity_puts_one_layer_at_a_time_and_everything_back():
    model, task = small_mlp(), small_task()
    fw.fit(model, task, epochs=3, lr=0.01)
    ruined = fw.compress(model, task, _ruin, measure=False, onnx=False).model
    before = evaluate(model, task)
    told = anatomy.sensitivity(model, ruined, task, before, seconds=60, once=0.0)
    assert told["layers"].keys() == {"3"}, "only what was changed"
    assert told["layers"]["3"] == pytest.approx(100 * (before.value - evaluate(ruined, task).value))
    assert told["layers"]["3"] > 10
    short = anatomy.sensitivity(model, ruined, task, before, seconds=1, once=5.0)
    assert short["layers"] == {}
    assert "1 of 1 layers were not tried" in short["why"]


def _ruin(model: nn.Module, task: fw.Task) -> nn.Module:
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].weight[0] = 1
    return model


def test_a_file_that_grew_is_not_called_smaller() -> None:
    grown = synthetic(2)
    grown["original"]["bytes"], grown["result"]["bytes"] = 100, 120
    text = report.page(grown)
    assert "larger than it was" in text.split("</h1>")[0]
    assert "smaller" not in text.split("</h1>")[0].split("<h1>")[1]
