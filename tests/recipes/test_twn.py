"""The paper's claims: least-squares scales, the rule of 0.7 near the optimum, int8 files, training that recovers."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import small_task
from featherweight.catalogue import entry
from featherweight.core.forms import Mask, attach, bake, codes_of
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, MissingNeed
from featherweight.export import onnx
from featherweight.ingredients.grid.twn import TernaryWeights, ternary


def error(form: TernaryWeights, weight: Tensor) -> float:
    return float((form(weight).double() - weight.double()).square().sum())


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(0, 100))
def test_no_ternary_weights_are_nearer(n: int, seed: int) -> None:
    """Against all sets of zeros, each with its best scale."""
    weight = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    best = float(weight.square().sum())
    for keep in itertools.product([0.0, 1.0], repeat=n):
        chosen = weight.abs() * torch.tensor(keep)
        if sum(keep):
            best = min(best, float(weight.square().sum() - chosen.sum().square() / sum(keep)))
    assert error(TernaryWeights(None), weight) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_alpha_is_the_scale_of_least_squares(exact: bool) -> None:
    weight = torch.randn(500)
    symbols, alpha = TernaryWeights(None, exact=exact).symbols(weight, None)
    torch.testing.assert_close(alpha, (symbols * weight).sum() / symbols.square().sum())


def draws(kind: str, n: int = 1 << 20) -> Tensor:
    uniform = torch.rand(n) - 0.5
    laplace = -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-12).log()
    return {"normal": torch.randn(n), "uniform": uniform, "laplace": laplace}[kind]


@pytest.mark.parametrize(("kind", "ratio"), [("normal", 1.0076), ("uniform", 1.0038), ("laplace", 1.0689)])
def test_the_rule_is_near_the_optimum_but_not_for_laplacian_weights(kind: str, ratio: float) -> None:
    weight = draws(kind)
    found = error(TernaryWeights(None, exact=False), weight) / error(TernaryWeights(None), weight)
    assert found == pytest.approx(ratio, abs=0.002)


def test_the_rule_by_hand() -> None:
    weight = torch.tensor([0.1, -0.5, 1.0, 0.3])  # 0.7 E|w| = 0.3325
    torch.testing.assert_close(TernaryWeights(None, exact=False)(weight), torch.tensor([0.0, -0.75, 0.75, 0.0]))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 50), st.sampled_from([0, None]), st.booleans(), st.booleans())
def test_codes_decode_to_the_weight_bit_for_bit(seed: int, axis: int | None, exact: bool, masked: bool) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(3, 5, 3)
    if masked:
        attach(layer, Mask(torch.rand(5, 3, 3, 3) > 0.5))
    attach(layer, TernaryWeights(axis, exact=exact))
    wanted = layer.weight.detach().clone()
    codes = codes_of(bake(layer))
    assert codes is not None
    assert torch.equal(codes.decode(), wanted)
    assert set(codes.symbols.unique().tolist()) <= {-1, 0, 1}


@pytest.mark.parametrize("exact", [True, False])
def test_threshold_and_scale_are_those_of_the_survivors(exact: bool) -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -2.0, 9.0, 7.0]]))
    attach(layer, Mask(torch.tensor([[True, True, False, False]])))
    attach(layer, TernaryWeights(0, exact=exact))
    assert layer.weight.tolist() == [[2.0, -2.0, 0.0, 0.0]]


def test_a_channel_of_zeros_or_of_one_size_is_exact() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.5, -0.5, 0.5]])
    assert torch.equal(TernaryWeights(0)(weight), weight)


def test_the_gradient_passes_straight_through() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    wanted = torch.randn(3, 4)
    (TernaryWeights(0)(weight) * wanted).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, wanted)


def test_training_brings_the_metric_back_and_the_file_holds_int8(
    trained: tuple[nn.Module, Task], tmp_path: Path
) -> None:
    model, task = trained
    small = entry("twn")(copy.deepcopy(model), task, epochs=4, lr=0.01)
    assert evaluate(small, task).value >= evaluate(model, task).value - 0.04
    report = onnx(small, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert report.int8_weights == 3
    weight = bake(small).get_submodule("3").weight
    assert isinstance(weight, Tensor)
    assert all(len(channel.unique()) <= 3 for channel in weight)


def test_a_teacher_may_help_and_must_be_there(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    with pytest.raises(MissingNeed, match=r"pass Task\(teacher=...\)"):
        entry("twn")(copy.deepcopy(model), task, epochs=1, teacher_share=0.5)
    taught = small_task(teacher=model)
    small = entry("twn")(copy.deepcopy(model), taught, epochs=4, lr=0.01, teacher_share=1.0)
    assert evaluate(small, task).value >= evaluate(model, task).value - 0.04


def test_other_bits_are_refused() -> None:
    with pytest.raises(BadOption, match="pass weight_bits=2"):
        ternary(Site.of(torch.randn(2, 2)), bits=4)
