"""Smaller examples for networks whose sizes are free: tracing and trying out cost less, and find the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from featherweight.core.task import eval_mode
from featherweight.core.wired import Wired
from featherweight.errors import BadData

SMALL = 64  # entries along a dimension: two by two are left of an image where a network divides its sides by 32


def smaller(model: Wired, tree: Any, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """A call, or an example of inputs, with every free size beside the batch cut to 64.

    As it was where the network does not take that.

    Args:
        tree: what holds the tensors of the call, in any form.
        call: the arguments by position and by name.

    Raises:
        BadData: the network does not take the call itself.
    """
    cut: dict[int, Tensor] = {}
    for wanted, given in zip(model.wiring.inputs, model.given(*call), strict=True):
        part = given
        for dim in wanted.free:
            part = part.narrow(dim, 0, min(SMALL, part.shape[dim])) if dim else part
        cut[id(given)] = part

    def replaced(tree: Any) -> Any:
        return pytree.tree_map(lambda t: cut.get(id(t), t) if isinstance(t, Tensor) else t, tree)

    args, kwargs = replaced(call)
    try:
        with eval_mode(model):
            model(*args, **kwargs)
    except (BadData, RuntimeError, IndexError):
        return tree
    return replaced(tree)
