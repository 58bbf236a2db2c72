"""Coarse-grain sparsification: random square blocks of fully connected layers are left out from the start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note, skip
from featherweight.core.masks import settle, told
from featherweight.core.restart import reinitialise as drawn_anew
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.errors import BadOption


@recipe(
    paper="Kadetotad et al., ICCAD 2016",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"where": None, "block": 2, "epochs": 2},
)
def cgs(
    model: nn.Module,
    task: Task,
    *,
    sparsity: Fraction = 0.75,
    block: Count = 16,
    reinitialise: bool = True,
    epochs: Amount = 20,
    lr: Positive = 0.05,
    optimizer: Optimizers = "sgd",
    where: WhereLinearOrConv2d = "Linear",
) -> nn.Module:
    """Masks random blocks of the weight matrices at initialisation, equally many in a row of blocks, then trains.

    Deepak Kadetotad, Sairam Arunachalam, Chaitali Chakrabarti, Jae-sun Seo, "Efficient Memory Compression in Deep
    Neural Networks Using Coarse-Grain Sparsification for Speech Applications", ICCAD 2016. A matrix is tiled into
    blocks of `block` x `block`; of each row of blocks a fixed number is kept, at random; `y = (W*C) x` with `C`
    constant, and gradients are masked by it too. What is stored is the kept blocks and one small integer for each.
    There is no criterion: compare the result with a dense network of as many weights.

    Since what is compressed usually comes trained, its weights are drawn anew first; with `reinitialise=False` those
    that come are trained on.

    Departs from the paper: convolutions may be chosen too; blocks are drawn such that all columns of blocks are kept
    equally often, as far as numbers go, so that no input is left that nothing reads; 5- and 6-bit weights are another
    method's business; that each row of blocks keeps equally many is from memory of the paper, not checked against its
    text. What an earlier method masked stays masked.

    Args:
        sparsity: fraction of the blocks left out in every row of blocks; at least one of them stays.
        block: side of a block; matrices that are no multiple of it have smaller blocks at their ends.
        reinitialise: draw the initial weights anew first.
        epochs: training with the mask.
        lr: learning rate of the training.
        optimizer: "sgd" (default), "adam" or "adamw".
        where: which linear and 2d convolution layers; the linear ones when left out. The matrix of a convolution is
            (outputs, inputs times kernel).

    Raises:
        BadOption: every layer is too small for its blocks.
    """
    found = coarse(sites(model, where, (nn.Linear, nn.Conv2d)), sparsity, block)
    allowed = {path: site.keep for path, site in found.items()}
    if reinitialise:
        drawn_anew(model)
    for path, site in found.items():
        rows, columns = (-(-size // block) for size in site.weight.flatten(1).shape)
        chosen = draw(rows, columns, kept(columns, sparsity))
        keep = spread(chosen, block, site.weight.flatten(1).shape).view(site.weight.shape)
        site.set_mask(model, keep & allowed[path])
        unread = int((~chosen.any(0)).sum())
        note(f"{path}: {int(chosen.sum())} of {rows * columns} blocks kept, {kept(columns, sparsity)} in each row"
             + (f"; {unread} columns of blocks are read by nothing" if unread else ""))  # fmt: skip
    settle(model, found)
    note(told(found))
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train")


def kept(columns: int, sparsity: float) -> int:
    """How many blocks of a row of blocks stay.

    >>> kept(8, 0.75), kept(3, 0.9)
    (2, 1)
    """
    return max(1, round((1 - sparsity) * columns))


def coarse(found: dict[str, Site], sparsity: float, block: int) -> dict[str, Site]:
    """The layers that have blocks to leave out.

    Raises:
        BadOption: none has.
    """
    able = {}
    for path, site in found.items():
        columns = -(-site.weight.flatten(1).shape[1] // block)
        if kept(columns, sparsity) == columns:
            skip(path, f"{columns} blocks of {block} in a row: none can be left out")
        else:
            able[path] = site
    if not able:
        raise BadOption(
            f"no chosen layer has blocks of block={block} to leave out at sparsity={sparsity:g}: lower block"
        )
    return able


def draw(rows: int, columns: int, count: int) -> Tensor:
    """A random choice of `count` blocks in each row, (rows, columns), of the columns chosen least often so far."""
    chosen, used = torch.zeros(rows, columns, dtype=torch.bool), torch.zeros(columns)
    for row in chosen:
        picked = (used + torch.rand(columns)).argsort()[:count]
        row[picked] = True
        used[picked] += 1
    return chosen


def spread(chosen: Tensor, block: int, shape: torch.Size) -> Tensor:
    """The mask of a weight of `shape` from the choice of its blocks."""
    return chosen.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]]


@dataclass(frozen=True)
class Packed:
    """A matrix as its kept blocks (rows, kept, block, block), and the column of each, `index` (rows, kept)."""

    blocks: Tensor
    index: Tensor
    shape: tuple[int, int]

    def __matmul__(self, x: Tensor) -> Tensor:
        """`W x` for `x` of shape (in,)."""
        side = self.blocks.shape[-1]
        columns = -(-self.shape[1] // side)
        tiled = nn.functional.pad(x, (0, columns * side - self.shape[1])).view(columns, side)
        return torch.einsum("rkij,rkj->ri", self.blocks, tiled[self.index.long()]).flatten()[: self.shape[0]]


def pack(weight: Tensor, block: int) -> Packed:
    """The blocks of a matrix that are not zero, equally many in each row of blocks.

    Raises:
        BadOption: rows of blocks have different numbers of them, or there are more than 256 columns of blocks.
    """
    rows, columns = (-(-size // block) for size in weight.shape)
    if columns > 256:
        raise BadOption(f"{columns} columns of blocks do not fit one byte: raise block={block}")
    padded = nn.functional.pad(weight, (0, columns * block - weight.shape[1], 0, rows * block - weight.shape[0]))
    tiles = padded.view(rows, block, columns, block).transpose(1, 2)
    filled = tiles.flatten(2).any(2)
    counts = filled.sum(1)
    if int(counts.min()) != int(counts.max()):
        raise BadOption(
            f"rows of blocks hold {int(counts.min())} to {int(counts.max())} blocks: they must hold equally many"
        )
    index = filled.nonzero()[:, 1].view(rows, -1)
    return Packed(tiles[filled].view(rows, -1, block, block), index.to(torch.uint8), (weight.shape[0], weight.shape[1]))
