"""Wu et al. 2018: shifts are one-hot depthwise convolutions; the nearest sum of shifted 1 x 1 ones, exact when wide."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import small_cnn, small_task
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.shifts import Shift2d
from featherweight.core.task import evaluate
from featherweight.errors import BadOption
from featherweight.ingredients.block.shift_conv import shift_conv
from featherweight.rewrite import rewrite


@pytest.mark.parametrize(("kernel", "splits"), [(3, (2, 0, 1, 1, 3, 0, 1, 0, 2)), (5, (*[1] * 24, 2))])
def test_shift_is_a_depthwise_convolution_with_one_hot_kernels(kernel, splits):
    shift, channels = Shift2d(splits, kernel), sum(splits)
    x = torch.randn(2, channels, 5, 7)
    place = torch.tensor([p for p, count in enumerate(splits) for _ in range(count)])
    hot = F.one_hot(place, kernel**2).view(channels, 1, kernel, kernel).float()
    assert torch.equal(shift(x), F.conv2d(x, hot, padding=kernel // 2, groups=channels))
    told = cost(nn.Sequential(shift, nn.Conv2d(channels, 2, 1, bias=False)), x)
    assert (told.params, told.macs) == (2 * channels, 2 * channels * 35)


@pytest.mark.parametrize(("stride", "size"), [(1, 7), (2, 8), (2, 7)])
def test_it_is_exact_where_the_width_is_the_sum_of_ranks(stride, size):
    layer = nn.Conv2d(3, 4, 3, stride=stride, padding=1).double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    whole = shift_conv(layer, expansion=27 / 4, between="linear")
    assert whole[0].out_channels == 27
    assert torch.allclose(whole(x), layer(x), atol=1e-10)
    equal = shift_conv(layer, expansion=27 / 4, places="equal", between="linear")
    assert torch.allclose(equal(x), layer(x), atol=1e-10)
    thin = nn.Conv2d(3, 4, 3, stride=stride, padding=1).double()
    rank_one = torch.einsum("op,ip->oip", torch.randn(4, 9).double(), torch.randn(3, 9).double())
    thin.weight.data = rank_one.view(4, 3, 3, 3)
    assert torch.allclose(shift_conv(thin, expansion=9 / 4, between="linear")(x), thin(x), atol=1e-10)


def test_best_places_lose_the_smallest_singular_values_and_no_more_than_equal_ones():
    layer = nn.Conv2d(6, 8, 3, padding=1).double()
    layer.weight.data[:, :, 1, 1] *= 4
    values = torch.linalg.svdvals(layer.weight.detach().flatten(2).permute(2, 0, 1)).flatten()

    def lost(places, expansion=2.0):
        new = shift_conv(layer, expansion=expansion, places=places, between="linear")
        place = torch.tensor([p for p, n in enumerate(new[1].splits) for _ in range(n)])
        hot = F.one_hot(place, 9).double()
        made = torch.einsum("om,mi,mp->oip", new[2].weight[:, :, 0, 0], new[0].weight[:, :, 0, 0], hot)
        return float((layer.weight.flatten(2) - made).detach().square().sum())

    assert lost("best") == pytest.approx(float(values.sort().values[:-16].square().sum()))
    assert lost("best") < lost("equal")
    assert lost("best", 4.0) < lost("best", 3.0) < lost("best")


def test_parameters_are_those_of_the_paper():
    layer = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    for expansion in (1, 3):
        new = shift_conv(layer, expansion=expansion, places="equal")
        width = 16 * expansion
        kept = new[0].out_channels
        assert kept == min(width, 9 * 8)
        assert sum(p.numel() for p in (new[0].weight, new[-1].weight)) == kept * (8 + 16)
        assert [type(m) for m in new] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, Shift2d, nn.Conv2d]


def test_network_recovers():
    task = small_task()
    model = fit(small_cnn(), task, epochs=8, lr=0.01).eval()
    new = rewrite(model, task, block="shift_conv", settings={"places": "equal"}, refit=4, epochs=6, lr=0.01)
    assert evaluate(new, task).value > 0.8


def test_what_no_shifts_can_do_stays():
    assert "groups=4" in shift_conv(nn.Conv2d(4, 4, 3, groups=4))
    assert "odd squares" in shift_conv(nn.Conv2d(4, 4, 2))
    assert "odd squares" in shift_conv(nn.Conv2d(4, 4, (3, 1), padding=(1, 0)))
    assert "padding of 1" in shift_conv(nn.Conv2d(4, 4, 3))
    assert "padding of 1" in shift_conv(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(BadOption, match="odd kernel_size"):
        Shift2d((1, 2), 3)
