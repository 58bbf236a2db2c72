"""The paper's claims: alpha is the scale of least squares, what error it leaves, the true gradient, one bit."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.catalogue import entry
from featherweight.core.binary import BinaryWeights
from featherweight.core.forms import Mask, attach, bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.export import onnx
from featherweight.ingredients.grid.bwn import binary


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 50))
def test_alpha_is_the_scale_of_least_squares_and_the_error_is_known(n: int, seed: int) -> None:
    weight = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    snapped = BinaryWeights(0)(weight)
    alpha, sign = snapped.abs()[:, 0], snapped.sign()
    torch.testing.assert_close(alpha, (sign * weight).sum(1) / n)
    left = (weight - snapped).square().sum(1)
    torch.testing.assert_close(left, weight.square().sum(1) - n * alpha.square(), rtol=1e-4, atol=1e-5)
    for changed in (alpha * 1.01, alpha * 0.99):
        assert ((weight - changed.unsqueeze(1) * sign).square().sum(1) >= left - 1e-6).all()


def test_the_gradient_is_that_of_alpha_times_a_clipped_sign() -> None:
    weight = torch.tensor([[0.5, -2.0, 0.1, -0.3]], requires_grad=True)
    g = torch.tensor([[1.0, 2.0, -3.0, 0.5]])
    (BinaryWeights(0)(weight) * g).sum().backward()
    w = weight.detach()
    wanted = w.sign() * (w.sign() * g).sum() / 4 + w.abs().mean() * g * (w.abs() <= 1)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, wanted)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 50), st.sampled_from([0, None]), st.booleans())
def test_codes_decode_to_the_weight_bit_for_bit(seed: int, axis: int | None, masked: bool) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(3, 5, 3)
    if masked:
        attach(layer, Mask(torch.rand(5, 3, 3, 3) > 0.5))
    attach(layer, BinaryWeights(axis))
    wanted = layer.weight.detach().clone()
    codes = codes_of(bake(layer))
    assert codes is not None
    assert torch.equal(codes.decode(), wanted)
    assert set(codes.symbols.unique().tolist()) <= ({-1, 0, 1} if masked else {-1, 1})


def test_the_scale_is_that_of_the_survivors_and_zeros_stay() -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -4.0, 9.0, 7.0]]))
    attach(layer, Mask(torch.tensor([[True, True, False, False]])))
    attach(layer, BinaryWeights())
    assert layer.weight.tolist() == [[3.0, -3.0, 0.0, 0.0]]


def test_a_channel_of_zeros_stays_zero() -> None:
    assert torch.equal(BinaryWeights(0)(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_training_brings_the_metric_back_and_the_file_has_one_bit(
    trained: tuple[nn.Module, Task], tmp_path: Path
) -> None:
    model, task = trained
    with recording() as ledger:
        small = entry("bwn")(copy.deepcopy(model), task, epochs=4, lr=0.01)
    assert set(ledger.skipped) == {"0", "8"}
    assert evaluate(small, task).value >= evaluate(model, task).value - 0.04
    assert onnx(small, tmp_path / "m.onnx", example_inputs=task.inputs()).int8_weights == 1
    weight = bake(small).get_submodule("3").weight
    assert isinstance(weight, Tensor)
    assert all(len(channel.abs().unique()) == 1 for channel in weight)


def test_refusals(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    with pytest.raises(BadOption, match="pass weight_bits=1"):
        binary(Site.of(torch.randn(2, 2)), bits=8)
    with pytest.raises(CompressionError, match="keep_first_last=False"):
        entry("bwn")(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), task, epochs=1)
    with pytest.raises(BadOption, match="drop first_last_bits"):
        entry("bwn")(copy.deepcopy(model), task, first_last_bits=8)
