"""Data of other kinds than (image, class), made of real digits: two modalities of one image, canvases with boxes and
masks, clips in several streams; and the small networks that look at them."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.core.task import Metric, Task


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


def canvases(n: int, classes: int = 2, side: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Images (n, 1, side, side) with a digit somewhere in two of their quarters.

    `boxes` (n, 4, 4) in fractions, without an area where a quarter is empty; `cells` (n, side / 8, side / 8): the digit
    that has its centre there, counted from 1, 0 for none; `mask` (n, side, side): the same for every pixel.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = digits(classes)
    half, cells = side // 2, side // 8
    found = {
        "image": torch.zeros(n, 1, side, side),
        "boxes": torch.zeros(n, 4, 4),
        "cells": torch.zeros(n, cells, cells, dtype=torch.long),
        "mask": torch.zeros(n, side, side, dtype=torch.long),
    }
    for i in range(n):
        for quarter in torch.randperm(4, generator=generator)[:2].tolist():
            which = int(torch.randint(len(x), (1,), generator=generator))
            row, column = torch.randint(half - 8 + 1, (2,), generator=generator).tolist()
            top, left = row + half * (quarter // 2), column + half * (quarter % 2)
            digit, label = x[which, 0], int(y[which]) + 1
            found["image"][i, 0, top : top + 8, left : left + 8] = digit
            found["boxes"][i, quarter] = torch.tensor([left, top, left + 8, top + 8]) / side
            found["cells"][i, min((top + 4) // 8, cells - 1), min((left + 4) // 8, cells - 1)] = label
            found["mask"][i, top : top + 8, left : left + 8] = (digit > 0.2) * label
    return found


def detector(width: int, classes: int = 2) -> nn.Sequential:
    """Scores of each cell of 8 x 8 pixels: the logit of no object, then of the classes, then the box around it."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 1 + classes + 4, 1),
    )


def detection_loss(output: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the cells, and the distance of the boxes' sides from the cells' centres where objects are."""
    scores, sides = output[:, :-4], output[:, -4:]
    loss = F.cross_entropy(scores, target["cells"], weight=scores.new_tensor([0.3] + [1.0] * (scores.shape[1] - 1)))
    full = target["cells"] > 0
    wanted = around(target).permute(0, 2, 3, 1)[full]
    return loss + F.smooth_l1_loss(sides.permute(0, 2, 3, 1)[full], wanted)


def centres(cells: int) -> Tensor:
    """The centres of cells, (4, cells, cells): x, y, x, y."""
    at = (torch.arange(cells) + 0.5) / cells
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x, y, x, y])


def around(target: dict[str, Tensor]) -> Tensor:
    """For each cell the sides of the box whose centre is in it, from the cell's centre, (n, 4, cells, cells)."""
    cells = target["cells"].shape[-1]
    found = torch.zeros(len(target["cells"]), 4, cells, cells)
    for i, boxes in enumerate(target["boxes"]):
        for box in boxes[boxes[:, 2] > 0]:
            x, y = (((box[:2] + box[2:]) / 2 * cells).long().clamp_max(cells - 1)).tolist()
            found[i, :, y, x] = box - centres(cells)[:, y, x]
    return found


def proposed(output: Tensor, batch, count: int = 4) -> list[Tensor]:
    """The boxes of the cells that are least likely to be empty."""
    objects = 1 - output[:, :-4].softmax(1)[:, 0]
    boxes = (output[:, -4:] + centres(output.shape[-1])).clamp(0, 1).flatten(2)
    best = objects.flatten(1).topk(count).indices
    return [of_image[:, at].T for of_image, at in zip(boxes, best, strict=True)]


def detection_task(n: int) -> Task:
    """Half as many canvases again to validate on; the metric is the share of cells that are right."""
    parts = [Named(**canvases(count, seed=seed)) for seed, count in ((0, n), (1, n // 2))]
    right = Metric("cells", per_sample=lambda o, t: (o[:, :-4].argmax(1) == t["cells"]).float().mean((1, 2)))

    def split(batch):
        return (batch["image"],), {}, batch

    return Task(train=parts[0], valid=parts[1], split=split, loss=detection_loss, metric=right)


def segmenter(width: int, classes: int = 3) -> nn.Sequential:
    """Scores of every pixel, the background's first."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 5, padding=4, dilation=2),
        nn.ReLU(),
        nn.Conv2d(2 * width, classes, 1),
    )


def mask_task(n: int) -> Task:
    """Canvases of 24 x 24 with the class of every pixel; half as many again to validate on."""
    parts = [Named(**canvases(count, side=24, seed=seed)) for seed, count in ((0, n), (1, n // 2))]
    return Task(train=parts[0], valid=parts[1], split=looks_at("image", "mask"))
