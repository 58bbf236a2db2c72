"""Signs and powers of two, rounded in the logarithm; activations are searched, weights are not."""

import copy
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featherweight.catalogue import entry
from featherweight.core.forms import Mask, attach, bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.levels import Levels
from featherweight.core.task import Task, evaluate
from featherweight.recipes.ristretto import power_levels


@settings(deadline=None)
@given(st.floats(-4, 4, width=32).filter(bool), st.sampled_from([-1, 0, 2]), st.sampled_from([2, 4, 8]))
def test_the_formula(weight: float, highest: int, count: int) -> None:
    levels, edges = power_levels(highest, count)
    wanted = math.copysign(2.0 ** min(max(round(math.log2(abs(weight))), highest - count + 1), highest), weight)
    assert float(Levels(levels.float(), edges)(torch.tensor(weight))) == wanted


def test_four_bits_are_sixteen_codes_without_a_zero() -> None:
    levels, edges = power_levels(-1, 8)
    assert len(levels) == 16
    assert levels.abs().unique().tolist() == [2.0**e for e in range(-8, 0)]
    assert Levels(levels.float(), edges)(torch.tensor([0.0, 9.0])).tolist() == [2.0**-8, 0.5]


def test_weights_are_powers_of_two_codes_are_exact_and_masks_stay(trained: tuple[nn.Module, Task]) -> None:
    model, task = copy.deepcopy(trained[0]), trained[1]
    layer = model.get_submodule("3")
    keep = torch.rand(layer.weight.shape) > 0.5
    attach(layer, Mask(keep))
    with recording() as ledger:
        entry("ristretto_pow2")(model, task, widths=[16, 8], calibration_batches=2, epochs=1)
    assert {row["kind"] for row in ledger.tables["bit widths"]} == {"act"}
    for path in ("0", "3", "8"):
        weight = model.get_submodule(path).weight.detach().clone()
        powers = torch.log2(weight[weight != 0].abs())
        assert torch.equal(powers, powers.round())
        assert len(powers.unique()) <= 8
        assert bool((weight == 0).any()) == (path == "3")
        codes = codes_of(bake(copy.deepcopy(model)).get_submodule(path))
        assert codes is not None
        assert torch.equal(codes.decode(), weight)
    assert torch.equal(layer.weight.detach() == 0, ~keep)


def test_the_exponents_of_the_paper_cut_off_and_that_is_said(trained: tuple[nn.Module, Task]) -> None:
    model, task = copy.deepcopy(trained[0]), trained[1]
    with torch.no_grad():
        model.get_submodule("8").weight[0, 0] = 3.0
    options = {"widths": [8], "calibration_batches": 2, "epochs": 0}
    with recording() as ledger:
        small = entry("ristretto_pow2")(copy.deepcopy(model), task, highest=-1, **options)
    assert any("cut off at 2^-1" in told for told in ledger.notes)
    assert float(small.get_submodule("8").weight.detach()[0, 0]) == 0.5
    own = entry("ristretto_pow2")(model, task, **options)
    assert float(own.get_submodule("8").weight.detach()[0, 0]) == 4.0


def test_fine_tuning_repairs_and_more_exponents_help(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    x = task.inputs()[0][0]

    def gap(bits: int) -> float:
        options = {"weight_bits": bits, "widths": [16], "calibration_batches": 2, "epochs": 0}
        small = entry("ristretto_pow2")(copy.deepcopy(model), task, **options).eval()
        with torch.no_grad():
            return float((small(x) - model(x)).square().mean())

    assert gap(2) > gap(4)
    small = entry("ristretto_pow2")(copy.deepcopy(model), task, widths=[8], calibration_batches=2, epochs=4, lr=5e-3)
    assert evaluate(small, task).value >= 0.9
