"""Li et al. 2017: the smallest sums of |w| go, physically; counting kernels anew, or independently of what went."""

import copy

import pytest
import torch
from test_network_slimming import Residual
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.cost import cost
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.task import Task
from featherweight.errors import BadData, MissingNeed
from featherweight.ingredients.score.filter_norm import filter_norm

pfec = entry("pfec_l1")
NOW = {"finetune": 0, "round_to": 1}
X = torch.zeros(2, 1, 8, 8)


def silenced(model, layer, norm, gone):
    """A copy whose channels are zero: filters and norm affines."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[layer].weight[gone] = 0
        twin[norm].weight[gone], twin[norm].bias[gone] = 0, 0
    return twin


def test_what_is_left_computes_what_the_masked_network_did():
    model = small_cnn()
    with torch.no_grad():
        model(torch.randn(64, 1, 8, 8))
        for norm in (model[1], model[4]):
            norm.bias.uniform_(-1, 1)
    gone = model[3].weight.detach().abs().sum((1, 2, 3)).argsort()[:8]
    twin = silenced(silenced(model, 3, 4, gone), 0, 1, model[0].weight.detach().abs().sum((1, 2, 3)).argsort()[:4])
    pfec(model, small_task(), prune_ratio=0.5, **NOW)
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-6)
    assert (model[0].out_channels, model[3].out_channels) == (4, 8)


def test_sizes_count_not_signs():
    assert filter_norm(Site.of(torch.tensor([[5.0, -5.0], [1.0, 1.0]]))).tolist() == [10.0, 2.0]


def test_greedy_leaves_out_the_kernels_of_removed_maps_and_independent_does_not():
    start = small_cnn()
    with torch.no_grad():
        start[0].weight.copy_(torch.arange(8.0).add(1).view(8, 1, 1, 1).expand(8, 1, 3, 3))  # maps 0 to 3 will go
        start[3].weight.fill_(0.1)
        start[3].weight[:8, :4] = 10.0  # large by kernels that read what goes
        start[3].weight[8:, 4:] = 1.0
        start[3].weight += torch.rand_like(start[3].weight) * 1e-3  # rows that can be told apart
    left = {}
    for order in ("all", "forward"):
        model = copy.deepcopy(start)
        pfec(model, small_task(), prune_ratio=0.5, order=order, **NOW)
        left[order] = model[3].weight[:, 0, 0, 0].detach().round(decimals=1)
    assert torch.equal(left["all"], torch.full((8,), 0.1)), "independent: rows 0 to 7 stay for what they read of it"
    assert torch.equal(left["forward"], torch.ones(8)), "greedy: without those kernels rows 8 to 15 are the larger"


def test_macs_are_those_counted_by_hand():
    model = small_cnn()
    pfec(model, small_task(), prune_ratio={"0": 0.25, "3": 0.5}, **NOW)
    assert cost(model, X).macs == 8 * 8 * 9 * 6 + 4 * 4 * 9 * 6 * 8 + 8 * 4
    assert cost(model, X).params == 9 * 6 + 2 * 6 + 9 * 6 * 8 + 2 * 8 + 8 * 4 + 4


def test_a_residual_sum_loses_the_same_channels_everywhere_by_the_sum_of_its_norms():
    model = Residual()
    layers = [model.stem[0], model.blocks[0][3], model.blocks[1][3]]
    kept = sum(layer.weight.detach().abs().sum((1, 2, 3)) for layer in layers).argsort()[4:].sort().values
    expected = [layer.weight.detach()[kept] for layer in layers[:1]]
    pfec(model, small_task(), prune_ratio=0.5, where=["stem.0", "blocks.*.3"], **NOW)
    assert torch.equal(model.stem[0].weight, expected[0])
    assert {model.fc.in_features, *(layer.out_channels for layer in layers)} == {4}


def test_a_ratio_that_would_empty_a_layer_keeps_a_channel_and_says_so():
    model = small_cnn()
    with recording() as ledger:
        pfec(model, small_task(), prune_ratio=0.99, scope="global", normalise="max", **NOW)
    assert min(model[0].out_channels, model[3].out_channels) == 1
    assert any("one channel kept" in reason for reason in ledger.skipped.values())


def test_bad_input():
    model = small_cnn()
    with torch.no_grad():
        model[3].weight[2, 0] = torch.nan
    with pytest.raises(BadData, match="weights of 3 are not finite"):
        pfec(model, small_task(), **NOW)
    with pytest.raises(MissingNeed, match="fit needs training data"):
        pfec(small_mlp(), Task(valid=small_task().valid), round_to=1)


def test_plain_perceptrons_lose_neurons():
    model = small_mlp()
    sizes = model[1].weight.detach().abs().sum(1)
    pfec(model, small_task(), prune_ratio=0.5, **NOW)
    assert isinstance(model[1], nn.Linear)
    torch.testing.assert_close(model[1].weight.detach().abs().sum(1), sizes[sizes.argsort()[16:].sort().values])
