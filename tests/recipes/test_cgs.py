"""Kadetotad et al. 2016: equally many blocks in every row of blocks, drawn once, packed with a byte for each."""

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.forms import Mask, attach, bake, mask_of
from featherweight.core.ledger import recording
from featherweight.errors import BadOption
from featherweight.recipes.cgs import draw, pack

cgs = entry("cgs")


def tiles(keep: torch.Tensor, block: int) -> torch.Tensor:
    """Whether each block is kept: (rows, columns), after a look that blocks are whole."""
    rows, columns = (size // block for size in keep.shape)
    tiled = keep.view(rows, block, columns, block).transpose(1, 2).flatten(2)
    assert torch.equal(tiled.any(2), tiled.all(2))
    return tiled.any(2)


@pytest.mark.parametrize(("sparsity", "block", "per_row"), [(0.75, 8, 2), (0.5, 16, 2), (0.9, 4, 2), (0.99, 16, 1)])
def test_every_row_of_blocks_keeps_equally_many_and_no_input_is_unread(sparsity, block, per_row):
    model = cgs(small_mlp(), small_task(), where="1", sparsity=sparsity, block=block, epochs=0)
    kept = tiles(mask_of(model[1]), block)
    assert kept.sum(1).tolist() == [per_row] * (32 // block)
    assert int(kept.any(0).sum()) == min(64 // block, per_row * (32 // block))


def test_columns_are_used_equally_often():
    used = draw(30, 12, 4).sum(0)
    assert used.tolist() == [10] * 12
    assert int(draw(5, 12, 4).sum(0).max()) - int(draw(5, 12, 4).sum(0).min()) <= 2


def test_masks_are_those_of_the_seed():
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(mask_of(cgs(small_mlp(), small_task(), where="1", block=4, epochs=0)[1]).clone())
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_packed_and_masked_products_agree_and_a_block_costs_one_byte_of_index():
    model = bake(cgs(small_mlp(), small_task(), where="1", sparsity=0.75, block=8, epochs=1))
    packed, x = pack(model[1].weight.detach(), 8), torch.randn(64)
    torch.testing.assert_close(packed @ x, model[1].weight @ x, rtol=1e-5, atol=1e-6)
    assert packed.index.dtype == torch.uint8
    assert packed.index.numel() == packed.blocks[..., 0, 0].numel() == 4 * 2
    assert packed.blocks.numel() == 0.25 * model[1].weight.numel()


def test_matrices_that_are_no_multiple_of_the_block():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 4))
    cgs(model, small_task(), where="1", sparsity=0.6, block=12, epochs=1)
    keep = mask_of(model[1])
    assert keep.shape == (30, 64)
    padded = nn.functional.pad(keep, (0, 8, 0, 6))
    grid = padded.view(3, 12, 6, 12).transpose(1, 2).flatten(2).any(2)
    assert grid.sum(1).tolist() == [2, 2, 2]
    weight = bake(model)[1].weight.detach()
    torch.testing.assert_close(pack(weight, 12) @ torch.ones(64), weight.sum(1), rtol=1e-5, atol=1e-6)


def test_training_leaves_the_mask_and_the_start_is_drawn_anew_unless_asked_otherwise():
    for again in (True, False):
        model = small_mlp()
        before = model[1].weight.detach().clone()
        cgs(model, small_task(), where="1", block=8, epochs=0, reinitialise=again)
        keep = mask_of(model[1])
        assert torch.equal(model[1].weight[keep], before[keep]) != again
        cgs(model, small_task(), where="3", block=2, epochs=2, reinitialise=False)
        assert torch.equal(mask_of(model[1]), keep)
        assert not bake(model)[1].weight[~keep].any()


def test_linear_layers_alone_unless_convolutions_are_asked_for():
    model = cgs(small_cnn(), small_task(), block=4, epochs=0)
    assert [mask_of(model[i]) is None for i in (0, 3, 8)] == [True, True, False]
    model = cgs(small_cnn(), small_task(), block=4, epochs=0, where="3")
    assert tiles(mask_of(model[3]).flatten(1), 4).sum(1).tolist() == [4] * 4  # of 18 columns: 72 / 4


def test_layers_too_small_for_their_blocks():
    with recording() as ledger:
        cgs(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 4)), small_task(), block=16, epochs=0)
    assert ledger.skipped["2"] == "1 blocks of 16 in a row: none can be left out"
    with pytest.raises(BadOption, match="lower block"):
        cgs(small_mlp(), small_task(), block=64, epochs=0)
    with pytest.raises(BadOption, match="equally many"):
        pack(torch.block_diag(torch.ones(2, 4), torch.ones(2, 2)), 2)


def test_an_earlier_mask_stands():
    model = small_mlp()
    keep = torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    cgs(model, small_task(), where="1", block=8, epochs=1)
    assert not (mask_of(model[1]) & ~keep).any()
