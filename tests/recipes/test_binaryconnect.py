"""The paper's claims: signs in both passes, right on average, float weights that stay within bounds."""

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.binary import clip, sign_weights
from featherweight.core.forms import Mask, attach, bake, codes_of, originals
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.errors import CompressionError


@pytest.mark.parametrize("stochastic", [False, True])
def test_forward_weights_are_two_values_and_latent_ones_stay_between_them(
    trained: tuple[nn.Module, Task], stochastic: bool
) -> None:
    model, task = trained
    small = entry("binaryconnect")(copy.deepcopy(model), task, epochs=8, lr=0.01, stochastic=stochastic)
    assert evaluate(small, task).value >= evaluate(model, task).value - 0.1
    for path in ("0", "3", "8"):
        (free,) = originals(small.get_submodule(path), "weight")
        free = free.detach().clone()
        layer = bake(copy.deepcopy(small)).get_submodule(path)
        weight, codes = layer.weight, codes_of(layer)
        assert isinstance(weight, Tensor)
        assert codes is not None
        assert set(codes.symbols.unique().tolist()) == {-1, 1}
        scale = weight.detach().abs()
        assert (free.abs() <= scale * 1.000001).all()
        assert ((free.abs() - scale).abs() < 1e-6 * scale).any(), "some were clipped"


def test_the_mean_of_drawn_weights_is_the_clipped_weight() -> None:
    layer = nn.Linear(40, 3)
    site = Site("", layer)
    with torch.no_grad():
        before = layer.weight.clone()
        scale = before.abs().mean(1, keepdim=True)
    attach(layer, sign_weights(site, stochastic=True))
    draws = torch.stack([layer.weight.detach() for _ in range(4000)])
    wanted = torch.minimum(torch.maximum(before, -scale), scale)
    assert ((draws.mean(0) - wanted).abs() < 5 * scale / 4000**0.5).all()
    clip([site])
    torch.testing.assert_close(originals(layer, "weight")[0].detach(), wanted)


def test_the_gradient_is_applied_to_the_float_weight() -> None:
    layer, wanted = nn.Linear(4, 3), torch.randn(3, 4)
    attach(layer, sign_weights(Site("", layer)))
    (layer.weight * wanted).sum().backward()
    gradient = originals(layer, "weight")[0].grad
    assert gradient is not None
    assert torch.equal(gradient, wanted)


def test_the_scale_is_that_of_the_survivors() -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -4.0, 9.0, 7.0]]))
    attach(layer, Mask(torch.tensor([[True, True, False, False]])))
    attach(layer, sign_weights(Site("", layer)))
    assert layer.weight.tolist() == [[3.0, -3.0, 0.0, 0.0]]


def test_nothing_between_the_ends_is_refused() -> None:
    with pytest.raises(CompressionError, match="keep_first_last=False"):
        entry("binaryconnect")(small_mlp(), small_task(), epochs=0, keep_first_last=True)
