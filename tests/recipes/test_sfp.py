"""He et al. 2018: zeroed filters learn on and may come back; in the end exactly their share is gone, physically."""

import copy
import itertools

import torch
from test_network_slimming import Residual

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import evaluate

sfp = entry("sfp")


def zero_filters(layer):
    return set((layer.weight.detach().flatten(1).abs().sum(1) == 0).nonzero().flatten().tolist())


def test_zeroed_filters_come_back_and_others_take_their_place():
    model, seen = small_cnn(), []
    for norm in (model[1], model[4]):
        torch.nn.init.constant_(norm.bias, 0.5)  # a zero filter puts out the shift: at or below 0 the ReLU stops it

    def watched_fit(model, task, **options):
        before = {i: zero_filters(model[i]) for i in (0, 3)} if model[3].out_channels == 16 else None
        fit(model, task, **options)
        if before is not None:
            seen.append((before, {i: zero_filters(model[i]) for i in (0, 3)}))
        return model

    sfp(model, small_task(fit=watched_fit), prune_ratio=0.3, rounds=12, epochs=12, finetune=0, lr=0.01, round_to=1)
    assert len(seen) == 11, "the last round removes"
    for before, after in seen:
        assert [len(before[i]) for i in (0, 3)] == [2, 4], "floor(N P) of every layer"
        assert not any(after.values()), "all filters are updated, zero ones too"
    sets = [before[3] for before, _ in seen]
    assert any(a != b for a, b in itertools.pairwise(sets)), "the set changes"
    assert set.union(*sets) - sets[-1], "some that were zero are none in the end"
    assert (model[0].out_channels, model[3].out_channels) == (6, 12)


def test_the_smallest_by_the_l2_norm_go_and_not_by_the_l1_norm():
    model = small_cnn()
    with torch.no_grad():
        model[3].weight.fill_(0.1)  # l1 7.2, l2 0.85
        model[3].weight[5] = 0
        model[3].weight[5, 0, 0, 0] = 0.9  # the smaller l1 norm, the larger l2 norm
        model[3].weight[7] *= 0.99
    sfp(model, small_task(), prune_ratio={"3": 0.07}, rounds=1, epochs=0, finetune=0, round_to=1)
    assert model[3].out_channels == 15
    assert model[3].weight.detach().abs().max() == 0.9
    assert not (model[3].weight == 0.1 * 0.99).any()


def test_the_removal_is_the_zeroed_network_with_its_norms_shifts_gone_too():
    model = fit(small_cnn(), small_task(), epochs=2)
    gone = model[3].weight.detach().flatten(1).norm(dim=1).argsort()[:8]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[3].weight[gone] = 0
        twin[4].weight[gone], twin[4].bias[gone] = 0, 0  # a zero filter alone would still give the norm's shift
    sfp(model, small_task(), prune_ratio={"3": 0.5}, rounds=2, epochs=0, finetune=0, round_to=1)
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-6)


def test_residual_networks_lose_whole_groups():
    model = Residual()
    sfp(model, small_task(), prune_ratio=0.5, rounds=2, epochs=1, finetune=0, round_to=1)
    assert {model.stem[0].out_channels, model.blocks[0][3].out_channels, model.fc.in_features} == {4}
    assert {block[0].out_channels for block in model.blocks} == {8}


def test_it_learns_while_it_prunes():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2)
    before = evaluate(model, task).value
    sfp(model, task, prune_ratio=0.5, rounds=3, epochs=6, finetune=12, round_to=1)
    assert (model[0].out_channels, model[3].out_channels) == (4, 8)
    assert evaluate(model, task).value >= before - 0.1
