"""Small networks, each with one way in which channels are coupled, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate that is computed from all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head((x * gate).mean((2, 3)))


class Dense(nn.Module):
    """Every convolution reads the concatenation of all before it; a flattened map feeds the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norm, self.head = nn.BatchNorm2d(18), nn.Linear(18 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.head(F.avg_pool2d(self.norm(x), 2).flatten(1))


class Shuffled(nn.Module):
    """One half of the channels passes by, the halves are shuffled together, with the count read off the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.point, self.depth = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mix, self.head = nn.Conv2d(16, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, F.relu(self.depth(F.relu(self.point(b))))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.mix(self.norm(x))).mean((2, 3)))


class Grouped(nn.Module):
    """Grouped convolutions of different group counts after each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(24)
        self.four, self.two = nn.Conv2d(16, 24, 3, groups=4), nn.Conv2d(24, 12, 1, groups=2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.norm(self.four(F.relu(self.stem(x))))))).mean((2, 3)))


class Segmenter(nn.Module):
    """Down and up again: group norm, a transposed convolution, a skip by concatenation, bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.norm, self.up = nn.GroupNorm(4, 16), nn.ConvTranspose2d(16, 8, 2, 2)
        self.mix, self.out = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        y = torch.cat([self.up(F.relu(self.norm(self.down2(a)))), a], 1)
        return self.out(F.interpolate(F.relu(self.mix(y)), scale_factor=2.0, mode="bilinear", align_corners=False))


class Depthwise(nn.Module):
    """Depthwise layers with a multiplier and transposed, an attention map of one channel, sizes kept by a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Unflatten(1, (2, 4)), nn.Flatten(1, 2), nn.ReLU(inplace=True))
        self.up, self.twice = nn.ConvTranspose2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1, groups=8)
        self.where, self.head = nn.Conv2d(16, 1, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.up(self.stem(x)))
        return self.head((x * torch.sigmoid(self.where(x))).mean((2, 3)))


class PixelShuffle(nn.Module):
    """Channels that become pixels, and a slope for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.slope = nn.Conv2d(3, 32, 3, padding=1), nn.PReLU(8)
        self.mix, self.out = nn.Conv2d(8, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.mix(self.slope(F.pixel_shuffle(self.stem(x), 2)))))


class TwoInputs(nn.Module):
    """A dictionary of inputs, given in another order than forward takes them, and a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.numbers = nn.Embedding(11, 8), nn.Linear(3, 8)
        self.norm, self.hidden, self.out = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, tokens: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.words(tokens).mean(1) + self.numbers(numbers))
        return {"y": self.out(F.gelu(self.hidden(x)))}


class Reused(nn.Module):
    """A block that runs twice, and an embedding whose table is also the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.decoder = nn.Linear(8, 11, bias=False)
        self.decoder.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for _ in range(2):
            x = self.norm(x + self.narrow(F.relu(self.wide(x))))
        return self.decoder(x)


class Twice(nn.Module):
    """One layer twice in a row, so that its outputs are its own inputs."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(8, 8)
        self.layers = nn.Sequential(nn.Linear(5, 8), layer, nn.GELU(), layer, nn.Dropout(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Counting(nn.Module):
    """A buffer that every call changes, and one that enters as data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 8), nn.Linear(8, 2)
        self.calls: Tensor
        self.shift: Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.out(F.gelu(self.first(x) - self.shift))


class Split(nn.Module):
    """Parts whose sizes are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.sizes = nn.Linear(5, 8), nn.Linear(5, 2), nn.Linear(3, 2), [5, 3]

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split(self.sizes, -1)
        return self.a(a) + self.b(b)


class Queries(nn.Module):
    """Learned queries and positions, weights that enter as data; keys and values of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.positions = nn.Parameter(torch.randn(1, 3, 8)), nn.Parameter(torch.randn(1, 6, 8))
        self.stem, self.k, self.v, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 10), nn.Linear(10, 2)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.stem(x) + self.positions) * self.gain
        queries = self.queries.expand(x.shape[0], -1, -1)
        return self.out(F.scaled_dot_product_attention(queries, self.k(x), self.v(x), scale=0.3))


class Recurrent(nn.Module):
    """Two bidirectional layers over an embedding."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(11, 8), nn.Linear(12, 3)
        self.rnn = kind(8, 6, 2, bidirectional=True, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.rnn(self.words(tokens))[0].mean(1))


class FinalState(nn.Module):
    """Classifies by the last hidden state of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.out = nn.Embedding(11, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.rnn(self.words(tokens))[1][0][-1])


class Attention(nn.Module):
    """Separate queries, keys and values; the scale an attribute, or read off the tensor at run time."""

    def __init__(self, *, fixed_scale: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 10), nn.Linear(10, 3)
        self.heads, self.size = 2, 6
        self.q, self.k, self.v, self.merge = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(12, 10)
        self.scale = 6**-0.5 if fixed_scale else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        return self.head(x + self.merge((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


class Gated(nn.Module):
    """Gated linear units, RMS norm, one block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.out = nn.Linear(5, 8), nn.RMSNorm(8), nn.Linear(8, 3)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, gate = self.up(self.norm(x)).chunk(2, -1)
        x = x + self.down(a * F.silu(gate))
        return self.out(x + self.down(F.glu(self.up(x), -1)))


class LayerScale(nn.Module):
    """A depthwise layer, layer norm behind a permutation, and a parameter that scales the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale, self.last, self.out = nn.Parameter(torch.rand(8)), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.scale * self.narrow(F.gelu(self.wide(self.norm(self.depth(x).permute(0, 2, 3, 1)))))
        return self.out(self.last((x + y.permute(0, 3, 1, 2)).mean((-2, -1))))


class Signal(nn.Module):
    """One-dimensional layers, instance and batch norm on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.each = nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.InstanceNorm1d(8, affine=True)
        self.hidden, self.flat, self.out = nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.each(F.relu(self.norm(self.conv(x))))
        return self.out(F.relu(self.flat(self.hidden(x.amax(-1)))))


class Mixer(nn.Module):
    """A linear layer across tokens, which are no channels, between layers across channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.out = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        self.across, self.back = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(F.gelu(self.across(x.transpose(1, 2)))).transpose(1, 2)
        return self.out(F.relu(self.wide(x)).mean(1))


class TorchAttention(nn.Module):
    """torch's own attention layer, which ties its inner size to its outer one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide, self.out = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(F.relu(self.wide(x + self.attention(x, x, x)[0])))


class WrittenSize(nn.Module):
    """A size written into the source, which no removal can change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.second(F.relu(self.first(x)).view(-1, 4, 3).flatten(1))))


class Sorted(nn.Module):
    """An operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.second(torch.sort(self.first(x))[0])))


class Agreeing(nn.Module):
    """Two layers whose sizes must agree only because the code reads one off the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        size = x.shape[-1]
        return self.out(F.relu(self.b(x)).view(-1, size))


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 10, 10)


def sequences(n: int = 2) -> Tensor:
    return torch.randn(n, 6, 5)


def tokens(n: int = 2) -> Tensor:
    return torch.randint(0, 11, (n, 6))


def vectors(n: int = 2) -> Tensor:
    return torch.randn(n, 5)


# Network, inputs, how many layer outputs can be removed, of how many.
COUPLED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], int, int]] = {
    "squeeze_excite": (SqueezeExcite, images, 20, 23),
    "dense": (Dense, lambda n=2: torch.randn(n, 3, 8, 8), 66, 71),
    "shuffled": (Shuffled, images, 60, 64),
    "grouped": (Grouped, images, 76, 80),
    "segmenter": (Segmenter, lambda n=2: torch.randn(n, 3, 16, 16), 56, 58),
    "depthwise": (Depthwise, images, 32, 36),
    "pixel_shuffle": (PixelShuffle, images, 44, 47),
    "two_inputs": (TwoInputs, lambda n=2: {"numbers": torch.randn(n, 3), "tokens": tokens(n)}, 30, 32),
    "reused": (Reused, tokens, 40, 51),
    "twice": (Twice, vectors, 24, 27),
    "counting": (Counting, vectors, 8, 10),
    "split": (Split, vectors, 8, 12),
    "queries": (Queries, sequences, 26, 28),
    "lstm": (Recurrent, tokens, 14, 17),
    "gru": (lambda: Recurrent(nn.GRU), tokens, 14, 17),
    "rnn": (lambda: Recurrent(nn.RNN), tokens, 14, 17),
    "final_state": (FinalState, tokens, 14, 17),
    "attention": (lambda: Attention(fixed_scale=True), sequences, 56, 59),
    "attention_own_scale": (lambda: Attention(fixed_scale=False), sequences, 20, 59),
    "gated": (Gated, sequences, 36, 39),
    "layer_scale": (LayerScale, lambda n=2: torch.randn(n, 3, 8, 8), 56, 59),
    "signal": (Signal, lambda n=2: torch.randn(n, 2, 12), 34, 36),
    "mixer": (Mixer, sequences, 20, 39),
    "torch_attention": (TorchAttention, sequences, 12, 55),
    "written_size": (WrittenSize, vectors, 6, 20),
    "sorted": (Sorted, vectors, 6, 20),
    "agreeing": (Agreeing, vectors, 16, 18),
}
