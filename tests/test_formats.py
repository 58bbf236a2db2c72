"""The golden test of all number formats: what is packed and read again is the simulated weight, bit for bit."""

import pytest
import torch
from torch import nn

from featherweight.catalogue import ingredients
from featherweight.coding import pack_tensor, unpack_tensor
from featherweight.core.forms import Mask, attach, bake, codes_of, forms_of
from featherweight.core.site import Site
from featherweight.errors import BadOption

LAYERS = {
    "linear": lambda: nn.Linear(20, 12),
    "convolution": lambda: nn.Conv2d(4, 6, 3),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "one weight": lambda: nn.Linear(1, 1),
    "a channel of zeros": lambda: zeroed(nn.Conv2d(4, 6, 3)),
}


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    layer.weight.data[2] = 0.0
    return layer


def snapped(layer: nn.Module, name: str, bits: int, masked: bool) -> nn.Module | None:
    """The layer with a grid on its weight; None where the grid has other bits."""
    if masked:
        attach(layer, Mask(torch.arange(layer.weight.numel()).view_as(layer.weight) % 3 != 0))
    try:
        attach(layer, ingredients("grid")[name](Site("", layer), bits))
    except BadOption:
        return None
    return layer


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", sorted(ingredients("grid")))
def test_packed_and_read_again_it_is_the_simulated_weight(name: str, kind: str) -> None:
    worked = 0
    for bits in range(1, 9):
        for masked in (False, True):
            torch.manual_seed(bits)
            layer = snapped(LAYERS[kind](), name, bits, masked)
            if layer is None:
                continue
            worked += 1
            with torch.no_grad():
                simulated = layer.weight.clone()
            held = [type(form).__name__ for form in forms_of(layer)]
            codes = codes_of(bake(layer))
            assert codes is not None, held
            assert torch.equal(layer.weight, simulated)
            assert torch.equal(unpack_tensor(pack_tensor(layer.weight, codes)), simulated)
            if masked:
                gone = torch.arange(simulated.numel()).view_as(simulated) % 3 == 0
                assert not simulated[gone].any()
    assert worked


@pytest.mark.parametrize("name", sorted(ingredients("grid")))
def test_the_gradient_of_a_snapped_weight_reaches_the_latent_one(name: str) -> None:
    torch.manual_seed(0)
    for bits in (1, 2, 4, 8):
        layer = snapped(nn.Linear(20, 12), name, bits, masked=False)
        if layer is None:
            continue
        layer(torch.randn(5, 20)).square().sum().backward()
        grads = [p.grad for p in layer.parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in grads)
        assert all(g is None or g.isfinite().all() for g in grads)
