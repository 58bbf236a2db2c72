"""Casts agree with the hardware's formats, stay where they are, and err no more than half a unit in the last place."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import featherweight as fw
from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.blueprint import blueprint, conform
from featherweight.core.fit import fit
from featherweight.core.forms import Form, Mask, attach, bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.levels import Levels
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData, BadOption
from featherweight.recipes.precision_cast import NARROW, Cast, cast_form, even_edges, float_levels

EIGHT = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FORMATS = ["fp32", "fp16", "bf16", "e4m3", "e5m2", "e2m1"]
MANTISSA = {"fp16": (10, 2.0**-14), "bf16": (7, 2.0**-126), "e4m3": (3, 2.0**-6), "e5m2": (2, 2.0**-14), "e2m1": (1, 1)}


def plain(kind: str) -> Form:
    return cast_form(Site.of(torch.ones(1)), kind, scaled=False)


@pytest.mark.parametrize("kind", list(EIGHT))
def test_the_levels_are_the_numbers_of_the_type(kind: str) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(EIGHT[kind]).double()
    wanted = torch.unique(every[every.isfinite()] + 0.0)
    assert torch.equal(float_levels(*NARROW[kind]), wanted)


def test_four_bits_are_sixteen_codes() -> None:
    assert len(float_levels(*NARROW["e2m1"])) == 15  # zero has two


@pytest.mark.parametrize("kind", list(EIGHT))
def test_rounding_is_that_of_the_type_even_half_way(kind: str) -> None:
    levels = float_levels(*NARROW[kind])
    half_way = ((levels[1:] + levels[:-1]) / 2).float()
    values = torch.cat([half_way, levels.float(), torch.randn(2000) * 10, torch.randn(2000) * 1e-3])
    assert torch.equal(plain(kind)(values), values.to(EIGHT[kind]).float() + 0.0)


def test_half_way_goes_to_the_even_number() -> None:
    form = Levels(float_levels(*NARROW["e2m1"]).float(), even_edges(float_levels(*NARROW["e2m1"])))
    assert form(torch.tensor([0.25, 0.75, 1.25, 2.5, 5.0, -0.25, -0.75, -5.0, 9.0])).tolist() == [
        0.0, 1.0, 1.0, 2.0, 4.0, 0.0, -1.0, -4.0, 6.0,
    ]  # fmt: skip


@settings(deadline=None)
@given(st.integers(0, 100), st.sampled_from(list(MANTISSA)))
def test_errors_are_half_a_unit_in_the_last_place(seed: int, kind: str) -> None:
    torch.manual_seed(seed)
    values = torch.randn(200) * 2.0 ** (seed % 8 - 4)
    form, (p, least) = plain(kind), MANTISSA[kind]
    cast = form(values)
    assert torch.equal(form(cast), cast)
    normal = (values.abs() >= least) & (values.abs() <= (6 if kind == "e2m1" else 400))
    assert ((cast - values).abs() <= 2.0 ** -(p + 1) * values.abs())[normal].all()


@pytest.mark.parametrize(("kind", "top"), [("fp16", 65504.0), ("bf16", 3.3895313892515355e38), ("e4m3", 448.0)])
def test_what_is_too_large_saturates_or_is_refused(kind: str, top: float) -> None:
    model, task = small_mlp().double(), Task(valid=[])
    model[1].weight.data[0, 0] = -2 * top
    small = entry("precision_cast")(copy.deepcopy(model), task, format=kind, scaled=False)
    assert float(small[1].weight.detach()[0, 0]) == -top
    with pytest.raises(BadData, match=r"1 weights of 1 are above .*overflow=.saturate"):
        entry("precision_cast")(model, task, format=kind, overflow="inf", scaled=False)


def test_subnormals_are_kept_and_what_is_lost_is_said() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data.copy_(torch.tensor([[2.0**-24, 2.0**-26]]))
    with recording() as ledger:
        entry("precision_cast")(model, Task(valid=[]))
    assert model[0].weight.tolist() == [[2.0**-24, 0.0]]
    assert any("1 of 2 weights are too small for fp16" in told for told in ledger.notes)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_file_holds_the_weight_bit_for_bit_in_the_bytes_of_the_format(
    kind: str, masked: bool, tmp_path: Path
) -> None:
    task, model = small_task(), small_mlp()
    if masked:
        attach(model[1], Mask(torch.rand(32, 64) > 0.5))
    small = entry("precision_cast")(model, task, format=kind)
    wanted = small[1].weight.detach().clone()
    bake(small)
    codes = codes_of(small[1])
    if kind in NARROW:
        assert codes is not None
        assert torch.equal(codes.decode(), wanted)
    fw.save(small, tmp_path / "m.fw", bare=True)
    assert torch.equal(fw.load(tmp_path / "m.fw", into=small_mlp())[1].weight, wanted)
    bits = {"fp32": 32, "fp16": 16, "bf16": 16}.get(kind, 8 if kind != "e2m1" else 4)
    assert (tmp_path / "m.fw").stat().st_size < (32 * 64 + 32 * 4) * bits / 8 + 1100


def test_a_cast_costs_nothing_and_survives_training_and_the_file() -> None:
    task = small_task()
    model = fit(small_cnn(), task, epochs=8, lr=0.01).eval()
    values = {kind: entry("precision_cast")(copy.deepcopy(model), task, format=kind) for kind in FORMATS}
    floor = evaluate(model, task).value
    assert all(evaluate(values[kind], task).value >= floor - 0.04 for kind in FORMATS[:5])
    tuned = fit(values["e2m1"], task, epochs=2, lr=0.01).eval()
    assert len(tuned.get_submodule("3").weight.unique()) <= 15
    assert evaluate(tuned, task).value >= floor - 0.04
    again = conform(small_cnn(), *blueprint(tuned)).eval()
    x = task.inputs()[0][0]
    with torch.no_grad():
        assert torch.equal(again(x), tuned(x))


def test_inputs_can_be_rounded_too_and_embeddings_are_weights() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    seen: list[Tensor] = []
    entry("precision_cast")(model, Task(valid=[]), format="bf16", activations="bf16")
    model[1].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(torch.tensor([1, 2]))
    assert torch.equal(seen[0], seen[0].bfloat16().float())
    assert torch.equal(model[0].weight, model[0].weight.bfloat16().float())


def test_refusals() -> None:
    model = small_mlp()
    with pytest.raises(BadOption, match="format"):
        entry("precision_cast")(model, Task(valid=[]), format=16)
    assert Cast("fp16").unsound() == ""
    model[1].weight.data[0, 0] = torch.inf
    with pytest.raises(BadData, match="not finite"):
        entry("precision_cast")(model, Task(valid=[]))
