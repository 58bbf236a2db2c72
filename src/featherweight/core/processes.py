"""Several processes that train together, as `accelerate launch` starts them: who is the main one, and what they share.

One process alone is the ordinary case: it is the main one, means are its own values, and nothing is sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.core.draws import drawn, redraw
from featherweight.errors import CompressionError

T = TypeVar("T")

_apart: ContextVar[bool] = ContextVar("apart", default=False)


def together() -> bool:
    """Whether there are other processes to share with."""
    if _apart.get() or not dist.is_available():
        return False
    if not dist.is_initialized() and "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState()  # joins the group that the launcher has described
    return dist.is_initialized() and dist.get_world_size() > 1


def count() -> int:
    return dist.get_world_size() if together() else 1


def index() -> int:
    return dist.get_rank() if together() else 0


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return index() == 0


@contextmanager
def apart() -> Iterator[None]:
    """A block in which every process goes its own way: nothing is shared, whatever is called."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


@contextmanager
def shared() -> Iterator[None]:
    """A block inside of `apart` in which all meet again: every process must come to it equally often."""
    token = _apart.set(False)
    try:
        yield
    finally:
        _apart.reset(token)


def wait() -> None:
    """Until all are here."""
    if together():
        dist.barrier()


def from_main(value: T) -> T:
    """The main process's value, in all."""
    if not together():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def main_only(work: Callable[[], T]) -> T:
    """What the main process alone does; the others wait for it, get what it returns, and fail if it failed."""
    if not together():
        return work()
    made: Any = None
    try:
        if is_main():
            with apart():
                made = (work(), None)
    except Exception as error:
        from_main((None, f"{type(error).__name__}: {error}"))
        raise
    value, failed = from_main(made)
    if failed is not None:
        raise CompressionError(f"the main process failed: {failed}")
    return value


def same_draws() -> None:
    """Puts the generators of all processes where those of the main one stand, so that they shuffle and drop alike."""
    if together():
        redraw(from_main(drawn()))


def same_tensors(tensors: Sequence[Tensor], source: int = 0) -> None:
    """Puts the values that one process has into the tensors of all."""
    if together():
        with torch.no_grad():
            for tensor in tensors:
                held = tensor.detach().contiguous()
                dist.broadcast(held, src=source)
                tensor.copy_(held)


def same_network(model: nn.Module, source: int = 0) -> None:
    """Puts the parameters and buffers of one process's network into the networks of all."""
    if together():
        same_tensors([*model.parameters(), *model.buffers()], source)


def mean(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors by their means over the processes, in few messages."""
    kinds = {(t.dtype, t.device) for t in tensors}
    for kind in sorted(kinds, key=str) if together() else ():
        some = [t for t in tensors if (t.dtype, t.device) == kind]
        flat = torch.cat([t.detach().reshape(-1) for t in some])
        dist.all_reduce(flat)
        for tensor, value in zip(some, (flat / count()).split([t.numel() for t in some]), strict=True):
            tensor.copy_(value.view(tensor.shape))


def mean_gradients(params: Sequence[nn.Parameter]) -> None:
    """Replaces gradients by their means over the processes; one that only some have counts as 0 in the others."""
    if not together() or not params:
        return
    there = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    dist.all_reduce(there)
    some = [p for p, held in zip(params, there.tolist(), strict=True) if held]
    for param in some:
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad
    with torch.no_grad():
        mean([p.grad for p in some if p.grad is not None])


def settle(model: nn.Module) -> None:
    """One network in all processes: running statistics are means over them, other buffers those of the main one."""
    if together():
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        statistics = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        known = {id(b) for b in statistics}
        mean(statistics)
        same_tensors([b for b in model.buffers() if id(b) not in known])


def gathered(value: Tensor) -> list[Tensor]:
    """What every process has, tensors of one shape, in the order of the processes."""
    if not together():
        return [value]
    held = [torch.empty_like(value.detach().contiguous()) for _ in range(count())]
    dist.all_gather(held, value.detach().contiguous())
    return held
