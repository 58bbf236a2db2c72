"""Rules of the label flow, each on the smallest network that needs it: what may go, and that it equals masking."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from featherweight.core.channels import channel_groups, masked_outputs, remove_channels
from featherweight.core.wiring import wire
from removal import gap, randomise


class Around(nn.Module):
    """A function between a layer of eight outputs and one that reads what comes of them."""

    def __init__(self, middle: Callable[[Tensor], Tensor], wide: int = 8) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), middle, nn.Linear(wide, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)


def var_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def std_norm(x: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, -1, keepdim=True)
    return (x - mean) / (std + 1e-5)


def halves(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * 0.3 + torch.cat([-b, a], -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) + x


def lengths(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# A function, its results, how many of the eight channels can go.
MIDDLES: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "rms norm": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), 8, 8),
    "layer norm": (layer_norm, 8, 8),
    "variance": (var_norm, 8, 8),
    "standard deviation": (std_norm, 8, 8),
    "length": (lengths, 8, 8),
    "half rotation": (halves, 8, 8),
    "rotation of pairs": (pairs, 8, 8),
    "narrow": (lambda x: x.narrow(-1, 2, 5).relu(), 5, 8),
    "from behind": (lambda x: x[..., -5:-1].relu(), 4, 8),
    "einsum": (lambda x: torch.einsum("...i,...i,...j->...j", x, x, x), 8, 8),
    "einsum that is no sum over zeros": (lambda x: torch.einsum("ij,kj->ik", x.exp(), x.exp()), 2, 0),
    "mean as a map": (lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)), 8, 0),
    "times the mean's square": (lambda x: x * x.mean(-1, keepdim=True).pow(2), 8, 0),
    "times the deviation": (lambda x: x * x.std(-1, keepdim=True), 8, 0),
    "times the root of the mean of squares": (lambda x: x * x.pow(2).mean(-1, keepdim=True).sqrt(), 8, 0),
    "over another's deviation": (lambda x: x.exp() / x.std(-1, keepdim=True), 8, 0),
    "means of windows within channels": (lambda x: F.avg_pool1d(x.repeat_interleave(3, -1), 3), 8, 8),
    "maxima of windows within channels": (lambda x: F.max_pool1d(x.repeat_interleave(2, -1), 2), 8, 8),
    "means of windows over channels": (lambda x: F.avg_pool1d(x, 2), 4, 0),
    "means of windows that overlap": (lambda x: F.avg_pool1d(x.repeat_interleave(3, -1), 3, 1), 22, 0),
    "every third": (lambda x: x[..., ::3], 3, 0),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_what_lies_between_two_layers(name: str) -> None:
    middle, wide, free = MIDDLES[name]
    torch.manual_seed(0)
    wired = wire(Around(middle, wide).eval(), torch.randn(2, 5)).double()
    x = torch.randn(2, 5, dtype=torch.float64)
    channels = channel_groups(wired, x)
    assert int((channels.outputs["first"] >= 0).sum()) == free
    if free:
        first = channels.outputs["first"]
        doomed = channels.legal(first[[2, 6]].unique())
        assert len(doomed)
        expected = masked_outputs(wired, channels, doomed)
        remove_channels(wired, doomed, channels=channels)
        assert wired.first.out_features <= 6
        with torch.no_grad():
            assert gap(wired(x), expected[0]) < 1e-12
    else:
        assert any(word in channels.pinned["first"] for word in ("mean", "std", "einsum", "slice", "pool"))


class Standardised(nn.Module):
    """Weights less their mean over their standard deviation, for whole and for grouped convolutions."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups, self.first, self.last = groups, nn.Conv1d(3, 8, 1), nn.Conv1d(12, 2, 1)
        self.weight = nn.Parameter(torch.randn(12, 8 // groups, 3))
        self.gain = nn.Parameter(torch.rand(12, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        dims = (1, 2) if self.groups == 1 else (2,)
        std, mean = torch.std_mean(self.weight, dims, keepdim=True)
        weight = self.gain * (self.weight - mean) / (std + 1e-5)
        return self.last(F.conv1d(self.first(x), weight, groups=self.groups))


@pytest.mark.parametrize("as_wiring", [False, True])
@pytest.mark.parametrize("name", ["standardised", "grouped", "weight norm"])
def test_a_weight_that_is_computed_is_cut_where_it_comes_from(name: str, as_wiring: bool) -> None:
    torch.manual_seed(0)
    normed = lambda: nn.Sequential(nn.Conv1d(3, 8, 1), weight_norm(nn.Conv1d(8, 12, 3)), nn.Conv1d(12, 2, 1))  # noqa: E731
    model = {"standardised": lambda: Standardised(1), "grouped": lambda: Standardised(2), "weight norm": normed}[name]()
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    model = randomise(model).double().eval()
    model = wire(model, x) if as_wiring else model
    channels = channel_groups(model, x)
    assert channels.count == 20  # eight into the computed weight, twelve out of it
    doomed = channels.legal(torch.randperm(20)[:9])
    expected = masked_outputs(model, channels, doomed)
    sizes = sum(p.numel() for p in model.parameters())
    remove_channels(model, doomed, channels=channels)
    assert sum(p.numel() for p in model.parameters()) < 0.7 * sizes
    with torch.no_grad():
        assert gap(model(x), expected[0]) < 1e-12


def test_a_weight_that_is_also_used_as_it_is_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(8, 5)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(x, self.weight.tanh())) + self.weight.sum()

    channels = channel_groups(Both().eval(), torch.randn(2, 5))
    assert channels.count == 0
    assert channels.pinned["last"] == "output of the model"


def test_heads_with_a_mask_of_their_own_stay_and_their_size_can_go() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.qkv, self.last = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 3)
            self.bias = nn.Embedding(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            n = torch.arange(x.shape[1])
            bias = self.bias(n[:, None] - n[None, :] + 3).permute(2, 0, 1)[None]
            q, k, v = self.qkv(self.first(x)).view(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            return self.last(y.transpose(1, 2).flatten(2))

    x = torch.randn(2, 4, 5)
    wired = wire(Biased().eval(), x)
    channels = channel_groups(wired, x)
    assert "scaled_dot_product_attention with a mask for every head" in channels.pinned["bias"]
    assert (channels.outputs["qkv"] >= 0).all()


class Ended(nn.Module):
    """A layer whose width the code reads off, so that a removal changes what comes out; and an end that hides it."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.end = nn.Linear(5, 8), nn.Linear(8, 6), end

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.end(self.last(h * h.shape[-1]))


ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "a huge fill": lambda y: torch.cat([y, torch.full_like(y[:, :1], -1e9)], 1),
    "an infinite fill": lambda y: torch.cat([y, torch.full_like(y[:, :1], -torch.inf)], 1),
    "signs": lambda y: y > 0.1,
    "complex": lambda y: torch.complex(y, y),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_is_beside_an_output_hides_no_difference(name: str) -> None:
    torch.manual_seed(0)
    channels = channel_groups(Ended(ENDS[name]).eval(), torch.randn(16, 5))
    assert int((channels.outputs["first"] >= 0).sum()) == 0


class End(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x)


@pytest.mark.parametrize("end", [ENDS["a huge fill"], ENDS["an infinite fill"]])
def test_what_is_beside_an_output_pins_nothing(end: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    channels = channel_groups(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), End(end)), torch.randn(16, 5))
    assert int((channels.outputs["0"] >= 0).sum()) == 8


def test_outputs_that_are_mostly_zero_are_compared_by_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 40), nn.ReLU()).eval()
    with torch.no_grad():
        model[2].bias -= torch.linspace(0, 0.8, 40)
    x = torch.randn(64, 5)
    share = (model(x) == 0).double().mean()
    assert 0.5 < share < 1
    channels = channel_groups(model, x)
    remove_channels(model, range(0, 64, 3), channels=channels)
    assert model[0].out_features == 42


class Chosen(nn.Module):
    """A sum over channels that are zero when masked only as far as the example goes."""

    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.other, self.choose = nn.Linear(5, 8), nn.Linear(5, 8), choose

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.choose(self.first(x), mask[:, None] > 0)
        return (h * h).sum(-1)


@pytest.mark.parametrize(
    "choose",
    [
        lambda h, mask: torch.where(mask, h, torch.full_like(h, 0.5)),
        lambda h, mask: h.masked_fill(~mask, 0.5),
    ],
)
def test_a_mask_of_ones_proves_nothing(choose: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    channels = channel_groups(Chosen(choose).eval(), (torch.randn(4, 5), torch.ones(4)))
    assert int((channels.outputs["first"] >= 0).sum()) == 0
