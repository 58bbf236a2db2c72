"""Universal source coding: the same function in another order of units, smaller by what their orders cost."""

from __future__ import annotations

import copy
from itertools import pairwise
from math import lgamma, log
from pathlib import Path

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.catalogue import entries
from featherweight.core.forms import Affine, Codes, Product, Table, codes_of, declare_codes
from featherweight.core.ledger import recording
from featherweight.core.task import Task
from featherweight.errors import BadOption
from featherweight.recipes.universal_source_coding import integers, universal_source_coding


def ternary(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear layers of weights -1, 0, 1 between ReLUs, biases whole numbers: outputs are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for before, width in pairwise(widths):
        layer = nn.Linear(before, width)
        symbols = torch.randint(-1, 2, (width, before), generator=generator).to(torch.int8)
        codes = Codes(symbols, Affine(torch.tensor(1.0), torch.tensor(0)), (width, before))
        layer.weight.data.copy_(codes.decode())
        layer.bias.data.copy_(torch.randint(-3, 4, (width,), generator=generator))
        declare_codes(layer, "weight", codes)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def task_for(x: torch.Tensor) -> Task:
    return Task(valid=[(x, torch.zeros(len(x), dtype=torch.long))])


def log_factorial(n: int) -> float:
    return lgamma(n + 1) / log(2)


def test_the_function_is_the_same_and_the_file_smaller_by_what_order_costs(tmp_path: Path) -> None:
    """Whole numbers throughout: outputs are equal bit for bit; two hidden layers save log2(40!) + log2(60!) bits."""
    model, x = ternary(30, 40, 60, 5), torch.randint(-4, 5, (16, 30)).float()
    with recording() as ledger:
        found = universal_source_coding(copy.deepcopy(model), task_for(x))
    assert torch.equal(found(x), model(x))
    assert not torch.equal(found[0].weight, model[0].weight)
    sizes = []
    for name, one in (("before", model), ("after", found)):
        fw.save(one, tmp_path / name, coder="unlabeled_graph", bare=True)
        sizes.append((tmp_path / name).stat().st_size)
    orders = log_factorial(40) + log_factorial(60)
    assert 8 * (sizes[0] - sizes[1]) == pytest.approx(orders, abs=32)
    assert ledger.notes == [f"what order would cost: {orders:.0f} bits"]
    assert all(codes_of(layer) is not None for layer in (found[0], found[2]))  # they came along
    back = fw.load(tmp_path / "after", into=ternary(30, 40, 60, 5, seed=1))
    assert torch.equal(back(x), model(x))


def test_rows_stand_in_ascending_order_and_the_next_layer_reads_them_there() -> None:
    model, x = ternary(3, 4, 2), torch.eye(3)
    rows = model[0].weight.tolist()
    found = universal_source_coding(copy.deepcopy(model), task_for(x))
    order = sorted(range(4), key=lambda i: rows[i])
    assert found[0].weight.tolist() == sorted(rows)
    assert found[0].bias.tolist() == [model[0].bias[i] for i in order]
    assert torch.equal(found[2].weight, model[2].weight[:, order])
    assert torch.equal(found[2].bias, model[2].bias)


def test_its_coder_is_the_coder_of_the_paper() -> None:
    assert entries()["universal_source_coding"].coder == "unlabeled_graph"


@pytest.mark.parametrize("kind", ["affine by row", "table by row", "blocks of a row", "product"])
def test_codes_of_every_kind_come_along(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    shape, symbols = (9, 6), torch.randint(0, 4, (9, 6))
    rule = {
        "affine by row": Affine(torch.rand(9), torch.randint(0, 3, (9,)), 0),
        "table by row": Table(torch.randn(9, 4), 0),
        "blocks of a row": Affine(torch.rand(27), torch.zeros(27, dtype=torch.long), block=2),
        "product": Product(torch.randn(3, 4, 2)),
    }[kind]
    codes = Codes(symbols[:, :3] if kind == "product" else symbols, rule, shape)
    model[0].weight.data.copy_(codes.decode())
    declare_codes(model[0], "weight", codes)
    x = torch.randn(8, 6)
    found = universal_source_coding(copy.deepcopy(model), task_for(x))
    assert not torch.equal(found[0].weight, model[0].weight)
    assert torch.allclose(found(x), model(x), atol=1e-6)
    moved = codes_of(found[0])
    assert moved is not None
    assert type(moved.rule) is type(rule)
    assert torch.equal(moved.decode(), found[0].weight)
    assert moved.symbols.shape == codes.symbols.shape


def test_codes_in_runs_along_the_units_keep_them_where_they_are() -> None:
    """The second layer reads the units of the first in pairs: tearing pairs apart would cost their codebook."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    codes = Codes(torch.randint(0, 4, (4, 4)), Product(torch.randn(4, 4, 2)), (4, 8))
    model[2].weight.data.copy_(codes.decode())
    declare_codes(model[2], "weight", codes)
    with recording() as ledger:
        found = universal_source_coding(copy.deepcopy(model), task_for(torch.randn(8, 6)))
    assert torch.equal(found[0].weight, model[0].weight)
    assert "stand for several weights each" in ledger.skipped["0"]
    assert not torch.equal(found[2].weight, model[2].weight)  # its own units are free
    with pytest.raises(BadOption, match="no hidden units may trade places"):
        universal_source_coding(copy.deepcopy(model), task_for(torch.randn(8, 6)), where="0")


def test_integers_are_in_the_order_of_their_numbers() -> None:
    numbers = torch.tensor([-3.0, -1e-30, -0.0, 0.0, 1e-30, 2.0, 2.5])
    assert integers(numbers).tolist() == sorted(integers(numbers).tolist())
    assert len(integers(numbers).unique()) == len(numbers)
