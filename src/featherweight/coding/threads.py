"""Work on independent pieces in as many threads as torch uses; what is compiled lets go of the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


def each(function: Callable[[Item], Made], items: Sequence[Item], *, worth: bool = True) -> list[Made]:
    """What a function makes of each item, in order; in one thread where more are not worth it.

    Raises:
        Exception: the first one in order that the function raised.
    """
    threads = min(torch.get_num_threads(), len(items))
    if not worth or threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
