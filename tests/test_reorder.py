"""Channels that may trade places: what goes with them goes along, and what may not is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.core.channels import channel_groups
from featherweight.core.ledger import recording
from featherweight.core.reorder import exchanges, reorder
from featherweight.zoo.networks import resnet, vit


def shuffled(model: nn.Module, x: Tensor) -> tuple[nn.Module, list[str]]:
    """The network in double precision with all channels that may trade places in a random order, and their layers."""
    torch.manual_seed(1)
    model = model.eval()
    channels = channel_groups(model, x)
    found, other = exchanges(model, channels), copy.deepcopy(model)
    for one in found:
        order = torch.randperm(len(one.members))
        reorder(other, channels, one.members, order)
    return other, [one.name for one in found]


def check(model: nn.Module, x: Tensor, least: int) -> list[str]:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    other, names = shuffled(model, x)
    with torch.no_grad():
        before, after = model.double()(x.double()), other.double()(x.double())
    assert (before - after).abs().max() <= 1e-9 * before.abs().max()
    moved = [k for k, v in other.state_dict().items() if not torch.equal(v, model.state_dict()[k])]
    assert len(moved) >= least
    return names


class Grouped(nn.Module):
    """A grouped and a depthwise convolution, a group norm, a concatenation, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.norm, self.deep = nn.GroupNorm(2, 12), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.head = nn.Linear(20 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        h = torch.cat([self.deep(F.relu(self.norm(self.grouped(h)))), h], 1)
        return self.head(F.adaptive_avg_pool2d(h, 2).flatten(1))


def test_units_keep_to_their_groups_and_take_their_places_in_a_flattened_map_along() -> None:
    names = check(Grouped(), torch.randn(2, 1, 6, 6), 9)
    assert names == ["first.weight", "first.weight", "grouped.weight", "grouped.weight"]


@pytest.mark.parametrize(
    ("make", "shape", "least"),
    [(lambda: resnet(depth=8), (2, 1, 12, 12), 46), (lambda: vit(depth=1), (2, 1, 28, 28), 10)],
    ids=["residual", "attention"],
)
def test_networks_of_the_zoo(make: Callable[[], nn.Module], shape: tuple[int, ...], least: int) -> None:
    check(make(), torch.randn(shape), least)


class Ramp(nn.Module):
    """Multiplies its channels by numbers of their own, which its code writes down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x)) * torch.arange(1.0, 1.0 + self.first.out_features, dtype=x.dtype)
        return self.head(F.relu(self.second(h)))


def test_channels_that_the_code_numbers_stay() -> None:
    model, x = Ramp(), torch.randn(3, 4)
    with recording() as ledger:
        channels = channel_groups(model, x)
        names = [one.name for one in exchanges(model, channels)]
    assert names == ["second.weight"]
    assert "first" in ledger.skipped


def test_a_tied_weight_moves_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.a, self.b, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(F.relu(self.a(F.relu(self.into(x))))))

    assert check(Tied(), torch.randn(2, 3), 5) == ["into.weight"]  # a's units are into's, for b reads them so
