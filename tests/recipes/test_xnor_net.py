"""The paper's claims: the approximation by signs and sizes, exact in integers, better than signs with one size."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.binary import SizedSignInput, Start, TimesSize, signs
from featherweight.core.fit import fit
from featherweight.core.forms import activation_form, bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.errors import CompressionError
from featherweight.export import onnx
from featherweight.recipes.xnor_net import binarize


def binary(conv: nn.Conv2d) -> nn.Conv2d:
    conv = copy.deepcopy(conv)
    binarize(conv, Site("", conv), Start(torch.zeros(conv.in_channels), 1.0, 1.0))
    return conv


def test_the_layer_is_equation_11() -> None:
    conv, x = nn.Conv2d(8, 5, 3, padding=1, bias=False), torch.randn(2, 8, 10, 10)
    A = x.abs().mean(1, keepdim=True)
    K = F.conv2d(A, torch.full((1, 1, 3, 3), 1 / 9), padding=1)
    alpha = conv.weight.detach().abs().mean((1, 2, 3)).view(-1, 1, 1)
    wanted = F.conv2d(signs(x), signs(conv.weight.detach()), padding=1) * K * alpha
    torch.testing.assert_close(binary(conv)(x).detach(), wanted)


def test_signs_and_weights_multiply_to_integers() -> None:
    """What an integer kernel computes, n - 2 popcount: odd and even alike with the n that a place has."""
    conv, x = nn.Conv2d(7, 5, 3, bias=False), torch.randn(2, 7, 10, 10)
    sums = F.conv2d(signs(x), signs(conv.weight.detach()))
    assert torch.equal(sums, sums.round())
    assert ((sums.long() - 63) % 2 == 0).all()
    alpha = conv.weight.detach().abs().mean((1, 2, 3)).view(-1, 1, 1)
    size = F.conv2d(x.abs().mean(1, keepdim=True), torch.full((1, 1, 3, 3), 1 / 9))
    torch.testing.assert_close(binary(conv)(x).detach(), sums * size * alpha)


def test_sizes_of_places_follow_the_image() -> None:
    """Parts of an image that are ten times as large get outputs ten times as large; one size for all does worse."""
    conv, x = nn.Conv2d(8, 5, 3, padding=1, bias=False), torch.randn(4, 8, 12, 12)
    x[..., :6] *= 10
    true, found = conv(x).detach(), binary(conv)(x).detach()
    flat = F.conv2d(signs(x), signs(conv.weight.detach()), padding=1)
    flat = flat * (flat * true).sum() / flat.square().sum()  # the best single size there is
    assert (found - true).square().sum() < 0.9 * (flat - true).square().sum()


def test_gradients_reach_inputs_weights_and_shifts() -> None:
    conv = binary(nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    conv(x).square().sum().backward()
    gradients = {name: p.grad for name, p in conv.named_parameters() if p.requires_grad}
    assert len(gradients) == 3  # weight, shift, the bias behind the sizes
    assert x.grad is not None
    for gradient in (x.grad, *gradients.values()):
        assert gradient is not None
        assert (gradient != 0).any()


def test_training_recovers_and_file_and_export_agree(trained: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = trained
    with recording() as ledger:
        small = entry("xnor_net")(copy.deepcopy(model), task, epochs=6, lr=0.01)
    assert set(ledger.skipped) == {"0", "8"}
    assert evaluate(small, task).value >= evaluate(model, task).value - 0.07
    layer = small.get_submodule("3")
    assert isinstance(activation_form(layer, "input"), SizedSignInput)
    assert isinstance(activation_form(layer, "output"), TimesSize)
    plain = bake(copy.deepcopy(small)).eval()
    codes = codes_of(plain.get_submodule("3"))
    assert codes is not None
    assert set(codes.symbols.unique().tolist()) == {-1, 1}
    x = task.inputs()[0][0]
    with torch.no_grad():
        fw.save(small, tmp_path / "m.fw", example_inputs=task.inputs())
        assert torch.equal(fw.load(tmp_path / "m.fw").eval()(x), plain(x))
    report = onnx(small, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert report.int8_weights == 1
    assert report.difference is not None
    assert report.difference < 1e-4


def test_a_network_without_batch_norms_keeps_its_scale_and_its_bias() -> None:
    torch.manual_seed(0)
    task = small_task()
    model = fit(small_mlp(), task, epochs=10, lr=0.01).eval()
    small = entry("xnor_net")(copy.deepcopy(model), task, epochs=0, keep_first_last=False).eval()
    x = task.inputs()[0][0]
    with torch.no_grad():
        assert 0.2 < float(small(x).std() / model(x).std()) < 5
    assert evaluate(small, task).value > 0.5
    layer = small.get_submodule("1")
    assert isinstance(layer, nn.Linear)
    assert not layer.bias.any()
    assert not layer.bias.requires_grad, "the size would multiply it"
    assert evaluate(entry("xnor_net")(model, task, epochs=6, lr=0.01, keep_first_last=False), task).value > 0.9


def test_constant_and_zero_inputs_stay_finite() -> None:
    layer = binary(nn.Conv2d(2, 3, 3))
    for value in (0.0, 1.0):
        out: Tensor = layer(torch.full((1, 2, 5, 5), value))
        assert torch.isfinite(out).all()


def test_nothing_between_the_ends_is_refused() -> None:
    with pytest.raises(CompressionError, match="keep_first_last=False"):
        entry("xnor_net")(small_mlp(), small_task(), epochs=0)
