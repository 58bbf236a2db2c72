"""What the three ids of Ristretto share: kinds of numbers are searched apart, and measured again together."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Form, activation_form, forms_of
from featherweight.core.grids import ActivationGrid
from featherweight.core.ledger import recording
from featherweight.core.levels import FixedGrid
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData, BadOption, CompressionError
from featherweight.recipes.ristretto import Numbers, dynamic_acts, dynamic_weights, narrowed, watched

IDS = ("ristretto_dynamic_fixed_point", "ristretto_minifloat", "ristretto_pow2")


def bits_of(model: nn.Module) -> dict[str, int]:
    """The widest grid of each kind of number that stands on a model."""
    found = {}
    for module in model.modules():
        grid = forms_of(module)[0] if isinstance(module, (nn.Linear, nn.Conv2d)) and forms_of(module) else None
        if isinstance(grid, FixedGrid):
            found["fc" if isinstance(module, nn.Linear) else "conv"] = (grid.high - grid.low + 1).bit_length() - 1
        for at in ("input", "output"):
            if isinstance(form := activation_form(module, at), ActivationGrid):
                found["act"] = max(found.get("act", 0), (form.high - form.low + 1).bit_length() - 1)
    return found


def test_every_kind_is_searched_alone_from_wide_to_narrow_and_stops_at_the_first_that_loses_too_much() -> None:
    """The metric here knows only how many bits stand on the model: conv needs 8, fc 2, activations 4."""
    need, tried = {"conv": 8, "fc": 2, "act": 4}, []

    def metric(model: nn.Module) -> float:
        found = bits_of(model)
        tried.append(found)
        return 1.0 - 0.1 * sum(bits < need[kind] for kind, bits in found.items())

    model, task = small_cnn(), small_task()
    found, seen = watched(model, task, None, 2)
    numbers = Numbers(
        lambda site, bits: dynamic_weights(site, bits, "noclip"), lambda held, bits: dynamic_acts(held, bits, "noclip")
    )
    object.__setattr__(measured := copy.copy(task), "evaluate", metric)
    with recording() as ledger:
        narrowed(model, measured, numbers, seen, list(found), widths=(4, 16, 8, 2, 1), margin=0.05, fixed={})
    assert bits_of(model) == need
    alone = (
        [{"conv": b} for b in (16, 8, 4)] + [{"fc": b} for b in (16, 8, 4, 2, 1)] + [{"act": b} for b in (16, 8, 4, 2)]
    )
    assert tried == [{}, *alone, need], "the combination is measured again, not assumed"
    assert any("together accuracy 1.0000, a drop of 0" in told for told in ledger.notes)
    assert [row["bits"] for row in ledger.tables["bit widths"]] == [next(iter(row.values())) for row in alone]


def test_a_kind_that_loses_too_much_with_all_widths_keeps_the_widest_and_that_is_said() -> None:
    model, task = small_mlp(), small_task()
    found, seen = watched(model, task, None, 2)
    numbers = Numbers(
        lambda site, bits: dynamic_weights(site, bits, "noclip"), lambda held, bits: dynamic_acts(held, bits, "noclip")
    )
    object.__setattr__(measured := copy.copy(task), "evaluate", lambda m: 1.0 - len(bits_of(m)))
    with recording() as ledger:
        narrowed(model, measured, numbers, seen, list(found), widths=(8, 4), margin=0.05, fixed={})
    assert bits_of(model) == {"fc": 8, "act": 8}, "there is no convolution"
    assert sum("even 8 bits lose more" in told for told in ledger.notes) == 2


@pytest.mark.parametrize("name", IDS)
def test_the_combination_stays_close_and_is_told(name: str) -> None:
    torch.manual_seed(0)
    task = small_task()
    model = fit(small_cnn(), task, epochs=8, lr=0.01).eval()
    options = {"widths": [16, 8, 4], "calibration_batches": 2, "epochs": 1}
    with recording() as ledger:
        entry(name)(model, task, **options)
    assert any("together accuracy" in told for told in ledger.notes)
    assert evaluate(model, task).value >= 0.9


@pytest.mark.parametrize("name", IDS)
def test_bad_input(name: str) -> None:
    task = small_task()
    with pytest.raises(BadOption, match=r"widths=\[\]"):
        entry(name)(small_mlp(), task, widths=[])
    with pytest.raises(BadOption, match="widths"):
        entry(name)(small_mlp(), task, widths=[0])
    with pytest.raises(BadData, match="calibration data are empty"):
        entry(name)(small_mlp(), Task(train=task.train, valid=task.valid, calibration=[]))
    zero = small_mlp()
    for path in ("1", "3"):
        zero.get_submodule(path).weight.data.zero_()
    with pytest.raises(CompressionError, match="nothing to quantize"):
        entry(name)(zero, task)
    zero.get_submodule("1").weight.data[0, 0] = torch.nan
    with pytest.raises(BadData, match="not finite"):
        entry(name)(zero, task)


def test_forms_know_their_limits() -> None:
    assert Form.restored("Minifloat", {"exponent": 9, "mantissa": 2}, {}).unsound()
    assert not Form.restored("Minifloat", {"exponent": 4, "mantissa": 2}, {}).unsound()
