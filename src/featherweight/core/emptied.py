"""What training has emptied is taken out: channels that are constant or unread, residual branches that are zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.core.channels import Channels, channel_groups
from featherweight.core.constants import remove_constants
from featherweight.core.groups import makers, readers, wholes
from featherweight.core.ledger import note
from featherweight.core.residual import branches, remove_branches
from featherweight.core.task import Task
from featherweight.core.widths import rounded
from featherweight.errors import CompressionError


def remove_zero_channels(model: nn.Module, task: Task, round_to: int) -> int:
    """Removes the channels whose filters are all zero, or whose readers are, in place; returns how many.

    Raises:
        CompressionError: all channels of a layer are dead.
    """
    channels = channel_groups(model, task.inputs())
    made, read = makers(model, channels), readers(model, channels)
    dead = (made.zero(model) | read.zero(model)).nonzero().flatten()
    left = made.norms(model)[dead] + read.norms(model)[dead]
    return remove_dead(model, task, channels, dead[left.argsort(stable=True)], round_to)


def remove_dead(model: nn.Module, task: Task, channels: Channels, dead: Tensor, round_to: int) -> int:
    """Removes channels that are constant or unread, in place; what they still bring other layers moves there.

    The model holds no forms on weights.

    Args:
        channels: of the model as it is.
        dead: numbers of channels, the most expendable first.
        round_to: wider layers keep a multiple of this many channels.

    Raises:
        CompressionError: all channels of a layer are dead.
    """
    for path, ids in channels.outputs.items():
        if bool((ids >= 0).any()) and bool(torch.isin(ids, dead).all()):
            raise CompressionError(f"every channel of {path} became zero, the network is dead: lower the penalty")
    doomed = rounded(channels, dead, round_to)
    remove_constants(model, task, channels, doomed)
    note(f"{len(doomed)} of {channels.count} channels removed, {len(dead)} were zero")
    return len(doomed)


def check_emptied(gone: int, round_to: int) -> None:
    """Refuses a run in which nothing was emptied.

    Raises:
        CompressionError: nothing was.
    """
    if not gone:
        raise CompressionError(
            f"nothing became zero that could be removed: raise the penalty, lr or epochs, or lower round_to={round_to}"
        )


def remove_zero_branches(model: nn.Module, task: Task) -> int:
    """Replaces every residual block whose branch is all zeros by what it computes without it; returns how many."""
    found = branches(model, task.inputs())
    zero = wholes(model, [branch.layers for branch in found]).zero(model)
    gone = [branch for branch, empty in zip(found, zero.tolist(), strict=True) if empty]
    remove_branches(model, gone, task.inputs())
    note(f"{len(gone)} of {len(found)} residual branches removed: {', '.join(b.block for b in gone) or 'none'}")
    return len(gone)
