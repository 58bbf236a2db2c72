"""Residual quantization: no stage raises the error, codebooks are counted, and sums of words come back bit for bit."""

import itertools
import math

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.coding.packing import pack_tensor
from featherweight.coding.unpacking import unpack_tensor
from featherweight.core.forms import Mask, Product, attach, bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.vectors import blocks, chosen, cluster_vectors
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.gong_rq import residual_words

gong_rq = entry("gong_rq")


def layer(out: int, columns: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(columns, out))


def test_the_error_falls_from_stage_to_stage():
    x = blocks(torch.randn(200, 12, dtype=torch.float64), 6)
    codebooks, index = residual_words(x, 8, torch.ones_like(x), 5, 20)
    left, errors = x, [float(x.square().sum())]
    for own, at in zip(codebooks, index, strict=True):
        left = left - chosen(own, at)
        errors.append(float(left.square().sum()))
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.2 * errors[0]


def test_one_stage_is_k_means_of_whole_rows():
    x = torch.randn(64, 8, dtype=torch.float64)
    torch.manual_seed(5)
    codebooks, index = residual_words(x[None], 4, torch.ones(1, 64, 8), 1, 20)
    torch.manual_seed(5)
    wanted, at = cluster_vectors(x[None], 4, None, 20)
    assert torch.equal(codebooks[0], wanted)
    assert torch.equal(index[0], at)


def test_rows_that_are_sums_of_words_are_explained_by_two_stages():
    """Four far centres and four small offsets: sixteen rows, eight words."""
    centres, offsets = 100 * torch.randn(4, 10), torch.randn(4, 10)
    offsets -= offsets.mean(0)
    model = layer(160, 10)
    with torch.no_grad():
        model[0].weight.copy_((centres[:, None] + offsets).flatten(0, 1).repeat(10, 1))
    before = model[0].weight.detach().clone()
    gong_rq(model, small_task(), index_bits=2, codebook_share=0.5)
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=1e-4, atol=1e-3)


def test_the_file_costs_indices_and_codebooks_of_all_stages_and_is_exact():
    model = layer(512, 24)
    gong_rq(model, small_task(), stages=3, index_bits=4, codebook_share=0.1)
    weight, codes = bake(model)[0].weight.detach(), codes_of(model[0])
    assert isinstance(codes.rule, Product)
    assert codes.rule.codebooks.shape == (3, 1, 16, 24)
    packed = pack_tensor(weight, codes, coder="sparse_index")
    m, n, t, k = 512, 24, 3, 16
    formula = math.ceil((m * t * math.log2(k) + 32 * t * k * n) / 8)
    assert formula <= len(packed) <= formula + 32
    assert torch.equal(unpack_tensor(packed), weight)


def test_blocks_and_places_of_kernels_lose_less_than_whole_rows():
    lost = {}
    for name, options in {"rows": {}, "blocks": {"dim": 4}, "channels": {"pieces": "channels"}}.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 64, 3))
        before = model[0].weight.detach().clone()
        gong_rq(model, small_task((16, 8, 8)), **options)
        lost[name] = float((model[0].weight.detach() - before).square().sum() / before.square().sum())
    assert lost["rows"] > 0.6
    assert lost["blocks"] < 0.8 * lost["rows"]
    assert lost["channels"] < 0.8 * lost["rows"]


def test_words_fall_until_all_stages_are_affordable_and_too_few_rows_are_left_alone():
    model = small_cnn()
    with recording() as ledger:
        gong_rq(model, small_task(), codebook_share=0.25)
    assert codes_of(bake(model)[3]).rule.codebooks.shape == (2, 1, 2, 72)
    assert "would cost 100% of its weights" in ledger.skipped["8"]
    with pytest.raises(CompressionError, match="pass a larger one"):
        gong_rq(small_mlp(), small_task(), codebook_share=0.01)
    with pytest.raises(BadOption, match="stages=0"):
        gong_rq(small_mlp(), small_task(), stages=0)


def test_masked_weights_stay_zero_and_zero_layers_are_said():
    model, keep = small_mlp(), torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    with torch.no_grad():
        model[3].weight.zero_()
    with recording() as ledger:
        gong_rq(model, small_task(), codebook_share=0.5)
    assert bool((bake(model)[1].weight[~keep] == 0).all())
    assert ledger.skipped["3"] == "all its weights are zero"
