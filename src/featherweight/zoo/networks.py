"""Reference networks: plain torch modules, each made by a function of its options, listed in `NETWORKS`.

All take `in_channels` and `classes`; the image networks take images of 28x28 unless they say otherwise, and all of
them trace with `torch.export` under a dynamic batch. `build` makes one from a name with options:

>>> build("resnet:depth=8,width=0.5")(torch.zeros(2, 1, 28, 28)).shape
torch.Size([2, 10])
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import partial
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.core.check import positive
from featherweight.errors import BadOption, unknown


def lenet300(
    *, in_channels: int = 1, classes: int = 10, size: int = 28, hidden: tuple[int, ...] = (300, 100)
) -> nn.Module:
    """LeNet-300-100, a perceptron of 266,610 parameters (LeCun et al., Proc. IEEE 86(11), 1998)."""
    sizes = [in_channels * size * size, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in zip(sizes, hidden, strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


@final
class LeNet5(nn.Module):
    """Caffe's LeNet: two 5x5 convolutions without padding, each followed by max-pooling, then two linear layers."""

    def __init__(self, in_channels: int, classes: int, size: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        w1, w2, w3 = widths
        side = ((size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, w1, 5)
        self.conv2 = nn.Conv2d(w1, w2, 5)
        self.fc1 = nn.Linear(w2 * side * side, w3)
        self.fc2 = nn.Linear(w3, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def lenet5(
    *, in_channels: int = 1, classes: int = 10, size: int = 28, widths: tuple[int, int, int] = (20, 50, 500)
) -> nn.Module:
    """LeNet-5 as Caffe has it and the pruning papers use it: 20-50-500-10, 431,080 parameters, ReLU after fc1 only."""
    return LeNet5(in_channels, classes, size, widths)


@final
class PadShortcut(nn.Module):
    """Shortcut A: every `stride`-th pixel, the missing channels zeros (half before, half behind). No weights."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.before, self.behind = stride, extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.behind))


@final
class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Literal["A", "B"]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            self.shortcut = projection if shortcut == "B" else PadShortcut(stride, outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


@final
class ResNet(nn.Module):
    """A 3x3 stem, three stages of residual blocks (the second and third halve the image), global pooling, linear."""

    def __init__(
        self, in_channels: int, classes: int, channels: tuple[int, ...], blocks: int, shortcut: Literal["A", "B"]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        inputs = [channels[0], *channels]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    ResidualBlock(inputs[i], c, 1 if i == 0 else 2, shortcut),
                    *(ResidualBlock(c, c, 1, shortcut) for _ in range(blocks - 1)),
                )
                for i, c in enumerate(channels)
            )
        )
        self.fc = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet(
    *,
    in_channels: int = 1,
    classes: int = 10,
    depth: int = 20,
    width: float = 1.0,
    channels: tuple[int, int, int] = (16, 32, 64),
    shortcut: Literal["A", "B"] = "B",
) -> nn.Module:
    """CIFAR-style ResNet of `depth` 6n+2, any image size (He et al., CVPR 2016, arXiv:1512.03385, sec. 4.2).

    `width` multiplies `channels`. Shortcut "B" projects by a 1x1 convolution with batch norm; "A", the paper's choice
    for CIFAR, pads with zeros and has no weights, but ties the channels of all three stages together, so that fewer can
    be removed. Trains about 1.6 times faster in the memory format `channels_last`.
    """
    _require(depth >= 8 and depth % 6 == 2, f"depth={depth}", "a depth of 6n+2: 8, 14, 20, 32, 44, 56, 110")
    _require(shortcut in ("A", "B"), f"shortcut={shortcut!r}", '"A" (pad with zeros) or "B" (projection)')
    positive("width", width)
    scaled = tuple(max(1, round(c * width)) for c in channels)
    return initialise(ResNet(in_channels, classes, scaled, (depth - 2) // 6, shortcut))


@final
class PooledClassifier(nn.Module):
    """Features, global average pooling, dropout if any, one linear layer."""

    def __init__(self, features: nn.Module, width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = features
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)))


def vgg(
    *,
    in_channels: int = 1,
    classes: int = 10,
    plan: tuple[tuple[int, ...], ...] = ((32, 32), (64, 64), (128, 128)),
    width: float = 1.0,
) -> nn.Module:
    """VGG with batch norm (Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556); the default is a small one for 28x28.

    `plan` lists the widths group by group, max-pooling between the groups; `width` multiplies them. Departs from the
    paper: batch norm, and global average pooling with one linear layer in place of three.
    """
    positive("width", width)
    layers: list[nn.Module] = []
    inputs = in_channels
    for i, group in enumerate(plan):
        layers += [nn.MaxPool2d(2)] if i else []
        for channels in group:
            outputs = max(1, round(channels * width))
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
    return initialise(PooledClassifier(nn.Sequential(*layers), inputs, classes))


def separable(inputs: int, outputs: int, stride: int) -> nn.Module:
    """A depthwise separable convolution: 3x3 depthwise, then 1x1, each with batch norm and ReLU."""
    return nn.Sequential(conv_bn(inputs, inputs, 3, stride, groups=inputs), conv_bn(inputs, outputs, 1))


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Module:
    """A convolution without bias that keeps the image size (over `stride`), batch norm, and an activation if any."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


MOBILENET_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


def mobilenet_v1(
    *, in_channels: int = 1, classes: int = 10, width: float = 0.25, halvings: int = 2, dropout: float = 0.0
) -> nn.Module:
    """MobileNet with a width multiplier (Howard et al., 2017, arXiv:1704.04861, table 1).

    Departs from the paper: of its five halvings of the image (the first in the stem) only the last `halvings` are
    kept, so that small images are not pooled away; five give the paper's network.
    """
    positive("width", width)
    strides = _last_halvings([2, *(s for _, s in MOBILENET_V1)], halvings)
    widths = [_multiple_of_8(c * width) for c in (32, *(c for c, _ in MOBILENET_V1))]
    blocks = [separable(a, b, s) for a, b, s in zip(widths, widths[1:], strides[1:], strict=False)]
    stem = conv_bn(in_channels, widths[0], 3, strides[0])
    return initialise(PooledClassifier(nn.Sequential(stem, *blocks), widths[-1], classes, dropout))


@final
class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.residual = stride == 1 and inputs == outputs
        self.expand = conv_bn(inputs, hidden, 1, activation=nn.ReLU6) if expand != 1 else nn.Identity()
        self.depthwise = conv_bn(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6)
        self.project = conv_bn(hidden, outputs, 1, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


# Expansion, channels, repeats, stride of the first (table 2 of the paper).
MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(
    *, in_channels: int = 1, classes: int = 10, width: float = 0.25, halvings: int = 2, dropout: float = 0.0
) -> nn.Module:
    """MobileNetV2 with a width multiplier (Sandler et al., CVPR 2018, arXiv:1801.04381, table 2).

    Departs from the paper: `halvings` as in `mobilenet_v1`, and the last 1x1 layer shrinks with widths below one too
    (the paper keeps 1280), which small images and few classes do not need.
    """
    positive("width", width)
    rows = [(t, c, s if i == 0 else 1) for t, c, n, s in MOBILENET_V2 for i in range(n)]
    strides = _last_halvings([2, *(s for _, _, s in rows)], halvings)
    widths = [_multiple_of_8(c * width) for c in (32, *(c for _, c, _ in rows))]
    last = _multiple_of_8(1280 * width)
    blocks = [
        InvertedResidual(a, b, s, t) for a, b, s, (t, _, _) in zip(widths, widths[1:], strides[1:], rows, strict=False)
    ]
    stem = conv_bn(in_channels, widths[0], 3, strides[0], activation=nn.ReLU6)
    head = conv_bn(widths[-1], last, 1, activation=nn.ReLU6)
    return initialise(PooledClassifier(nn.Sequential(stem, *blocks, head), last, classes, dropout))


@final
class Attention(nn.Module):
    """Multi-head self-attention with one fused linear layer for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))


@final
class EncoderBlock(nn.Module):
    """Attention, then a two-layer perceptron, each behind a layer norm and inside a shortcut."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@final
class ViT(nn.Module):
    """Patches to tokens by a strided convolution, a class token and learned positions, encoder blocks, linear."""

    def __init__(
        self, *, in_channels: int, classes: int, tokens: int, patch: int, dim: int, depth: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, tokens + 1, dim) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def vit(
    *,
    in_channels: int = 1,
    classes: int = 10,
    size: int = 28,
    patch: int = 7,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    mlp_ratio: float = 2.0,
) -> nn.Module:
    """A small vision transformer, norms first (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929)."""
    _require(size % patch == 0, f"patch={patch}", f"a divisor of the image size {size}")
    _require(dim % heads == 0, f"heads={heads}", f"a divisor of dim={dim}")
    return ViT(
        in_channels=in_channels,
        classes=classes,
        tokens=(size // patch) ** 2,
        patch=patch,
        dim=dim,
        depth=depth,
        heads=heads,
        hidden=round(dim * mlp_ratio),
    )


@final
class LSTMClassifier(nn.Module):
    """An LSTM over a sequence, and a linear layer on its last output.

    Reads an image (batch, channels, rows, columns) row by row, or token numbers (batch, length) through an embedding.
    """

    def __init__(self, features: int, classes: int, hidden: int, layers: int, vocabulary: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features) if vocabulary else None
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        sequence = self.embedding(x) if self.embedding is not None else x.transpose(1, 2).flatten(2)
        return self.fc(self.lstm(sequence)[0][:, -1])


def lstm(
    *,
    in_channels: int = 1,
    classes: int = 10,
    size: int = 28,
    hidden: int = 64,
    layers: int = 1,
    vocabulary: int | None = None,
    embedding: int = 32,
) -> nn.Module:
    """An LSTM classifier (Hochreiter and Schmidhuber, Neural Computation 9(8), 1997).

    Reads images of `size` columns row by row; with `vocabulary` it reads token numbers of shape (batch, length).
    """
    features = embedding if vocabulary else in_channels * size
    return LSTMClassifier(features, classes, hidden, layers, vocabulary)


def initialise(model: nn.Module) -> nn.Module:
    """He's normal initialisation for convolutions (arXiv:1502.01852), in place; everything else keeps torch's.

    The fan-out is counted within a group: torch's own count would start depthwise layers far too small.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[:, 0].numel() / module.groups
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    return model


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "lenet300": lenet300,
    "lenet5": lenet5,
    "resnet": resnet,
    "resnet20": resnet,
    "resnet20_half": partial(resnet, width=0.5),  # the workhorse: 8-16-32
    "vgg": vgg,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "vit": vit,
    "lstm": lstm,
}


def build(spec: str, **options: object) -> nn.Module:
    """Make a network from its name, or from `name:option=value,option=value`; keyword options win over those.

    Values are Python literals (numbers, strings, tuples in brackets, None); other words stand for themselves. Raises
    `UnknownName` for a network or an option that does not exist, `BadOption` for text that is not option=value and for
    values that do not make a network.

    >>> sum(p.numel() for p in build("lenet5").parameters())
    431080
    """
    name, _, text = spec.partition(":")
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    make = NETWORKS[name]
    chosen = {**parse_options(text), **options}
    known = inspect.signature(make).parameters
    for option in chosen:
        if option not in known:
            raise unknown(f"option of network {name!r}", option, known)
    try:
        return make(**chosen)
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{option}={value!r}" for option, value in chosen.items())
        why = str(error).splitlines()[0]
        raise BadOption(f"network {name!r} cannot be made with {given} ({why}): compare its defaults") from error


def parse_options(text: str) -> dict[str, object]:
    """Read `a=1,b=(2, 3),c=word` into a dict.

    >>> parse_options("depth=20,channels=(8, 16, 32),shortcut=B")
    {'depth': 20, 'channels': (8, 16, 32), 'shortcut': 'B'}
    """
    options: dict[str, object] = {}
    for item in _split_at_commas(text):
        name, equals, value = item.partition("=")
        if not (equals and name.strip() and value.strip()):
            raise BadOption(f"network option {item.strip()!r}: expected option=value, several separated by commas")
        options[name.strip()] = _literal(value.strip())
    return options


def _split_at_commas(text: str) -> list[str]:
    """Split at the commas that stand outside brackets."""
    items, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item for item in items if item.strip()]


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _last_halvings(strides: list[int], halvings: int) -> list[int]:
    """Turn all but the last `halvings` strides of two into one."""
    places = [i for i, s in enumerate(strides) if s == 2]
    _require(0 <= halvings <= len(places), f"halvings={halvings}", f"0..{len(places)}")
    kept = places[len(places) - halvings :]
    return [2 if i in kept else 1 for i in range(len(strides))]


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8, never more than 10 % below (MobileNetV2's rule): what vector units like."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _require(holds: bool, given: str, expected: str) -> None:
    if not holds:
        raise BadOption(f"{given}: expected {expected}")
