"""Features of two networks: what layers put out, which layers of student and teacher belong together, common shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.core.task import Batch, Task, eval_mode, run
from featherweight.errors import BadOption

Taps = Mapping[str, Tensor]
"""Outputs of layers by path, in the order of the pairs; the logits under "", the network's input under "<input>"."""

INPUT = "<input>"

Places = Literal["logits", "last", "top", "deep", "ends", "stages", "any"]
"""Where a comparison looks: at the logits alone; the last layer before them; the last maps; the last maps, or the last
layer where a network has no maps; the last maps of each size; these and the first maps; the last maps of each size, or
the last layer where a network has no maps."""

EITHER: tuple[Places, ...] = ("deep", "any")
"""Those that take the last layer where there are no maps."""


def features(model: nn.Module, task: Task, batch: Batch) -> dict[str, tuple[int, ...]]:
    """Shape of the output of every layer, in the order in which they end; of maps alone if there are any.

    The layer that puts out what the network puts out is not among them.
    """
    shapes = outputs(model, task, batch)
    maps = [path for path, shape in shapes.items() if is_map(shape)]
    return {path: shapes[path] for path in maps or shapes}


def outputs(model: nn.Module, task: Task, batch: Batch) -> dict[str, tuple[int, ...]]:
    """Shape of the output of every layer but the network's own, in the order in which they end."""
    shapes: dict[str, tuple[int, ...]] = {}
    held: dict[str, Tensor] = {}

    def tap(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1:
                shapes.pop(path, None)
                shapes[path], held[path] = (*output.shape,), output

        return hook

    handles = [m.register_forward_hook(tap(path)) for path, m in model.named_modules() if path]
    try:
        with eval_mode(model):
            whole, _ = run(model, task, batch)
    finally:
        for handle in handles:
            handle.remove()
    ends = [id(t) for t in (whole.values() if isinstance(whole, Mapping) else whole if _several(whole) else [whole])]
    return {path: shape for path, shape in shapes.items() if id(held[path]) not in ends}


def _several(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def is_map(shape: tuple[int, ...]) -> bool:
    """Whether features (batch, channels, height, width) have a height or a width.

    >>> is_map((2, 8, 4, 4)), is_map((2, 8, 1, 1)), is_map((2, 8))
    (True, False, False)
    """
    return len(shape) == 4 and max(shape[2:]) > 1


def middle(shapes: Iterable[str], whose: str, order: list[str] | None = None) -> str:
    """Of the given layers, the one nearest the middle of the order in which all are called.

    Raises:
        BadOption: there is none.
    """
    paths = list(shapes)
    if not paths:
        raise BadOption(f"the {whose} has no layer between input and output to take: pass a deeper network")
    order = order or paths
    return min(paths, key=lambda path: abs(order.index(path) - (len(order) - 1) / 2))


def stages(shapes: Mapping[str, tuple[int, ...]], where: Places = "stages") -> list[str]:
    """The layers that a `where` means, in order; none if that means maps and there are none.

    >>> shapes = {"stem": (2, 8, 8, 8), "a": (2, 8, 8, 8), "b": (2, 8, 4, 4), "c": (2, 8, 4, 4), "pool": (2, 8, 1, 1)}
    >>> stages(shapes), stages(shapes, "ends"), stages(shapes, "top"), stages(shapes, "last")
    (['stem', 'a', 'c'], ['a', 'c'], ['c'], ['pool'])
    """
    maps = {path: shape for path, shape in shapes.items() if is_map(shape)}
    if where == "last" or (where in EITHER and not maps):
        return list(shapes)[-1:]
    last = {shape[2:]: path for path, shape in maps.items()}
    ends = [path for path in maps if path in last.values()]
    if where in ("top", "deep"):
        return ends[-1:]
    stem = list(maps)[:1] if where == "stages" and len(maps) > len(ends) else []
    return [path for path in stem if path not in ends] + ends


def matched(student: nn.Module, teacher: nn.Module, task: Task, batch: Batch, where: Places) -> list[tuple[str, str]]:
    """Pairs (student's layer, teacher's layer) that belong together.

    If the networks have unequally many of the layers that are meant, those with maps of the same size are taken, or
    where there are none the last of both.

    Raises:
        BadOption: a network has no such layer.
    """
    if where == "logits":
        return []
    ours, theirs = outputs(student, task, batch), outputs(teacher, task.of_teacher(), batch)
    for shapes, whose in ((ours, "student"), (theirs, "teacher")):
        if not shapes:
            raise BadOption(f"the {whose} has no layer between input and output to take: pass a deeper network")
        if not stages(shapes, where):
            raise BadOption(
                f"the {whose} has no feature maps (batch, channels, height, width), which this comparison looks at: "
                "choose one that takes vectors, such as rkd or locality_preserving"
            )
    if where in EITHER and not (stages(ours) and stages(theirs)):
        where = "last"
    return _zipped({p: ours[p] for p in stages(ours, where)}, {p: theirs[p] for p in stages(theirs, where)})


def _zipped(ours: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> list[tuple[str, str]]:
    if len(ours) == len(theirs):
        return list(zip(ours, theirs, strict=True))
    ends = {shape[2:]: path for path, shape in theirs.items()}  # the last of each size
    same = {ends[shape[2:]]: path for path, shape in ours.items() if shape[2:] in ends}
    if same:
        return [(ours_path, path) for path, ours_path in same.items()]
    count = min(len(ours), len(theirs))
    return list(zip(list(ours)[-count:], list(theirs)[-count:], strict=True))


def paired(student: Taps, teacher: Taps) -> Iterator[tuple[Tensor, Tensor]]:
    """The features of paired layers, in order, without logits and inputs; the teacher's are constants.

    >>> a, b = {"x": torch.ones(1), "": torch.ones(1)}, {"y": torch.zeros(1), "": torch.ones(1)}
    >>> [(float(s), float(t)) for s, t in paired(a, b)]
    [(1.0, 0.0)]
    """
    ours, theirs = ([t for path, t in taps.items() if path not in ("", INPUT)] for taps in (student, teacher))
    return ((s, t.detach()) for s, t in zip(ours, theirs, strict=True))


def scores(student: Taps, teacher: Taps) -> tuple[Tensor, Tensor]:
    """The logits of both, (samples, classes) in single precision at least; pixels and tokens count as samples.

    Raises:
        BadOption: their shapes differ.
    """
    ours, theirs = student[""], teacher[""]
    if ours.shape != theirs.shape:
        raise BadOption(
            f"the student's outputs {tuple(ours.shape)} do not fit the teacher's {tuple(theirs.shape)}: "
            "both must score the same classes"
        )
    return rows(ours), rows(theirs).detach()


def rows(logits: Tensor) -> Tensor:
    """Outputs (batch, classes, ...) as (samples, classes), in single precision at least; (batch,) as one column."""
    wide = logits[:, None] if logits.dim() == 1 else logits
    return exact(wide.movedim(1, -1).flatten(0, -2))


def vectors(features: Tensor) -> Tensor:
    """Features of any shape as (batch, d), in single precision at least."""
    return exact(features.flatten(1))


def exact(values: Tensor) -> Tensor:
    """In single precision at least: losses are not computed in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def as_map(features: Tensor) -> Tensor:
    """Features as (batch, channels, height, width): tokens (batch, n, d) lie along the height, vectors have 1 x 1.

    >>> [tuple(as_map(torch.zeros(s)).shape) for s in [(2, 8, 4, 3), (2, 5, 8), (2, 8)]]
    [(2, 8, 4, 3), (2, 8, 5, 1), (2, 8, 1, 1)]
    """
    values = exact(features)
    if values.dim() == 3:
        return values.transpose(1, 2)[..., None]
    return values[..., None, None] if values.dim() == 2 else values


def same_size(a: Tensor, b: Tensor, pooling: Literal["average", "max"] = "average") -> tuple[Tensor, Tensor]:
    """Two maps (batch, channels, height, width) at the smaller height and the smaller width of both.

    >>> [tuple(m.shape[2:]) for m in same_size(torch.zeros(1, 2, 8, 4), torch.zeros(1, 3, 4, 8))]
    [(4, 4), (4, 4)]
    """
    pool = F.adaptive_avg_pool2d if pooling == "average" else F.adaptive_max_pool2d
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return tuple(m if m.shape[2:] == size else pool(m, size) for m in (a, b))  # type: ignore[return-value]


def squared_distances(f: Tensor) -> Tensor:
    """`||f_i - f_j||^2` of the rows of f (n, d), exactly 0 on the diagonal, with a gradient everywhere."""
    f = f - f.mean(0)  # distances stay, rounding errors shrink
    products = f @ f.T
    squares = products.diagonal()
    off = 1 - torch.eye(len(f), device=f.device, dtype=f.dtype)
    return (squares[:, None] + squares[None] - 2 * products).clamp_min(0) * off
