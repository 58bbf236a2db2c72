"""Data of other kinds than (image, class), made of real digits: two modalities of one image, canvases with boxes and
masks, clips in several streams; and the small networks that look at them."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@cache
def digits(classes: int = 4) -> tuple[Tensor, Tensor]:
    """The digits below `classes` of scikit-learn, (n, 1, 8, 8) in 0..1, in the order of the set."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(y).long()
    return x[y < classes], y[y < classes]


def edges(x: Tensor) -> Tensor:
    """Another modality of an image: the size of its gradient (Sobel)."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    both = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), torch.stack([kernel, kernel.T])[:, None])
    return both.square().sum(1, keepdim=True).sqrt() / 4


class Named:
    """Re-iterable batches of tensors by name, in a fixed order."""

    def __init__(self, size: int = 32, **tensors: Tensor) -> None:
        self.size, self.tensors = size, tensors

    def __len__(self) -> int:
        return (len(next(iter(self.tensors.values()))) + self.size - 1) // self.size

    def __iter__(self):
        for part in zip(*(t.split(self.size) for t in self.tensors.values()), strict=True):
            yield dict(zip(self.tensors, part, strict=True))


def looks_at(name: str, target: str = "labels"):
    """A split of batches by name: the network sees what stands under this one."""
    return lambda batch: ((batch[name],), {}, batch.get(target))


def classifier(classes: int = 4, width: int = 8) -> nn.Sequential:
    """Two convolutions, their last maps of size 4 x 4, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * width, classes),
    )


def clips(digit_count: int = 2) -> dict[str, Tensor]:
    """Clips of two frames in which a digit moves to the left or to the right: the class is digit and direction.

    The first frame alone does not show the direction, the displacement not the digit.
    """
    x, y = digits(digit_count)
    right = torch.arange(len(x)) // 3 % 2
    first = F.pad(x, (2, 2))
    second = torch.where(right.bool()[:, None, None, None], F.pad(x, (4, 0)), F.pad(x, (0, 4)))
    displacement = torch.stack([4.0 * right - 2.0, torch.zeros(len(x))], 1)
    clip = torch.cat([first, second], 1)
    return {"frame": first, "displacement": displacement, "clip": clip, "labels": 2 * y + right}
