"""Minifloats: all normal numbers and zero, the largest and the smallest exact, and float arithmetic that makes them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.blueprint import blueprint, conform
from featherweight.core.fit import fit
from featherweight.core.forms import activation_form, bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.levels import Levels
from featherweight.core.task import Task
from featherweight.errors import BadOption
from featherweight.export import onnx
from featherweight.recipes.ristretto import Minifloat, exponents, minifloat_levels

FORMATS = [(2, 1), (3, 0), (4, 3), (5, 2), (5, 10), (6, 9)]


@pytest.mark.parametrize(("e", "m"), FORMATS)
def test_the_largest_and_the_smallest_number_are_those_of_the_format(e: int, m: int) -> None:
    levels = minifloat_levels(e, m)
    assert len(levels) == 2 * (2**e - 1) * 2**m + 1 <= 2 ** (1 + e + m)
    assert float(levels.max()) == (2 - 2.0**-m) * 2.0 ** (2**e - 1 - (2 ** (e - 1) - 1))
    assert float(levels[levels > 0].min()) == 2.0 ** (1 - (2 ** (e - 1) - 1)), "no subnormal numbers"
    form = Minifloat(e, m)
    assert torch.equal(form(levels.float()), levels.float()), "every number of the format stays"
    top = float(levels.max())
    assert form(torch.tensor([2 * top, -3 * top])).tolist() == [top, -top]


@settings(deadline=None)
@given(st.integers(0, 300), st.sampled_from(FORMATS))
def test_float_arithmetic_makes_the_nearest_number(seed: int, sizes: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    values = torch.randn(200) * 2.0 ** torch.randint(*exponents(sizes[0]), (200,))
    levels = minifloat_levels(*sizes)
    made, nearest = Minifloat(*sizes)(values).double(), Levels(levels.float())(values).double()
    off, least = (made - values.double()).abs(), (nearest - values.double()).abs()
    assert torch.isin(made, levels).all()
    assert torch.equal(off, least), "no number of the format is nearer"
    half_way = torch.isin(values.double(), (levels[1:] + levels[:-1]) / 2)
    assert torch.equal(made[~half_way], nearest[~half_way]), "only half-way may the two choose differently"


def test_rounding_up_to_the_next_power_of_two_and_zeros_in_the_middle() -> None:
    """Two errors of public code: 1.111.. must become 10.0, and a zero must not end the loop."""
    form = Minifloat(4, 2)
    assert form(torch.tensor([1.99, 0.0, 1.3, -0.0, 3.99])).tolist() == [2.0, 0.0, 1.25, 0.0, 4.0]
    least = 2.0 ** exponents(4)[0]
    assert form(torch.tensor([0.4 * least, 0.6 * least, -0.6 * least])).tolist() == [0.0, least, -least]


def test_gradients_pass_inside_the_range() -> None:
    value = torch.tensor([-100.0, 0.3, 100.0], requires_grad=True)
    Minifloat(3, 2)(value).sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [0.0, 1.0, 0.0]
    tokens = torch.tensor([1, 2])
    assert Minifloat(3, 2)(tokens) is tokens


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    task = small_task()
    model = fit(small_cnn(), task, epochs=8, lr=0.01).eval()
    with recording() as ledger:
        entry("ristretto_minifloat")(model, task, widths=[16, 8], calibration_batches=2, epochs=1)
    assert any("exponent bits" in told for told in ledger.notes)
    return model.eval(), task


def test_small_weights_survive_and_forms_come_back(small: tuple[nn.Module, Task]) -> None:
    model, task = small
    again = conform(small_cnn(), *blueprint(model)).eval()
    x = task.inputs()[0][0]
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    for path in ("0", "3", "8"):
        weight = model.get_submodule(path).weight.detach()
        assert float((weight == 0).float().mean()) < 0.3
        form = activation_form(model.get_submodule(path), "output")
        assert isinstance(form, Minifloat)
        assert 1 + form.exponent + form.mantissa <= 8
        codes = codes_of(bake(again).get_submodule(path))
        assert codes is not None
        assert torch.equal(codes.decode(), weight)


def test_the_onnx_file_computes_the_same(small: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = small
    report = onnx(model, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert report.difference is not None
    assert report.difference < 1e-4
    assert any("Minifloat" in told for told in report.notes)


def test_widths_without_room_for_an_exponent_are_refused() -> None:
    task = small_task()
    with pytest.raises(BadOption, match="none is wide enough"):
        entry("ristretto_minifloat")(small_cnn(), task, widths=[2, 1], calibration_batches=1)
