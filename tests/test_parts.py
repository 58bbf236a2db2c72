"""Parts of the catalogue, which other ids take as options: each is listed, explained, and works in what takes it."""

from __future__ import annotations

import inspect
import json

import pytest
from typer.testing import CliRunner

import contract
import featherweight as fw
from conftest import small_cnn
from featherweight.catalogue import entries, fill, takers_of
from featherweight.cli import app
from featherweight.errors import UnknownName

PARTS = sorted(entries("part"))
CARRIERS = {
    "schedule": ("magnitude_iterative",),
    "score": ("magnitude_iterative", "pfec_l1"),
    "allocation": ("magnitude_iterative", "pfec_l1"),
    "adapter": ("cross_layer_matrix", "chou_full"),
    "average": ("chou_full",),
    "plan": ("chou_full",),
}
"""What a part of each slot is tried in."""
CASES = [(part, carrier) for part in PARTS for carrier in CARRIERS[entries("part")[part].slot]]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_explained_and_listed(name):
    part = entries("part")[name]
    assert part.paper
    assert part.doc
    assert part.family in {"prune", "distill"}
    assert "Departs from the paper: " in (inspect.getdoc(part.function) or "") or "Departs from the paper: " in (
        inspect.getdoc(inspect.getmodule(part.function)) or ""
    )
    assert fill(part.slot, name) is part.function
    assert takers_of(part.slot)
    shown = CliRunner().invoke(app, ["methods", name])
    assert shown.exit_code == 0
    assert f"{part.slot}={name}" in shown.stdout
    listed = CliRunner().invoke(app, ["methods", "--json"])
    assert {"id": name, "kind": "part"}.items() <= next(r for r in json.loads(listed.stdout) if r["id"] == name).items()


@pytest.mark.parametrize(("name", "carrier"), CASES)
def test_a_part_works_in_what_takes_it(name, carrier, tmp_path):
    model, task = contract.trained()
    entry = entries("method")[carrier]
    option = takers_of(entries("part")[name].slot)[carrier]
    options = {**entry.small, option: name}
    first = fw.compress(model, task, carrier, out=tmp_path / "a", onnx=False, **options)
    fw.compress(model, task, carrier, out=tmp_path / "b", onnx=False, **options)
    assert (tmp_path / "a/model.fw").read_bytes() == (tmp_path / "b/model.fw").read_bytes()
    loaded = fw.load(tmp_path / "a/model.fw", into=small_cnn()).eval()
    assert fw.evaluate(loaded, task).value == first.report["result"]["metric"]
    told = first.report["result"]["nonzeros"], first.report["original"]["nonzeros"]
    assert told[0] < told[1] or entries("part")[name].family == "distill"


def test_a_part_is_no_method_of_a_chain():
    model, task = contract.trained()
    with pytest.raises(UnknownName, match="agp is a part, no method: pass it as an option"):
        fw.compress(model, task, "agp")
