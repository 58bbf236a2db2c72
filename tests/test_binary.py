"""Forms of signs: values, gradients, sizes of windows, what a file may hold, thresholds of integers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.core.binary import (
    BinaryWeights,
    SignInput,
    SignWeights,
    SizedSignInput,
    TimesSize,
    constant_part,
    sign_through,
    signs,
)
from featherweight.core.forms import Form, Mask, attach, bake, codes_of
from featherweight.core.thresholds import integer_thresholds


def test_the_gradient_of_a_sign_is_that_of_a_clipped_line() -> None:
    value = torch.tensor([-3.0, -0.5, 0.0, 1.9, 2.1], requires_grad=True)
    out = sign_through(value, 2.0)
    out.sum().backward()
    assert value.grad is not None
    assert out.tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0]
    assert value.grad.tolist() == [0.0, 0.5, 0.5, 0.5, 0.0]


def test_drawn_signs_are_right_on_average_and_only_drawn_in_training() -> None:
    weight, scale = torch.linspace(-1.5, 1.5, 7), torch.tensor(1.0)
    form = SignWeights(scale, None, stochastic=True)
    draws = torch.stack([form(weight) for _ in range(4000)])
    assert set(draws.unique().tolist()) == {-1.0, 1.0}
    assert ((draws.mean(0) - weight.clamp(-1, 1)).abs() < 5 / 4000**0.5).all()
    assert torch.equal(form.eval()(weight), signs(weight))
    with torch.no_grad():
        assert torch.equal(form.train()(weight), signs(weight))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 50), st.sampled_from([0, None]), st.booleans(), st.booleans())
def test_codes_decode_to_the_weight_bit_for_bit(seed: int, axis: int | None, masked: bool, fixed: bool) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(3, 5, 3)
    if masked:
        attach(layer, Mask(torch.rand(5, 3, 3, 3) > 0.5))
    scale = torch.rand(()) if axis is None else torch.rand(5)
    attach(layer, SignWeights(scale, axis, stochastic=True) if fixed else BinaryWeights(axis))
    wanted = layer.eval().weight.detach().clone()
    codes = codes_of(bake(layer))
    assert codes is not None
    assert torch.equal(codes.decode(), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": "same", "dilation": 2},
        {"stride": 2, "padding": (2, 0)},
        {"groups": 2, "padding": 1},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_sizes_are_the_mean_over_what_a_kernel_reads(options: dict) -> None:
    """By the columns that the convolution multiplies: unfolded, and of each group their mean size."""
    conv, x = nn.Conv2d(4, 6, 3, bias=False, **options), torch.randn(2, 4, 9, 9)
    shift = torch.randn(4)
    form = SizedSignInput(shift, -3, 1.0, conv)
    sign, size = form(x)
    centred = x - shift.view(-1, 1, 1)
    assert torch.equal(sign, signs(centred))
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(centred, conv._reversed_padding_repeated_twice, mode)
    columns = F.unfold(padded, 3, conv.dilation, 0, conv.stride).view(2, conv.groups, -1, *conv(x).shape[-2:])
    torch.testing.assert_close(size, columns.abs().mean(2))
    attach(conv, form, "input")
    attach(conv, TimesSize(-3), "output")
    plain = F.conv2d(
        F.pad(sign, conv._reversed_padding_repeated_twice, mode),
        conv.weight,
        None,
        conv.stride,
        0,
        conv.dilation,
        conv.groups,
    )
    torch.testing.assert_close(conv(x), plain * size.repeat_interleave(6 // conv.groups, 1))


def test_a_linear_layer_has_one_size_a_row_and_its_bias_comes_after_it() -> None:
    layer, x, bias = nn.Linear(5, 3, bias=False), torch.randn(2, 7, 5), torch.randn(3)
    attach(layer, SizedSignInput(torch.zeros(5), -1, 1.0, layer), "input")
    attach(layer, TimesSize(-1, bias), "output")
    wanted = F.linear(signs(x), layer.weight) * x.abs().mean(-1, keepdim=True) + bias
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(copy.deepcopy(layer)(x), wanted)


def test_nothing_is_left_behind_by_a_call() -> None:
    layer = nn.Linear(5, 3, bias=False)
    before = set(vars(layer))
    attach(layer, SizedSignInput(torch.zeros(5), -1, 1.0, layer), "input")
    attach(layer, TimesSize(-1), "output")
    layer(torch.randn(2, 5))
    assert set(vars(layer)) == before


@pytest.mark.parametrize(("groups", "shape"), [(1, (6, 4, 3, 3)), (2, (6, 2, 3, 3)), (1, (6, 4))])
def test_the_constant_part_is_what_a_layer_makes_of_a_constant(groups: int, shape: tuple[int, ...]) -> None:
    weight, shift = torch.randn(shape), torch.randn(4)
    if len(shape) == 2:
        wanted = F.linear(shift, weight)
    else:
        wanted = F.conv2d(shift.view(1, 4, 1, 1).expand(1, 4, 3, 3), weight, groups=groups).flatten()
    torch.testing.assert_close(constant_part(weight, shift, groups), wanted)


@settings(deadline=None)
@given(st.integers(0, 200))
def test_a_batch_norm_and_a_sign_are_one_comparison_of_integers(seed: int) -> None:
    """Every sum, every channel, scales of both signs and zero: the very signs that the floats give."""
    torch.manual_seed(seed)
    n, norm = 40, nn.BatchNorm1d(8).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8))
        norm.weight[0] = 0.0
        norm.bias.copy_(torch.randn(8) * 3)
        norm.bias[1] = 0.0
        norm.running_mean.copy_(torch.randn(8) * 10)  # type: ignore[union-attr]
        norm.running_mean[1] = 4.0  # type: ignore[index] # sums on the very threshold: sign(0) = 1 on both sides
        norm.running_var.copy_(torch.rand(8) * 50 + 0.1)  # type: ignore[union-attr]
        found = integer_thresholds(norm, 8, -n, n)
        sums = torch.arange(-n, n + 1).unsqueeze(1).expand(-1, 8)
        assert torch.equal(found.signs(sums), signs(norm(sums.float())).long())
        slope = norm.weight * (norm.running_var + norm.eps).rsqrt()  # type: ignore[operator]
        exact = norm.running_mean - norm.bias / slope  # type: ignore[operator]
    for c in range(2, 8):
        if abs(float(exact[c])) < n and abs(float(exact[c]) - round(float(exact[c]))) > 1e-3:
            edge = exact[c].ceil() if slope[c] > 0 else -exact[c].floor()
            assert (int(found.direction[c]), int(found.threshold[c])) == (int(slope[c].sign()), int(edge))


def test_a_rectifier_and_a_shift_between_them_change_nothing() -> None:
    norm = nn.BatchNorm1d(4).eval()

    def value(sums: Tensor) -> Tensor:
        return norm(sums).relu() - torch.tensor([0.0, 0.5, 2.0, -1.0])

    found = integer_thresholds(value, 4, -9, 9)
    sums = torch.arange(-9, 10).unsqueeze(1).expand(-1, 4)
    assert torch.equal(found.signs(sums), signs(value(sums.float())).long())


@pytest.mark.parametrize(
    "form",
    [
        BinaryWeights(0),
        SignWeights(torch.ones(3), 0),
        SignInput(torch.zeros(3), -3, 1.0),
        SizedSignInput(torch.zeros(4), -3, 1.0, nn.Conv2d(4, 2, 3, padding=1)),
        SizedSignInput(torch.zeros(4), -1, 1.0, nn.Linear(4, 2)),
        TimesSize(-3, torch.zeros(2)),
    ],
    ids=lambda form: type(form).__name__,
)
def test_forms_are_restored_and_damaged_ones_are_found(form: Form) -> None:
    held, tensors = form.state()
    assert Form.restored(type(form).__name__, held, tensors).unsound() == ""
    for key in held:
        damaged = Form.restored(type(form).__name__, {**held, key: {"no": "sense"}}, tensors)
        assert damaged.unsound(), key
    extra = Form.restored(type(form).__name__, held, {**tensors, "b.more": torch.zeros(1)})
    assert extra.unsound()
