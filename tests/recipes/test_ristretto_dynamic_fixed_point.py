"""Integers times powers of two, saturation as in the authors' code or without clipping, shifts that are exact."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, activation_form, attach, bake, codes_of, forms_of
from featherweight.core.grids import ActivationGrid, Seen
from featherweight.core.levels import FixedGrid
from featherweight.core.site import Site
from featherweight.core.task import evaluate
from featherweight.recipes.ristretto import dynamic_acts, dynamic_weights


def seen(*values: float) -> Seen:
    watcher = Seen()
    watcher(torch.tensor(values))
    return watcher


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 16), st.sampled_from(["noclip", "reference"]))
def test_weights_are_integers_times_a_power_of_two(seed: int, bits: int, saturation) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(30) * 2.0 ** (seed % 9 - 4)
    form = dynamic_weights(Site.of(weight), bits, saturation)
    fl = -torch.log2(form.scale)
    assert fl == fl.round()
    symbols = form.symbols(weight)
    assert torch.equal(form(weight).double(), symbols * form.scale.double())
    assert symbols.min() >= -(2 ** (bits - 1))
    assert symbols.max() <= 2 ** (bits - 1) - 1
    assert float(weight.abs().max()) <= 2 ** (bits - 1) * float(form.scale)
    if bits > 1:
        assert float(weight.abs().max()) >= 2 ** (bits - 2) * float(form.scale) * 0.999, "no bit in front is idle"


@settings(deadline=None)
@given(st.floats(0.01, 500), st.booleans(), st.integers(2, 16))
def test_nothing_is_clipped_without_asking_for_it(largest: float, signed: bool, bits: int) -> None:
    grid = dynamic_acts(seen(-largest if signed else 0.0, largest), bits, "noclip")
    step = float(grid.scale)
    assert abs(float(grid(torch.tensor(largest))) - largest) <= step * 1.0001
    assert grid.low == (-(2 ** (bits - 1)) if signed else 0)


@settings(deadline=None)
@given(st.floats(0.01, 500), st.integers(3, 16))
def test_the_reference_clips_activations_at_half_their_range_or_more(largest: float, bits: int) -> None:
    grid = dynamic_acts(seen(0.0, largest), bits, "reference")
    top = (2 ** (bits - 1) - 1) * float(grid.scale)
    assert float(grid(torch.tensor(2 * largest))) == pytest.approx(top)
    assert 0.5 * largest * (1 - 2.0 ** (2 - bits)) <= top < largest


def test_a_power_of_two_is_clipped_by_a_step_in_the_reference_only() -> None:
    weight = torch.tensor([1.0, 0.3])
    reference, noclip = (dynamic_weights(Site.of(weight), 8, mode) for mode in ("reference", "noclip"))
    assert float(reference(weight)[0]) == 1 - 2.0**-7
    assert float(noclip(weight)[0]) == 1.0


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(0, 6))
def test_one_group_becomes_another_by_shifts(seed: int, shift: int) -> None:
    """Rounding to a coarser group is a shift of the integers with rounding, exact against the real numbers."""
    torch.manual_seed(seed)
    fine = dynamic_acts(seen(0.0, 0.9), 16, "noclip")
    coarse = ActivationGrid(float(fine.scale) * 2**shift, 0, 0, 65535)
    x = fine(torch.rand(200))
    symbols = (x.double() / float(fine.scale)).round().long()
    half = (1 << shift) >> 1
    shifted = (symbols + half) >> shift
    back = (symbols & ((1 << shift) - 1) == half) & (half > 0) & (shifted % 2 == 1)  # half-way: to the even one
    wanted = (shifted - back.long()).double() * float(coarse.scale)
    assert torch.equal(coarse(x).double(), wanted)


def test_fine_tuning_with_either_rounding_ends_on_the_nearest_and_repairs() -> None:
    torch.manual_seed(0)
    task = small_task()
    model = fit(small_cnn(), task, epochs=8, lr=0.01).eval()
    for rounding in ("nearest", "stochastic"):
        options = {"widths": [3], "margin": 1.0, "calibration_batches": 2, "rounding": rounding, "lr": 5e-3}
        raw = entry("ristretto_dynamic_fixed_point")(copy.deepcopy(model), task, **{**options, "epochs": 0})
        small = entry("ristretto_dynamic_fixed_point")(copy.deepcopy(model), task, **{**options, "epochs": 6})
        assert evaluate(small, task).value >= max(0.85, evaluate(raw, task).value)
        assert not any(form.stochastic for form in small.modules() if isinstance(form, FixedGrid))
        wanted = small.get_submodule("3").weight.detach().clone()
        assert torch.equal(wanted, small.train().get_submodule("3").weight.detach())
        codes = codes_of(bake(small).get_submodule("3"))
        assert codes is not None
        assert torch.equal(codes.decode(), wanted)


def test_stochastic_rounding_of_weights_is_right_on_average() -> None:
    form, weight = FixedGrid(torch.tensor(0.5), -4, 3), torch.tensor([0.1, -0.6, 0.5])
    form.stochastic = True
    draws = torch.stack([form.train()(weight) for _ in range(4000)])
    above = (weight / 0.5) % 1
    assert ((draws.mean(0) - weight).abs() <= 5 * 0.5 * (above * (1 - above) / 4000).sqrt() + 1e-6).all()
    assert torch.equal(form.eval()(weight), torch.tensor([0.0, -0.5, 0.5]))


def test_inputs_and_outputs_of_layers_carry_grids_and_masks_are_kept() -> None:
    torch.manual_seed(0)
    task, model = small_task(), small_cnn()
    layer = model.get_submodule("3")
    keep = torch.rand(layer.weight.shape) > 0.5
    with torch.no_grad():
        layer.weight[~keep] = 100.0
    attach(layer, Mask(keep))
    entry("ristretto_dynamic_fixed_point")(model, task, widths=[8], calibration_batches=2, epochs=1)
    grids: list[Tensor] = []
    for path in ("0", "3", "8"):
        module: nn.Module = model.get_submodule(path)
        for at in ("input", "output"):
            grid = activation_form(module, at)
            assert isinstance(grid, ActivationGrid)
            grids.append(torch.log2(grid.scale))
        form = forms_of(module)[0]
        assert isinstance(form, FixedGrid)
        grids.append(torch.log2(form.scale))
    assert all(power == power.round() for power in grids)
    assert len({float(power) for power in grids}) > 1, "the point stands elsewhere for each group"
    assert not layer.weight[~keep].any()
    assert float(layer.weight.detach().abs().max()) < 2
