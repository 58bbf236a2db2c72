"""The paper's claims: drawn weights are right on average, and a training step multiplies almost never."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from featherweight.catalogue import entry
from featherweight.core.forms import Mask, attach, bake, codes_of, originals
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.errors import UnknownName
from featherweight.recipes.few_multiplications import TernaryConnect, _drawn, shifted, shifted_back_propagation


def needs_multiplier(value: Tensor) -> Tensor:
    """Where a factor is neither zero nor a power of two with a sign."""
    mantissa, _ = value.detach().double().abs().frexp()
    return ((value != 0) & (mantissa != 0.5)).double()


class Census(TorchDispatchMode):
    """Counts the products of two numbers of which neither is a power of two, in matrix products and elementwise."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = func.overloadpacket.__name__, [a for a in args if isinstance(a, Tensor)]
        if name in ("mm", "addmm"):
            a, b = tensors[-2:]
            self.count += float(needs_multiplier(a).sum(0) @ needs_multiplier(b).sum(1))
        elif name in ("mul", "div", "mul_", "div_") and len(tensors) == 2 and tensors[0].is_floating_point():
            a, b = torch.broadcast_tensors(*tensors)
            self.count += float((needs_multiplier(a) * needs_multiplier(b)).sum())
        return func(*args, **(kwargs or {}))


def multiplications(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with Census() as census:
        F.cross_entropy(model(x), y).backward()
    return census.count


def test_a_training_step_keeps_less_than_two_percent_of_its_multiplications() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    x, y = torch.randn(32, 64), torch.arange(32) % 10
    before = multiplications(model, x, y)
    layers = [m for m in model if isinstance(m, nn.Linear)]
    for layer in layers:
        attach(layer, _drawn(Site("", layer), ternary=True))
    weights_only = multiplications(model, x, y)
    with shifted_back_propagation(list(layers), 4):
        after = multiplications(model, x, y)
    assert before > 5e5
    assert weights_only > 0.2 * before, "the gradients of the weights still multiply"
    assert after < 0.02 * before


def test_the_mean_of_drawn_ternary_weights_is_the_weight() -> None:
    form, weight = TernaryConnect(torch.tensor(1.0), None), torch.linspace(-1.2, 1.2, 9)
    draws = torch.stack([form(weight) for _ in range(4000)])
    assert set(draws.unique().tolist()) == {-1.0, 0.0, 1.0}
    for i, value in enumerate(weight.tolist()):  # never a sign that the weight does not have
        assert (draws[:, i] * value >= 0).all()
    assert ((draws.mean(0) - weight.clamp(-1, 1)).abs() < 5 * 0.5 / 4000**0.5 + 1e-6).all()


def test_the_result_is_the_most_likely_weight_not_a_drawn_one() -> None:
    form, weight = TernaryConnect(torch.tensor(1.0), None).eval(), torch.tensor([-0.9, -0.2, 0.4, 0.6])
    assert form(weight).tolist() == [-1.0, 0.0, 0.0, 1.0]


@settings(deadline=None)
@given(st.floats(-1e4, 1e4, width=32), st.integers(1, 8))
def test_inputs_become_the_nearest_shift(value: float, shifts: int) -> None:
    found = float(shifted(torch.tensor(value), shifts))
    if value == 0:
        assert found == 0
        return
    choices = [2.0**e for e in range(-shifts, shifts + 1)]
    logs = torch.tensor([abs(torch.tensor(abs(value)).log2() - torch.tensor(c).log2()) for c in choices])
    assert abs(logs[choices.index(abs(found))] - logs.min()) < 1e-5
    assert found * value > 0


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Conv2d(3, 4, 3, stride=2, padding=1)], ids=lambda m: type(m).__name__
)
def test_only_the_gradient_of_the_weight_sees_shifts(layer: nn.Module) -> None:
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 8, 8)
    x.requires_grad_()
    plain = layer(x)
    delta = torch.randn_like(plain)
    of_input, of_bias = torch.autograd.grad(plain, [x, layer.bias], delta)  # type: ignore[list-item]
    (of_weight,) = torch.autograd.grad(layer(shifted(x.detach(), 4)), [layer.weight], delta)  # type: ignore[list-item]
    with shifted_back_propagation([layer], 4):
        out = layer(x)
        found = torch.autograd.grad(out, [x, layer.bias, layer.weight], delta)  # type: ignore[list-item]
    torch.testing.assert_close(out, plain)
    for one, wanted in zip(found, (of_input, of_bias, of_weight), strict=True):
        torch.testing.assert_close(one, wanted)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(("connect", "symbols"), [("ternary", {-1, 0, 1}), ("binary", {-1, 1})])
def test_training_recovers_at_scales_that_are_powers_of_two(
    trained: tuple[nn.Module, Task], connect: str, symbols: set[int]
) -> None:
    model, task = trained
    small = entry("few_multiplications")(copy.deepcopy(model), task, epochs=8, lr=0.01, connect=connect)
    assert evaluate(small, task).value >= evaluate(model, task).value - 0.1
    for path in ("0", "3", "8"):
        (free,) = originals(small.get_submodule(path), "weight")
        layer = bake(copy.deepcopy(small)).get_submodule(path)
        codes = codes_of(layer)
        assert codes is not None
        scale = codes.rule.scale  # type: ignore[union-attr]
        assert set(codes.symbols.unique().tolist()) <= symbols
        assert not needs_multiplier(scale).any()
        assert (free.abs() <= scale.view(-1, *[1] * (free.dim() - 1))).all()


@pytest.mark.parametrize("ternary", [True, False])
def test_masks_and_zero_channels_are_kept(ternary: bool) -> None:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -2.0, 9.0, 7.0], [0.0, 0.0, 0.0, 0.0]]))
    attach(layer, Mask(torch.tensor([[True, True, False, False], [True, True, True, True]])))
    attach(layer, _drawn(Site("", layer), ternary=ternary))
    wanted = layer.eval().weight.detach().clone()
    assert wanted.tolist() == [[2.0, -2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    codes = codes_of(bake(layer))
    assert codes is not None
    assert torch.equal(codes.decode(), wanted)


def test_bad_options(trained: tuple[nn.Module, Task]) -> None:
    with pytest.raises(UnknownName, match="ternary"):
        entry("few_multiplications")(copy.deepcopy(trained[0]), trained[1], connect="ternaryy", epochs=0)


def test_shifts_change_what_is_learned(trained: tuple[nn.Module, Task]) -> None:
    found = {}
    for shifts in (None, 1, 4):
        torch.manual_seed(0)
        small = entry("few_multiplications")(copy.deepcopy(trained[0]), trained[1], shifts=shifts, epochs=1, lr=0.01)
        found[shifts] = originals(small.get_submodule("3"), "weight")[0].detach()
    assert not torch.equal(found[None], found[1])
    assert not torch.equal(found[None], found[4])
    assert not torch.equal(found[1], found[4])
