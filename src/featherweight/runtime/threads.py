"""As many threads as PyTorch has been given, for compiled loops that let go of the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def divided(work: Callable[[int, int], None], jobs: int, cost: float) -> None:
    """Calls `work(first, last)` on equal shares of 0 to `jobs`, side by side.

    Args:
        cost: of all jobs in microseconds; what takes less than handing it over is done at once.
    """
    shares = min(torch.get_num_threads(), jobs, int(cost / WORTH) + 1)
    if shares <= 1:
        work(0, jobs)
        return
    ends = [jobs * i // shares for i in range(shares + 1)]
    others = [_pool(shares - 1).submit(work, ends[i], ends[i + 1]) for i in range(1, shares)]
    work(0, ends[1])
    for other in others:
        other.result()


WORTH = 100.0  # microseconds: handing work to another thread takes about half of this


def _pool(size: int) -> ThreadPoolExecutor:
    """A pool of this process: threads do not live on in a fork."""
    key = (os.getpid(), size)
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(size, thread_name_prefix="featherweight")
    return _pools[key]
