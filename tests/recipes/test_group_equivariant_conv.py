"""Cohen and Welling 2016: convolutions over p4 and p4m by their definition, exact equivariance, invariant networks."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_task
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.forms import bake
from featherweight.core.rotations import ORDERS, division, turned
from featherweight.core.structured import StructuredConv2d
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption
from featherweight.ingredients.block.group_equivariant_conv import group_equivariant_conv
from featherweight.rewrite import rewrite

TURN, MIRROR = np.array([[0, -1], [1, 0]]), np.array([[1, 0], [0, -1]])  # of (row, column)
GROUPS = [pytest.param(group, id=group) for group in ORDERS]


def matrix(element):
    """The element as a matrix, independent of the code under test."""
    return np.linalg.matrix_power(TURN, element % 4) @ (MIRROR if element >= 4 else np.eye(2, dtype=int))


def conv(inputs, outputs, group, *, lifting=False, kernel=3, stride=1, bias=True, padding=None):
    plain = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 if padding is None else padding, bias=bias).double()
    return group_equivariant_conv(plain, group=group, lifting=lifting)


def over_group(x, group):
    return x.unflatten(1, (-1, ORDERS[group]))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("lifting", [True, False], ids=["lifting", "group"])
def test_it_is_the_convolution_of_the_paper(group, lifting):
    """Sums written out by eqs. 10 and 11 with the group's elements as matrices."""
    order, size = ORDERS[group], 4
    maps = 1 if lifting else order
    layer = conv(2 * maps, order, group, lifting=lifting, bias=False)
    psi = layer.filters.detach().reshape(2, maps, 3, 3).numpy()
    x = torch.randn(1, 2 * maps, size, size, dtype=torch.float64)
    f = np.pad(x.reshape(2, maps, size, size).numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    mats = [matrix(e) for e in range(order)]
    want = np.zeros((order, size, size))
    for r, inverse in enumerate(np.linalg.inv(m).astype(int) for m in mats):
        for s in range(maps):
            moved = 0 if lifting else next(e for e, m in enumerate(mats) if (m == inverse @ mats[s]).all())
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    a, b = inverse @ (dy, dx)
                    for i in range(2):
                        part = f[i, s, 1 + dy : 1 + dy + size, 1 + dx : 1 + dx + size]
                        want[r] += psi[i, moved, a + 1, b + 1] * part
    assert np.allclose(layer(x)[0].detach().numpy(), want, atol=1e-12)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (2, 1), (1, 1), (3, 2)])
def test_turned_input_turns_and_exchanges_the_maps(group, kernel, stride):
    order = ORDERS[group]
    first = conv(2, 3 * order, group, lifting=True, kernel=kernel)
    second = conv(3 * order, 2 * order, group, kernel=kernel, stride=stride)
    x = torch.randn(2, 2, 9, 9, dtype=torch.float64)

    def f(x):
        return over_group(second(first(x).relu()), group).detach()

    y = f(x)
    for u in range(order):
        expected = turned(y, u)[:, :, list(division(order)[u])]
        assert torch.allclose(f(turned(x, u)), expected, atol=1e-12)
    pooled = y.amax(2).mean((2, 3))
    assert torch.allclose(f(turned(x, order - 1)).amax(2).mean((2, 3)), pooled, atol=1e-12)


def test_stride_on_even_sizes_is_not_exact():
    layer = conv(1, 4, "p4", lifting=True, stride=2, bias=False)
    for size, exact in ((9, True), (8, False)):
        x = torch.randn(1, 1, size, size, dtype=torch.float64)
        same = torch.allclose(
            over_group(layer(turned(x, 1)), "p4"), turned(over_group(layer(x), "p4"), 1)[:, :, [3, 0, 1, 2]]
        )
        assert same is exact


@pytest.mark.parametrize("group", GROUPS)
def test_parameters_are_divided_by_the_group_and_multiplications_are_not(group):
    order, x = ORDERS[group], torch.randn(2, 16, 8, 8)
    plain = nn.Conv2d(16, 8 * order, 3, padding=1, bias=False)
    new = group_equivariant_conv(plain, group=group)
    before, after = (cost(nn.Sequential(m), x) for m in (plain, new))
    assert after.params * order == before.params
    assert after.macs == before.macs


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("lifting", [True, False], ids=["lifting", "group"])
def test_start_is_the_nearest_equivariant_filter(group, lifting):
    plain = nn.Conv2d(8, 16, 3, padding=1).double()
    new = group_equivariant_conv(plain, group=group, lifting=lifting)
    again = copy.deepcopy(plain)
    again.weight.data = new.dense().detach()
    kept = group_equivariant_conv(again, group=group, lifting=lifting)
    assert torch.allclose(kept.filters, new.filters, atol=1e-12), "an equivariant filter stays what it is"
    again.weight.data = plain.weight.data - new.dense().detach()
    rest = group_equivariant_conv(again, group=group, lifting=lifting)
    assert float(rest.filters.detach().abs().max()) < 1e-12, "what is lost is orthogonal to all of them"
    assert torch.equal(new.matrix.portable(new.free, torch.ones(1)), new.matrix.matrix(new.free)), "as ONNX makes it"
    assert torch.allclose(new.biases.view(-1, ORDERS[group]), plain.bias.view(-1, ORDERS[group]).mean(1, True))


def with_biases() -> nn.Sequential:
    """The small network with biases beside its first norm and without its second."""
    model = small_cnn()
    for at in (0, 3):
        old = model[at]
        model[at] = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    model[4] = nn.Identity()
    return model


@pytest.mark.parametrize("make", [small_cnn, with_biases])
@pytest.mark.parametrize(("group", "pool"), [("p4", "mean"), ("p4m", "max")])
def test_network_has_the_same_scores_however_the_image_is_turned(group, pool, make):
    task = small_task((1, 9, 9))
    planar = fit(make(), task, epochs=2, lr=0.01).eval()
    new = rewrite(
        copy.deepcopy(planar),
        task,
        block="group_equivariant_conv",
        settings={"group": group, "pool": pool},
        epochs=8,
        lr=0.02,
    )
    assert isinstance(new[0], StructuredConv2d)
    assert new[1][1].num_features == 8 // ORDERS[group]
    upright = evaluate(new, task).value
    assert upright > 0.5
    x, y = task.valid.x, task.valid.y
    new = bake(new).double().eval()
    for u in range(ORDERS[group]):
        seen = new(turned(x.double(), u))
        assert torch.allclose(seen, new(x.double()), atol=1e-10)
    assert not torch.allclose(planar(turned(x, 1)), planar(x), atol=1e-2)
    turned_task = Task(valid=Batches(turned(x, 1).contiguous(), y))
    assert evaluate(new.float(), turned_task).value == upright


def test_maps_of_a_function_start_with_means_of_what_they_had():
    task = small_task((1, 9, 9))
    planar = fit(small_cnn(), task, epochs=1, lr=0.01).eval()
    new = rewrite(copy.deepcopy(planar), task, block="group_equivariant_conv", epochs=0)
    assert torch.allclose(new[4][1].running_mean, planar[4].running_mean.view(4, 4).mean(1))
    assert torch.allclose(new[8][3].weight, planar[8].weight.view(4, 4, 4).sum(2))
    assert torch.equal(new[8][3].bias, planar[8].bias)


def test_what_cannot_turn_says_why():
    assert "groups=4" in group_equivariant_conv(nn.Conv2d(4, 4, 3, groups=4))
    assert "multiples of 8" in group_equivariant_conv(nn.Conv2d(3, 12, 3), group="p4m")
    assert "both directions" in group_equivariant_conv(nn.Conv2d(4, 4, (3, 1)))
    assert "both directions" in group_equivariant_conv(nn.Conv2d(4, 4, 3, padding=(1, 0)))
    with pytest.raises(BadOption, match="must be 4 or 8"):
        nn.Sequential(StructuredConv2d(in_channels=5, out_channels=10, kernel_size=3, stride=1, padding=0, dilation=1,
            groups=1, bias=False, padding_mode="zeros", structure=("rotated", 5, 3, 0)))  # fmt: skip
