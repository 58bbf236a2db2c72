"""Matching features, or outputs, inside regions of the image only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.allowed import Count
from featherweight.catalogue import ingredient
from featherweight.core.features import Taps, as_map, paired
from featherweight.errors import BadData, BadOption

Regions = Callable[[Tensor, Any], Sequence[Tensor]]
"""`(student's output without gradient, batch) -> boxes of each image`, (boxes, 4): left, top, right, bottom.

Sides are fractions of the image's width and height, so that they hold for maps of any size. Boxes without an area are
left out."""


@ingredient("match", where="top", same="channels")
def region_features(
    student: Taps,
    teacher: Taps,
    batch: Any,
    progress: float,
    *,
    regions: Regions | None = None,
    count: Count = 256,
) -> Tensor:
    """`1 / (2N) sum_i 1 / m_i ||u_i - v_i||^2` over N regions, u_i of the teacher and v_i of the student.

    Both are their maps, cropped there; m_i is the number of elements of a crop. A crop has the cells that the region
    touches, without pooling; the student's is interpolated to the size of the teacher's, which may have seen a larger
    image. Source: Li, Jin and Yan, CVPR 2017.

    Args:
        regions: boxes of each image; the whole image when left out.
        count: N, how many of a batch's regions are drawn.

    Raises:
        BadData: boxes of another shape or number than the images.
    """
    found = drawn(student, batch, regions, count)
    return sum(mimicked(ours, theirs, found) for ours, theirs in paired(student, teacher))  # type: ignore[return-value]


@ingredient("match")
def region_outputs(
    student: Taps,
    teacher: Taps,
    batch: Any,
    progress: float,
    *,
    regions: Regions | None = None,
    count: Count = 256,
) -> Tensor:
    """`region_features` of what the networks put out, (batch, channels, height, width); of one place for (batch, n).

    Args:
        regions: boxes of each image; the whole image when left out.
        count: how many of a batch's regions are drawn.

    Raises:
        BadOption: student and teacher put out unequally many channels.
    """
    ours, theirs = as_map(student[""]), as_map(teacher[""]).detach()
    if ours.shape[1] != theirs.shape[1]:
        raise BadOption(
            f"the student puts out {ours.shape[1]} channels, the teacher {theirs.shape[1]}: both must detect the same"
        )
    return mimicked(ours, theirs, drawn(student, batch, regions, count))


def drawn(student: Taps, batch: Any, regions: Regions | None, count: int) -> list[tuple[int, list[float]]]:
    """At most `count` random (image, box) of a batch.

    Raises:
        BadData: as `region_features`.
    """
    images = len(next(iter(student.values())))
    boxes = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])] * images
    if regions is not None:
        boxes = [torch.as_tensor(b).detach() for b in regions(student[""].detach(), batch)]
    if len(boxes) != images or any(b.dim() != 2 or b.shape[1] != 4 or not b.isfinite().all() for b in boxes):
        told = ", ".join(str(tuple(b.shape)) for b in boxes[:3])
        raise BadData(f"regions of {images} images must be as many tensors (boxes, 4) of numbers, not {told}, ...")
    found = [(i, box) for i, of_image in enumerate(boxes) for box in of_image.tolist() if area(box) > 0]
    return found if len(found) <= count else [found[i] for i in torch.randperm(len(found))[:count].tolist()]


def area(box: Sequence[float]) -> float:
    """The part of the image that a box covers.

    >>> area([0.5, -1.0, 2.0, 0.5]), area([0.2, 0.2, 0.2, 0.9]), area([0.0, 0.0, 0.0, 0.0])
    (0.25, 0.0, 0.0)
    """
    left, top, right, bottom = (min(max(side, 0.0), 1.0) for side in box)
    return max(right - left, 0.0) * max(bottom - top, 0.0)


def mimicked(ours: Tensor, theirs: Tensor, regions: Sequence[tuple[int, list[float]]]) -> Tensor:
    """The loss of two maps of equally many channels in these regions; 0 where there are none."""
    ours, theirs = as_map(ours), as_map(theirs)
    losses = []
    for image, box in regions:
        v, u = crop(ours[image], box), crop(theirs[image], box)
        if v.shape != u.shape:
            v = F.interpolate(v[None], u.shape[1:], mode="bilinear", align_corners=False)[0]
        losses.append(F.mse_loss(v, u))
    return 0.5 * torch.stack(losses).mean() if losses else ours.sum() * 0


def crop(features: Tensor, box: Sequence[float]) -> Tensor:
    """The cells of a map (channels, height, width) that a box touches.

    >>> crop(torch.arange(16.0).view(1, 4, 4), [0.25, 0.0, 0.7, 0.25]).tolist()
    [[[1.0, 2.0]]]
    """
    (x1, x2), (y1, y2) = (touched(box[side], box[side + 2], features.shape[2 - side]) for side in (0, 1))
    return features[:, y1:y2, x1:x2]


def touched(low: float, high: float, cells: int) -> tuple[int, int]:
    """The first cell of a row that an interval touches, and the one behind the last: at least one."""
    start = min(max(math.floor(low * cells + 1e-4), 0), cells - 1)
    return start, min(max(math.ceil(high * cells - 1e-4), start + 1), cells)
