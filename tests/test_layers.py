"""The layers that a file may name: each comes back from its description as it was."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from featherweight.core.arguments import agrees
from featherweight.core.layers import LEAVES, build_layer, check_entries, count_layers, layer_spec, structured_entries
from featherweight.core.recurrent import shared
from featherweight.core.shifts import Shift2d
from featherweight.core.structured import StructuredEmbedding, StructuredLinear, from_dense
from featherweight.errors import FormatError

LAYERS = (
    nn.Linear(2, 3), nn.Bilinear(2, 3, 4), nn.Conv1d(2, 2, 3), nn.Conv2d(2, 2, (3, 1), padding="same"),
    nn.Conv3d(2, 2, 3, padding_mode="circular"), nn.ConvTranspose1d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3, 2, 1, 1),
    nn.ConvTranspose3d(2, 2, 2), nn.BatchNorm1d(3, momentum=None), nn.BatchNorm2d(3), nn.BatchNorm3d(3, affine=False),
    nn.InstanceNorm1d(3), nn.InstanceNorm2d(3), nn.InstanceNorm3d(3), nn.LayerNorm((3, 4)), nn.LayerNorm(3, bias=False),
    nn.LayerNorm(3, elementwise_affine=False), nn.RMSNorm(3), nn.GroupNorm(2, 4), nn.LocalResponseNorm(3),
    nn.Embedding(3, 4, padding_idx=-1), nn.Embedding(3, 4, max_norm=1.0), nn.GRU(2, 3, bias=False, batch_first=True),
    nn.LSTM(2, 3, 2, dropout=0.1, bidirectional=True), nn.LSTM(2, 3, proj_size=2), nn.RNN(2, 3, nonlinearity="relu"),
    nn.Identity(), nn.Sigmoid(), nn.Tanh(), nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink(), nn.ReLU(True), nn.ReLU6(),
    nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.SELU(), nn.GELU("tanh"), nn.LeakyReLU(), nn.ELU(),
    nn.CELU(), nn.Hardtanh(-2.0, 2.0), nn.Softplus(), nn.PReLU(3), nn.Softmax(-1), nn.Softmax(), nn.LogSoftmax(1),
    nn.Unflatten(1, (2, 3)), nn.GLU(), nn.Flatten(), nn.Dropout(0.3), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(),
    nn.AlphaDropout(),
    nn.MaxPool1d(2), nn.MaxPool2d((2, 3), 1), nn.MaxPool3d(2), nn.AvgPool1d(2), nn.AvgPool2d(2, divisor_override=3),
    nn.AvgPool3d(2), nn.AdaptiveAvgPool1d(1), nn.AdaptiveAvgPool2d((None, 3)), nn.AdaptiveAvgPool3d(2),
    nn.AdaptiveMaxPool1d(1), nn.AdaptiveMaxPool2d(2), nn.AdaptiveMaxPool3d((1, 2, 3)), nn.PixelShuffle(2),
    nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Upsample(scale_factor=2), nn.Upsample(size=(3, 4), mode="bilinear"),
    nn.Upsample(scale_factor=(2.0, 1.5), mode="bicubic", align_corners=True), nn.ZeroPad1d((1, 2)), nn.ZeroPad2d(-1),
    nn.ReflectionPad1d(1), nn.ReflectionPad2d((1, 0, 1, 0)), nn.ReplicationPad2d(1),
    nn.BatchNorm2d(3, bias=False), nn.GroupNorm(2, 4, bias=False), nn.Embedding(3, 4, scale_grad_by_freq=True),
    nn.Embedding(3, 4, sparse=True), nn.Upsample(scale_factor=1.7, recompute_scale_factor=True),
    nn.AdaptiveMaxPool2d(2, return_indices=True),
    StructuredLinear(6, 4, True, ("circulant", 7)), StructuredLinear(6, 4, False, ("hashed", 5, 1 << 60)),
    StructuredLinear(6, 4, True, ("toeplitz", 3)), StructuredLinear(6, 4, True, ("stein_cauchy", 2)),
    shared(nn.GRU(2, 3, 2, bidirectional=True), 2), shared(nn.LSTM(2, 3, bias=False), 1),
    StructuredLinear(6, 4, True, ("functional", 5, 2, 3, 1)),
    Shift2d((0, 0, 0, 1, 2, 0, 0, 0, 1), 3),
    from_dense(nn.Conv2d(4, 8, 3), ("rotated", 4, 3, 0)), from_dense(nn.Conv2d(1, 8, 5), ("rotated", 8, 5, 1)),
    StructuredEmbedding(6, 4, None, ("hashed", 5, 1)), StructuredEmbedding(6, 4, 2, ("hashed", 5, 1)),
    from_dense(nn.Conv2d(2, 4, (3, 1), padding="same", groups=2, bias=False), ("hashed", 5, 0)),
    nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU())),
)  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: repr(layer).replace("\n", ""))
def test_a_layer_comes_back_from_its_description(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of dropout in a recurrent network of one layer, and the like
        again = build_layer(json.loads(json.dumps(layer_spec(layer))))
    assert repr(again) == repr(layer)
    assert [p.shape for p in again.parameters()] == [p.shape for p in layer.parameters()]
    assert agrees(again)
    for name in LEAVES.get(type(layer).__name__, (None, ()))[1]:
        assert (getattr(again, name) is None) == (getattr(layer, name) is None), name
        if isinstance(getattr(layer, name), (bool, int, float, str)):
            assert getattr(again, name) == getattr(layer, name), name


def test_every_layer_of_the_table_is_among_them() -> None:
    assert {type(layer).__name__ for layer in LAYERS} >= LEAVES.keys()


# What needs no word in a file: where and of what type, first values, old names of others; transposed convolutions take
# no padding but zeros.
UNSAID = {
    *("self", "device", "dtype", "args", "kwargs", "_weight", "_freeze"),
    *("PReLU init", "Hardtanh min_value", "Hardtanh max_value"),
    *(f"ConvTranspose{d}d padding_mode" for d in (1, 2, 3)),
}


@pytest.mark.parametrize("kind", LEAVES)
def test_every_argument_of_a_layer_is_said(kind: str) -> None:
    make, names = LEAVES[kind]
    taken = inspect.signature(make.__init__).parameters  # type: ignore[misc]
    assert {n for n in taken if n not in UNSAID and f"{kind} {n}" not in UNSAID} <= set(names)


def gain() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_parameter("gain", nn.Parameter(torch.ones(2)))
    return layer


def without_weight() -> nn.Module:
    layer = nn.BatchNorm1d(3)
    layer.weight = None  # type: ignore[assignment]
    return layer


def mirrored() -> nn.Module:
    layer = nn.ConvTranspose1d(2, 2, 3)
    layer.padding_mode = "reflect"
    return layer


def on_a_sequential() -> nn.Module:
    layer = nn.Sequential(nn.ReLU())
    layer.register_buffer("shift", torch.ones(2))
    return layer


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (gain, r"tensor of shape \(2,\) as gain, where such a layer has nothing"),
        (without_weight, "nothing as weight"),
        (mirrored, "'reflect' as padding_mode"),
        (on_a_sequential, "as shift"),
    ],
)
def test_a_layer_that_has_more_than_its_arguments_say_is_refused(make: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        layer_spec(make())


def test_entries_of_structured_layers_are_counted_as_they_are_made() -> None:
    plain = nn.Linear(6, 4), nn.Conv2d(4, 6, (3, 2), groups=2), nn.Embedding(5, 3)
    specs = [layer_spec(from_dense(layer, ("circulant", 0))) for layer in plain]
    assert [structured_entries(spec) for spec in specs] == [layer.weight.numel() for layer in plain] == [24, 72, 15]
    both = layer_spec(nn.Sequential(nn.Sequential(from_dense(plain[0], ("circulant", 0))), nn.Linear(2, 2)))
    assert structured_entries(both) == 24
    with pytest.raises(FormatError, match="1 to 268435456 together"):
        check_entries([{"type": "StructuredLinear", "args": {"in_features": 1 << 14, "out_features": 1 << 14}}, both])


def test_both_directions_of_a_recurrent_layer_are_counted() -> None:
    specs = [layer_spec(nn.GRU(1, 1, 3, bidirectional=both)) for both in (False, True)]
    assert [count_layers(spec) for spec in specs] == [12, 24]
