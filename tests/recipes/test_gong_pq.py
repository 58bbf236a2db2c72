"""Product quantization: the error of the blocks adds up, codebooks are counted, planted codewords are found."""

import itertools
import math

import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.coding.packing import pack_tensor
from featherweight.coding.unpacking import unpack_tensor
from featherweight.core.forms import Mask, Product, attach, bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.vectors import chosen, cluster_vectors, distances, means
from featherweight.errors import CompressionError

gong_pq = entry("gong_pq")


def layer(out: int, columns: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(columns, out))


def test_the_error_is_the_sum_of_what_the_blocks_lose():
    model = layer(64, 24)
    before = model[0].weight.detach().clone()
    gong_pq(model, small_task(), dim=4, index_bits=3)
    whole = (model[0].weight - before).square().sum()
    apart = [(a - b).square().sum() for a, b in zip(before.split(4, 1), model[0].weight.split(4, 1), strict=True)]
    torch.testing.assert_close(whole, torch.stack(apart).sum())
    codes = codes_of(bake(model)[0])
    assert isinstance(codes.rule, Product)
    assert codes.rule.codebooks.shape == (6, 8, 4)
    for j, piece in enumerate(before.split(4, 1)):  # every piece has the nearest of its block's codewords
        assert torch.equal(torch.cdist(piece, codes.rule.codebooks[j]).argmin(1), codes.symbols[:, j].long())


def test_planted_codewords_are_found():
    books = torch.randn(3, 4, 5, dtype=torch.float64)
    index = torch.arange(80)[:, None].repeat(1, 3) % 4
    codebooks, found = cluster_vectors(chosen(books, index), 4)
    torch.testing.assert_close(chosen(codebooks, found), chosen(books, index))


def test_the_objective_never_rises_and_is_near_that_of_a_library():
    torch.manual_seed(3)
    x = torch.randn(5, 120, 3, dtype=torch.float64)
    counts = torch.ones_like(x)
    books, errors = x[:, :8].clone(), []
    for _ in range(12):
        gap = distances(x, books, counts)
        errors.append(float(gap.amin(-1).sum()))
        books = means(x, gap.argmin(-1), books, counts)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))
    codebooks, index = cluster_vectors(x, 8)
    ours = float((x - chosen(codebooks, index)).square().sum())
    theirs = sum(KMeans(8, n_init=1, random_state=0).fit(block.numpy()).inertia_ for block in x)
    assert ours <= 1.05 * theirs


def test_the_file_costs_indices_and_codebooks_and_is_exact():
    model = layer(512, 64)
    gong_pq(model, small_task())
    weight, codes = bake(model)[0].weight.detach(), codes_of(model[0])
    packed = pack_tensor(weight, codes, coder="sparse_index")
    m, n, s, k = 512, 64, 16, 16
    formula = math.ceil((m * s * math.log2(k) + 32 * k * n) / 8)
    assert formula <= len(packed) <= formula + 32
    assert 4 * weight.numel() / len(packed) == pytest.approx(16.0, rel=0.02)
    assert torch.equal(unpack_tensor(packed), weight)


def test_codewords_fall_until_the_codebooks_are_affordable_and_too_few_rows_are_left_alone():
    model = small_mlp()
    with recording() as ledger:
        gong_pq(model, small_task(), codebook_share=0.25)
    assert codes_of(bake(model)[1]).rule.codebooks.shape == (16, 8, 4)
    assert "codebooks of two words would cost 50% of its weights" in ledger.skipped["3"]
    with pytest.raises(CompressionError, match="pass a larger one"):
        gong_pq(small_mlp(), small_task(), codebook_share=0.01)


def test_columns_that_four_does_not_divide_are_cut_into_shorter_blocks():
    model = nn.Sequential(nn.Conv2d(3, 32, 5))
    gong_pq(model, small_task((3, 8, 8)))
    assert codes_of(bake(model)[0]).rule.codebooks.shape == (25, 4, 3)


def test_masked_weights_stay_zero_and_do_not_pull_codewords():
    model, keep = layer(64, 8), torch.rand(64, 8) > 0.7
    with torch.no_grad():
        model[0].weight.copy_(torch.sign(torch.randn(64, 1)) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]))
    attach(model[0], Mask(keep))
    before = model[0].weight.detach().clone()
    gong_pq(model, small_task(), index_bits=6, codebook_share=0.9)
    torch.testing.assert_close(bake(model)[0].weight.detach(), before)  # two words of each block explain the survivors


def test_constant_weights_and_weights_of_zeros():
    model = small_mlp()
    with torch.no_grad():
        model[1].weight.fill_(0.5)
        model[3].weight.zero_()
    with recording() as ledger:
        gong_pq(model, small_task())
    assert model[1].weight.unique().tolist() == [0.5]
    assert ledger.skipped["3"] == "all its weights are zero"


def test_places_of_a_kernel_can_share_codewords():
    """As many pieces more for each codebook: 32 outputs cannot pay for 16 words, 32 * 9 rows can."""
    model = nn.Sequential(nn.Conv2d(8, 32, 3))
    before = model[0].weight.detach().clone()
    gong_pq(model, small_task((8, 8, 8)), pieces="channels")
    codes = codes_of(bake(model)[0])
    assert codes.rule.codebooks.shape == (2, 16, 4)
    for m in range(2):
        for place in range(9):
            piece = before[:, 4 * m : 4 * m + 4, place // 3, place % 3]
            nearest = torch.cdist(piece, codes.rule.codebooks[m]).argmin(1)
            assert torch.equal(codes.symbols.view(32, 9, 2)[:, place, m].long(), nearest)
    packed = pack_tensor(model[0].weight, codes, coder="sparse_index")
    assert torch.equal(unpack_tensor(packed), model[0].weight)
    assert len(packed) <= 32 * 9 * 2 // 2 + 4 * 128 + 32
