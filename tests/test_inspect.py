"""`featherweight inspect`: every byte of a file is told once, beside the entropy that bounds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from featherweight.cli import app
from featherweight.coding import inspect, save
from featherweight.core.forms import Affine, Codes, declare_codes
from golden_models import GOLDEN_FILES, fresh
from test_coding import Net, compressed

GOLDEN = Path(__file__).parent / "golden"


def gaussian(rows: int = 64, columns: int = 200, step: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=False)
    integers = torch.round(torch.randn(rows, columns) / step).to(torch.int32)
    codes = Codes(integers, Affine(torch.tensor(step), torch.tensor(0, dtype=torch.int32)), (rows, columns))
    layer.weight = nn.Parameter(codes.decode())
    declare_codes(layer, "weight", codes)
    return layer


def told_once(path: Path, into: nn.Module | None = None) -> None:
    """Every byte is in exactly one place."""
    found = inspect(path, into=into)
    size = path.stat().st_size
    assert found["bytes"] == size == sum(row["bytes"] for row in found["tensors"]) + sum(found["structure"].values())
    assert sum(found["described"].values()) == found["structure"]["description"] == found["manifest_bytes"]
    assert found["weights_bytes"] + found["structure_bytes"] == size
    for row in found["tensors"]:
        assert row["bytes"] == row["code_bytes"] + row["table_bytes"] + row["side_bytes"]
        assert min(row["code_bytes"], row["table_bytes"], row["side_bytes"]) >= 0
    json.dumps(found)


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_the_parts_of_a_golden_file_add_up_to_its_size(name: str) -> None:
    told_once(GOLDEN / f"{name}.fw", fresh(name))


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("coder", [None, "sparse_index", "huffman", "range", "rans", "deepcabac", "context_mixing"])
def test_the_parts_add_up_under_every_coder(coder: str | None, bare: bool, tmp_path: Path) -> None:
    save(compressed(), tmp_path / "a.fw", coder=coder, bare=bare, provenance={"seed": 1})
    told_once(tmp_path / "a.fw", Net())


@pytest.mark.parametrize("coder", ["deepcabac", "context_mixing"])
def test_adaptive_code_words_are_within_a_hundredth_of_what_their_models_say(coder: str, tmp_path: Path) -> None:
    save(gaussian(), tmp_path / "a.fw", coder=coder)
    (row,) = inspect(tmp_path / "a.fw")["tensors"]
    assert row["coder"] == coder
    assert row["code_bytes"] > 4096
    assert row["ideal_bytes"] <= row["code_bytes"] <= 1.01 * row["ideal_bytes"]
    assert abs(row["ideal_bytes"] / row["entropy_bytes"] - 1) < 0.03  # independent symbols: no neighbour tells anything


def test_static_code_words_have_no_model_but_their_entropy(tmp_path: Path) -> None:
    save(gaussian(), tmp_path / "a.fw", coder="rans")
    (row,) = inspect(tmp_path / "a.fw")["tensors"]
    assert row["ideal_bytes"] is None
    assert row["entropy_bytes"] <= row["code_bytes"] < row["entropy_bytes"] * 1.01 + 8
    assert 0 < row["table_bytes"] < 100
    assert row["side_bytes"] < 30


def test_what_a_description_says_beside_its_known_parts_is_counted_too(tmp_path: Path) -> None:
    from featherweight.coding.container import assemble
    from featherweight.coding.manifest import pack_manifest

    (tmp_path / "a.fw").write_bytes(assemble(pack_manifest({"later": [1, 2, 3], "names": [], "tool": "x"}), [], False))
    told_once(tmp_path / "a.fw")
    assert inspect(tmp_path / "a.fw")["described"].keys() == {"names", "tool", "other"}


def test_the_table_fits_into_eighty_columns_and_ends_with_the_size(tmp_path: Path) -> None:
    save(compressed(), tmp_path / "a.fw", coder="context_mixing")
    lines = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.fw")]).output.splitlines()
    upto = next(i for i, line in enumerate(lines) if line.startswith("the file"))
    assert max(len(line) for line in lines[: upto + 6]) <= 80
    assert int(lines[upto].split()[-1]) == (tmp_path / "a.fw").stat().st_size
    shown = [line for line in lines[:upto] if line.startswith("conv1.weight")]
    found = {row["name"]: row for row in inspect(tmp_path / "a.fw")["tensors"]}
    assert int(shown[0].split()[-1]) == found["conv1.weight"]["bytes"]


def test_json_is_what_python_gives(tmp_path: Path) -> None:
    save(compressed(), tmp_path / "a.fw")
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.fw"), "--json"]).output
    assert json.loads(told) == json.loads(json.dumps(inspect(tmp_path / "a.fw")))
