"""Costs against figures that can be worked out by hand or are known from papers."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.core.cost import cost
from featherweight.core.ledger import recording
from featherweight.errors import BadData
from featherweight.zoo.networks import build


def test_lenet5_has_the_parameters_and_macs_of_the_papers() -> None:
    found = cost(build("lenet5"), torch.zeros(3, 1, 28, 28))
    assert found.params == 431_080
    conv1, conv2 = 24 * 24 * 20 * 25, 8 * 8 * 50 * 20 * 25
    assert found.macs == conv1 + conv2 + 800 * 500 + 500 * 10
    assert found.layers["conv2"].macs == conv2
    assert found.layers["fc1"].params == 800 * 500 + 500
    assert found.complete


def test_resnet20_is_40_8_million_macs_and_fast_to_count() -> None:
    model = build("resnet:depth=20,in_channels=3,shortcut=A")
    start = time.perf_counter()
    found = cost(model, torch.zeros(1, 3, 32, 32))
    assert time.perf_counter() - start < 10  # a fraction of a second here; the machine may be busy
    assert found.macs == pytest.approx(40.55e6, rel=0.01)


def test_half_width_resnet20() -> None:
    assert cost(build("resnet20_half"), torch.zeros(2, 1, 28, 28)).macs == pytest.approx(7.8e6, rel=0.02)


def test_batch_size_does_not_matter() -> None:
    model = build("vit")
    assert cost(model, torch.zeros(1, 1, 28, 28)).macs == cost(model, torch.zeros(5, 1, 28, 28)).macs


class Products(nn.Module):
    """One of each product in its own code."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ x.transpose(1, 2)  # (b, 5, 7) by (b, 7, 5)
        z = torch.einsum("bij,bjk->bik", y, x)  # 5 * 5 * 7
        return F.scaled_dot_product_attention(z, x, x)  # 5 * 5 * (7 + 7)


def test_products_in_the_models_own_code() -> None:
    found = cost(Products(), torch.ones(2, 5, 7))
    assert found.macs == 5 * 5 * 7 + 5 * 5 * 7 + 5 * 5 * 14
    assert found.params == 0
    assert list(found.layers) == [""]


def test_recurrent_and_transposed_layers() -> None:
    lstm = nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True)
    weights = sum(p.numel() for p in lstm.parameters() if p.dim() == 2)
    assert cost(lstm, torch.zeros(2, 4, 3)).macs == 4 * weights
    up = nn.ConvTranspose2d(6, 4, 2, 2, groups=2)
    assert cost(up, torch.zeros(2, 6, 3, 3)).macs == 3 * 3 * 6 * 2 * 2 * 2


class Tied(nn.Module):
    """A decoder that shares the table of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.decoder = nn.Linear(4, 11, bias=False)
        self.decoder.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.table(tokens))


def test_tied_weights_count_once_and_zeros_are_told_apart() -> None:
    model = Tied()
    with torch.no_grad():
        model.table.weight[:3] = 0
    found = cost(model, torch.zeros(2, 3, dtype=torch.long))
    assert (found.params, found.nonzeros, found.macs) == (44, 32, 3 * 4 * 11)


class Untraceable(nn.Module):
    """Branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attention, self.rnn = (
            nn.Conv1d(2, 8, 3),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.GRU(8, 4),
        )
        self.up = nn.ConvTranspose1d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2)
        x = self.attention(x, x, x)[0] if float(x.sum()) != 1 else x
        return self.up(self.rnn(x)[0].transpose(1, 2))


def test_a_model_without_a_graph_is_counted_by_its_layers_and_says_so() -> None:
    model = Untraceable()
    with recording() as ledger:
        found = cost(model, torch.ones(2, 2, 7))
    assert not found.complete
    assert "Untraceable cannot be traced" in found.note
    assert ledger.notes == [found.note]
    assert found.layers["conv"].macs == 5 * 8 * 2 * 3
    assert found.layers["attention"].macs == 5 * 4 * 8 * 8 + 5 * 5 * 2 * 8
    assert found.layers["rnn"].macs == 5 * (3 * 4 * 8 + 3 * 4 * 4)
    assert found.layers["up"].macs == 5 * 4 * 2 * 2
    assert found.params == sum(p.numel() for p in model.parameters())


def test_inputs_without_a_batch_are_refused() -> None:
    with pytest.raises(BadData, match="no tensor with a batch"):
        cost(nn.Linear(2, 2), {"x": 3})
