"""Planted redundancy: what each criterion finds of dead, unread and small but essential channels, and what it cannot.

Which criterion can see what follows from what it looks at; a criterion that found more would not be the paper's.
"""

import copy

import pytest
import torch
from torch import nn

from conftest import small_task
from featherweight.catalogue import fill
from featherweight.core.fit import fit
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.errors import UnknownName
from featherweight.prune import prune

# criterion -> whether it finds a channel that is never active, finds one that nothing reads, and keeps one with a small
# filter behind which a large weight stands
CRITERIA = {
    "filter_norm": (False, False, False),
    "filter_norm_l2": (False, False, False),
    "consumer_norm": (False, True, True),
    "zeros": (True, False, True),
    "entropy": (True, False, True),
    "taylor_activation": (True, True, True),
    "taylor_squared": (True, True, True),
    "fisher": (True, True, True),
    "propagation": (False, True, True),
    "loss_change": (True, True, True),
}
NOW = {"rounds": 1, "epochs": 0, "finetune": 0, "round_to": 1, "scope": "layer", "grain": "filter"}


def plain_cnn():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = plain_cnn()
    with torch.no_grad():
        model[0].bias.fill_(-0.3)  # so that activations are zero here and there
    return fit(model, small_task(), epochs=10, lr=1e-2).eval()


def scores(model, name, path="0"):
    study = Study(model, small_task(), [path], 3)
    return fill("score", name)(Site(path, model.get_submodule(path), study=study, grain="filter")).double()


def dead(model, channel):
    """Never active: the filter and what reads it stay as they are."""
    model[0].bias[channel] = -1e6


def unread(model, channel):
    """Active as before, but nothing reads it."""
    model[2].weight[:, channel] = 0


def shrunk(model, channel):
    """The same function with a filter a hundred times smaller, and weights behind it a hundred times larger."""
    model[0].weight[channel] *= 0.01
    model[0].bias[channel] *= 0.01
    model[2].weight[:, channel] *= 100


def planted(model, plant, channel):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        plant(twin, channel)
    return twin


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize(("plant", "which"), [(dead, 0), (unread, 1)])
def test_useless_channels(trained, name, plant, which):
    best = int(scores(trained, name).argmax())  # the one that this criterion would remove last
    found = scores(planted(trained, plant, best), name)
    assert (found.argmin() == best) == CRITERIA[name][which]
    if CRITERIA[name][which] and name != "consumer_norm":
        assert found[best] == 0


@pytest.mark.parametrize("name", CRITERIA)
def test_an_essential_channel_with_a_small_filter(trained, name):
    essential = int(scores(trained, "loss_change").argmax())
    twin = planted(trained, shrunk, essential)
    x = small_task().valid.x
    torch.testing.assert_close(twin(x), trained(x), rtol=1e-3, atol=1e-3)
    place = int(scores(twin, name).argsort().argsort()[essential])  # 0: goes first
    assert (place > 0) == CRITERIA[name][2]


@pytest.mark.parametrize("name", ["taylor_activation", "taylor_squared", "fisher", "loss_change", "zeros", "entropy"])
def test_criteria_of_activations_and_losses_do_not_see_how_a_function_is_written(trained, name):
    twin = planted(trained, shrunk, 3)
    torch.testing.assert_close(scores(twin, name), scores(trained, name), rtol=1e-2, atol=1e-6)


def test_discrimination_looks_where_the_last_convolution_looks(trained):
    best = int(scores(trained, "discrimination").argmax())
    assert int(scores(planted(trained, unread, best), "discrimination").argmin()) == best
    best = int(scores(trained, "discrimination", "2").argmax())
    twin = copy.deepcopy(trained)
    with torch.no_grad():
        twin[2].bias[best] = -1e6
    assert scores(twin, "discrimination", "2")[best] == 0


def test_duplicates_are_seen_by_distance_among_themselves_only(trained):
    """Their sums of distances are equal, and near ones are low; a pair far from all others is not found."""
    twin = planted(trained, lambda m, c: m[0].weight.__setitem__(c, m[0].weight[5]), 2)
    found = scores(twin, "geometric_median")
    assert float(found[2]) == pytest.approx(float(found[5]), rel=1e-6)
    assert float(scores(twin, "filter_norm")[2]) == pytest.approx(float(scores(twin, "filter_norm")[5]))


def test_random_scores_are_seeded_of_the_grains_shape_and_see_nothing(trained):
    torch.manual_seed(5)
    first = scores(trained, "random")
    second = scores(trained, "random")
    torch.manual_seed(5)
    assert torch.equal(scores(trained, "random"), first)
    assert not torch.equal(first, second)
    assert first.shape == (8,)
    assert fill("score", "random")(Site("0", trained[0])).shape == trained[0].weight.shape
    lowest = [int(scores(planted(trained, dead, 3), "random").argmin()) for _ in range(60)]
    assert len(set(lowest)) == 8, "any may go"


def test_the_verb_takes_every_criterion_by_its_name(trained):
    for name in CRITERIA:
        model = copy.deepcopy(trained)
        prune(model, small_task(), score=name, where="0", prune_ratio=0.5, **NOW)
        assert model[0].out_channels == 4
    with pytest.raises(UnknownName, match="did you mean 'entropy'"):
        prune(copy.deepcopy(trained), small_task(), score="entropi", **NOW)
