"""Fixed levels and fixed grids: codes are the weight bit for bit, gradients pass, impossible numbers are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featherweight.core.forms import Form, Mask, attach, bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.levels import FixedGrid, Levels, not_zero
from featherweight.core.site import Site, sites
from featherweight.errors import BadData, CompressionError


def grid(kind: str, shape: tuple[int, int]) -> Form:
    rows, total = shape[0], shape[0] * shape[1]
    return {
        "levels": lambda: Levels(torch.randn(7).sort().values),
        "tensor": lambda: FixedGrid(torch.tensor(0.3), -4, 3),
        "axis": lambda: FixedGrid(torch.rand(rows) + 0.1, 0, 255, zero_point=torch.arange(rows), axis=0),
        "offset": lambda: FixedGrid(torch.rand(rows) + 0.1, 0, 15, zero_point=torch.randn(rows), axis=0),
        "block": lambda: FixedGrid(torch.rand(total // 3) + 0.1, -7, 7, block=3),
    }[kind]()


@pytest.mark.parametrize("kind", ["levels", "tensor", "axis", "offset", "block"])
@pytest.mark.parametrize("masked", [False, True])
@given(seed=st.integers(0, 30))
def test_codes_are_the_weight_bit_for_bit(kind: str, masked: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(6, 4)
    if masked:
        attach(layer, Mask(torch.rand(4, 6) > 0.5))
    attach(layer, grid(kind, (4, 6)))
    wanted = layer.weight.detach().clone()
    codes = codes_of(bake(layer))
    assert codes is not None
    assert torch.equal(codes.decode(), wanted)


@pytest.mark.parametrize("kind", ["levels", "tensor", "axis", "offset", "block"])
def test_values_are_snapped_gradients_pass_and_forms_come_back(kind: str) -> None:
    form, weight = grid(kind, (4, 6)), torch.randn(4, 6, requires_grad=True)
    out = form(weight)
    (out * torch.arange(24.0).view(4, 6)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.arange(24.0).view(4, 6))
    with torch.no_grad():
        assert torch.equal(form(weight), out)
    again = Form.restored(type(form).__name__, *form.state())
    assert not again.unsound()
    assert torch.equal(again(weight), out)


@given(st.floats(-3, 3, width=32), st.floats(0.0625, 1, width=32))
def test_a_fixed_grid_is_within_half_a_step_inside_its_range(value: float, step: float) -> None:
    form = FixedGrid(torch.tensor(step), -1000, 1000)
    assert abs(float(form(torch.tensor(value))) - value) <= 0.5 * step + 1e-6


def test_a_grid_without_zero_and_one_beyond_its_range() -> None:
    form = FixedGrid(torch.tensor(1.0), 0, 3, zero_point=torch.tensor(1.5))
    assert form(torch.tensor([-9.0, 0.1, 9.0])).tolist() == [-1.5, 0.5, 1.5]


def test_impossible_numbers_are_found() -> None:
    wrong = [
        FixedGrid(torch.tensor(0.0), -1, 1),
        FixedGrid(torch.tensor(1.0), 2, 1),
        FixedGrid(torch.tensor(1.0), -(2**30), 1),
        FixedGrid(torch.tensor(float("inf")), -1, 1),
        FixedGrid(torch.ones(2), -1, 1, axis=0, block=3),
        Levels(torch.tensor([1.0, -1.0])),
        Levels(torch.tensor([0.0, 1.0]), torch.tensor([0.1, 0.2])),
        Levels(torch.tensor([0.0, float("inf")])),
    ]
    assert all(form.unsound() for form in wrong)


def test_layers_of_zeros_are_left_alone_and_said() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    with recording() as ledger:
        assert list(not_zero(sites(model))) == ["1"]
    assert ledger.skipped == {"0": "all its weights are zero"}
    with pytest.raises(CompressionError, match="nothing to quantize"):
        not_zero({"0": Site("0", model[0])})
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(BadData, match="weights of 1 are not finite"):
        not_zero(sites(model))
