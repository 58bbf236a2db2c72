"""What `save` promises of a file without the class, `load` keeps; what a file's arithmetic may do is bounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.coding import inspect, load, save
from featherweight.core.agree import compared
from featherweight.core.operators import function
from featherweight.core.sizes import evaluate_size
from featherweight.core.wiring import wire
from featherweight.errors import BadData, FormatError
from test_hostile_graph import changed, steps

X = torch.randn(2, 4)


class Named(nn.Module):
    """A network whose only layer has a name of the caller's choice, and maybe a tensor that no such layer has."""

    def __init__(self, name: str, gain: bool = False) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(4, 4))
        if gain:
            self.get_submodule(name).register_parameter("gain", nn.Parameter(torch.full((4,), 2.0)))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.get_submodule(self.name)
        return layer(x) * getattr(layer, "gain", 1.0)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Named("fw_line"), "'fw_line'"),
        (Named("positional"), "'positional'"),
        (Named("line", gain=True), "as gain"),
    ],
)
def test_what_load_would_refuse_is_written_for_the_class(model: nn.Module, says: str, tmp_path: Path) -> None:
    saved = save(model, tmp_path / "a.fw", example_inputs=X)
    assert not saved.class_free
    assert says in saved.why_not
    with pytest.raises(FormatError, match="pass into="):
        load(tmp_path / "a.fw")
    again = load(tmp_path / "a.fw", into=Named(model.name, hasattr(model.get_submodule(model.name), "gain")))
    assert torch.equal(again(X), model(X))


def test_weights_that_parametrizations_of_torch_compute_need_no_class(tmp_path: Path) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)).eval()
    save(model, tmp_path / "model.fw", example_inputs=X)
    loaded = load(tmp_path / "model.fw")
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert torch.equal(loaded(X), model(X))
    loaded(X).square().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_a_network_that_is_almost_empty_says_that_it_needs_a_limit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.ReLU())
    with torch.no_grad():
        weight = model[0].weight.zero_().view(-1)
        weight[::100_000] = 1.0
    x = torch.randn(1, 4096)
    saved = save(model, tmp_path / "a.fw", example_inputs=x, coder="sparse_index")
    assert not saved.class_free
    assert "limit=" in saved.why_not
    with pytest.raises(FormatError):
        load(tmp_path / "a.fw")
    assert torch.equal(load(tmp_path / "a.fw", limit=1 << 30)(x), model(x))


def test_a_network_without_a_class_keeps_its_graph_in_a_bare_file(tmp_path: Path) -> None:
    """Found: what was not to open by itself lost the graph that `into=` needs."""
    model = wire(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), X)
    assert not save(model, tmp_path / "a.fw", bare=True).class_free
    assert inspect(tmp_path / "a.fw")["manifest"]["wiring"]["steps"]


@pytest.mark.parametrize(
    ("expected", "found", "says"),
    [
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)], "2 outputs"),
        ([torch.ones(2)], [torch.ones(3)], "shape"),
        ([torch.ones(2)], [torch.full((2,), math.nan)], "nan"),
        ([torch.ones(2)], [torch.full((2,), 1.1)], "differs by"),
        ([torch.tensor([1])], [torch.tensor([2])], "whole numbers"),
        ([1], [2], "int"),
    ],
)
def test_outputs_that_differ_are_told(expected: list[Any], found: list[Any], says: str) -> None:
    assert says in compared(expected, found)[1]
    assert compared(expected, expected) == (0.0, "")


@pytest.mark.parametrize(
    "call",
    [
        lambda: function("size.mod")("%500000000d", 1),
        lambda: function("size.mul")([0], 1 << 40),
        lambda: function("size.mul")(1 << 40, 1 << 40),
        lambda: function("size.pow")(10, 60),
        lambda: function("size.ceil")(1e300),
        lambda: function("size.floordiv")(3, 0),
    ],
)
def test_arithmetic_on_sizes_is_bounded(call: Callable[[], Any]) -> None:
    with pytest.raises(BadData, match=r"^size\."):
        call()


def test_a_condition_that_divides_by_zero_does_not_hold() -> None:
    assert evaluate_size(("ne", ("mod", 4, ("size", 0, 0)), 1), [(0,)]) is False
    assert evaluate_size(("ne", ("mod", 4, ("size", 0, 0)), 1), [(2,)]) is True


def names_twice(data: dict[str, Any]) -> None:
    data["wiring"]["names"] = ["first", "first"]


def input_twice(data: dict[str, Any]) -> None:
    data["wiring"]["kwargs"]["another"] = {"r": 0}


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "words": (steps(["size.mod", ["%500000000d", 1]]), "which is no number"),
    "lists": (steps(["size.mul", [[0], 1 << 40]]), "which is no number"),
    "three factors": (steps(["size.mul", [1, 2, 3]]), "with 3 arguments"),
    "a float range": (steps(["aten.arange.default", [1e15]]), "more than a file may ask for"),
    "a fine range": (steps(["aten.arange.start_step", [0, 1, 1e-12]]), "more than a file may ask for"),
    "a wide eye": (steps(["aten.eye.m", [1 << 20, 1 << 20]]), "more than a file may ask for"),
    "a wide border": (steps(["aten.constant_pad_nd.default", [{"r": 1}, [1 << 20, 1 << 20]]]), "more than a file"),
    "classes": (steps(["aten.one_hot.default", [{"r": 1}, 1 << 40]]), "more than a file may ask for"),
    "a condition of three": (
        lambda data: data["wiring"].update(conditions=[["eq", 1, 1, 1]]),
        "a condition with 'eq'",
    ),
    "names twice": (names_twice, "named twice"),
    "an input twice": (input_twice, "an input is no argument, or several"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_graphs_are_refused_by_what_is_wrong(name: str, tmp_path: Path) -> None:
    change, says = REFUSED[name]
    with pytest.raises(FormatError, match=says):
        load(changed(tmp_path / "a.fw", change))


def test_a_border_of_a_large_number_is_no_large_border(tmp_path: Path) -> None:
    """The value that fills is no size."""
    load(changed(tmp_path / "a.fw", steps(["aten.constant_pad_nd.default", [{"r": 1}, [0, 1], 1 << 40]])))
