"""Small networks and tasks that the tests share; every test starts from the same seed."""

import gc
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor, nn

import featherweight.core.task as core
from featherweight import pipeline
from featherweight.core.fit import fit


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays; searching it for garbage again and again took a second a time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _short_timing() -> None:
    """Tests look at what is timed, not at how long it takes."""
    pipeline.LATENCY_SECONDS = 0.01


@pytest.fixture(autouse=True, scope="session")
def _operators_once() -> None:
    """PyTorch reads its table of 500 ONNX operators anew for every export, half of its time; here it is read once."""
    with suppress(ImportError, AttributeError):  # it is a part that PyTorch does not promise: without it tests are slow
        from torch.onnx._internal.exporter._registration import onnxscript_apis

        onnxscript_apis.get_torchlib_ops = cache(onnxscript_apis.get_torchlib_ops)


class Batches:
    """Re-iterable batches over tensors in memory, in a fixed order."""

    def __init__(self, x: Tensor, y: Tensor, size: int = 32) -> None:
        self.x, self.y, self.size = x, y, size

    def __len__(self) -> int:
        return (len(self.x) + self.size - 1) // self.size

    def __iter__(self):
        return zip(self.x.split(self.size), self.y.split(self.size), strict=True)


def blobs(shape: tuple[int, ...], classes: int = 4, n: int = 128, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Noisy copies of one random pattern per class: a problem that a small network learns in a few steps."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(classes, *shape, generator=generator)
    y = torch.arange(n) % classes
    return centres[y] + noise * torch.randn(n, *shape, generator=generator), y


def small_task(shape: tuple[int, ...] = (1, 8, 8), classes: int = 4, **options) -> core.Task:
    x, y = blobs(shape, classes)
    return core.Task(train=Batches(x[:96], y[:96]), valid=Batches(x[96:], y[96:]), **options)


def small_mlp(classes: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))


def small_cnn(classes: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, core.Task]:
    """A small network that has learned its task; tests work on copies of it."""
    torch.manual_seed(0)
    task = small_task()
    return fit(small_cnn(), task, epochs=8, lr=0.01).eval(), task


class Sentences(nn.Module):
    """Token numbers to classes: an embedding, the mean over the tokens, a linear layer."""

    def __init__(self, tokens: int = 60, width: int = 24, classes: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).mean(1))


def token_task(tokens: int = 60, classes: int = 4, n: int = 128) -> core.Task:
    """Sentences of six tokens, half of them of those that belong to the class."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(n) % classes
    own = torch.randint(tokens // classes, (n, 3), generator=generator) * classes + y[:, None]
    x = torch.cat([own, torch.randint(tokens, (n, 3), generator=generator)], 1)
    return core.Task(train=Batches(x[:96], y[:96]), valid=Batches(x[96:], y[96:]))


class Residual(nn.Module):
    """A block of a stack: norm, wider, narrower, added."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def small_stack(classes: int = 4) -> nn.Sequential:
    """Four blocks of one kind."""
    blocks = nn.Sequential(*[Residual() for _ in range(4)])
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), blocks, nn.Linear(16, classes))


class Sequences(nn.Module):
    """Sequences of eight numbers to classes: two recurrent layers, a linear layer on the last state."""

    def __init__(self, width: int = 20, classes: int = 4) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, width, 2, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def sequence_task() -> core.Task:
    return small_task((6, 8))


class Writer(nn.Module):
    """A source of words and what was written of it so far to scores of the next word, at every place."""

    def __init__(self, words: int = 12, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.reads = nn.GRU(width, width, batch_first=True)
        self.writes = nn.GRU(2 * width, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, source: Tensor, prefix: Tensor) -> Tensor:
        read = self.reads(self.embedding(source))[0][:, -1:]
        written = self.embedding(prefix)
        return self.head(self.writes(torch.cat([written, read.expand(-1, written.shape[1], -1)], 2))[0])


def writing_task(n: int = 128, **options) -> core.Task:
    """Three words of 4..11, to be written backwards and ended by 2; prefixes start with 3."""
    source = torch.randint(4, 12, (n, 3), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([source.flip(1), torch.full((n, 1), 2)], 1)
    prefix = torch.cat([torch.full((n, 1), 3), labels[:, :-1]], 1)
    rows = [*zip(*(t.split(32) for t in (source, prefix, labels)), strict=True)]
    right = core.Metric("words", per_sample=lambda out, y: (out.argmax(2) == y).float().mean(1))
    options = {"loss": lambda out, y: nn.functional.cross_entropy(out.flatten(0, 1), y.flatten()), **options}
    return core.Task(train=rows[:-1], valid=rows[-1:], metric=right, **options)


def fused_operators(path: Path, folder: Path) -> list[str]:
    """What ONNX Runtime makes of an ONNX file."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node]
