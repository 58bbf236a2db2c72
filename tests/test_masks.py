"""What stays of weights: exact counts, layers never emptied, hidden weights, masks that are plain again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import small_cnn, small_mlp, small_task
from featherweight.core.fit import fit
from featherweight.core.forms import Codebook, Mask, attach, bake, originals
from featherweight.core.ledger import recording
from featherweight.core.masks import hidden, largest, learn_behind, masks, set_masks, settle, sparsity_of, told, write
from featherweight.core.restart import reinitialise
from featherweight.core.site import sites
from featherweight.errors import BadData, BadOption


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 0.99), st.booleans(), st.sampled_from([[1.0], [0.0, 1.0, 2.0]]))
def test_counts_are_exact_under_ties_and_no_site_is_emptied(sparsity, together, values):
    scores = {"a": torch.tensor(values).repeat(12).view(-1, 3), "b": 5 + torch.tensor(values).repeat(4)}
    everything = {path: torch.ones(one.shape, dtype=torch.bool) for path, one in scores.items()}
    kept = largest(scores, dict.fromkeys(scores, sparsity), within=everything, together=together)
    sizes = [one.numel() for one in scores.values()]
    if not together:
        assert [int((~one).sum()) for one in kept.values()] == [min(int(sparsity * n + 1e-9), n - 1) for n in sizes]
    whole = min(int(sparsity * sum(sizes) + 1e-9), sum(sizes) - 2)
    assert sum(int((~one).sum()) for one in kept.values()) == whole or not together
    assert all(one.any() for one in kept.values())


def test_what_may_not_stay_goes_first_and_counts():
    scores = {"a": torch.tensor([9.0, 1.0, 2.0, 3.0])}
    within = {"a": torch.tensor([False, True, True, True])}
    assert largest(scores, {"a": 0.5}, within=within)["a"].tolist() == [False, False, True, True]
    assert largest(scores, {"a": 0.0}, within=within)["a"].tolist() == [False, True, True, True]


def test_a_layer_that_would_be_emptied_is_noted_and_nan_is_refused():
    scores = {"a": torch.tensor([1e-9, 2e-9]), "b": torch.rand(98) + 1}
    within = {path: torch.ones(one.shape, dtype=torch.bool) for path, one in scores.items()}
    with recording() as ledger:
        kept = largest(scores, dict.fromkeys(scores, 0.9), within=within, together=True)
    assert kept["a"].tolist() == [False, True]
    assert ledger.notes == ["a: one weight of 2 kept, so that the layer is not empty"]
    with pytest.raises(BadData, match="scores of a hold NaN"):
        largest({"a": torch.tensor([torch.nan, 1.0])}, {"a": 0.5}, within={"a": torch.ones(2).bool()})


def test_a_mask_does_not_change_the_tensor_that_it_was_made_of():
    found, everything = sites(small_mlp()), torch.ones(4, 32, dtype=torch.bool)
    model = torch.nn.Module()
    for keep in (everything, torch.zeros(4, 32, dtype=torch.bool)):
        found["3"].set_mask(model, keep)
    assert bool(everything.all())


def test_weights_learn_behind_a_mask_until_masks_are_settled():
    model, task = small_mlp(), small_task()
    found = sites(model)
    learn_behind(model, found)
    set_masks(model, found, {path: torch.rand(site.weight.shape) > 0.5 for path, site in found.items()})
    kept, before = masks(found), {path: hidden(site).clone() for path, site in found.items()}
    assert sparsity_of(found) == pytest.approx(0.5, abs=0.05)
    fit(model, task, epochs=1)
    for path, site in found.items():
        assert not site.weight[~kept[path]].any()
        assert (hidden(site) != before[path])[~kept[path]].float().mean() > 0.5
    settle(model, found)
    assert "50." in told(found) or "49." in told(found)
    for site in found.values():
        assert site.mask.grad == "kept"
        assert torch.equal(originals(site.module, "weight")[0].detach(), site.weight)
        assert torch.equal(hidden(site), site.weight)
    fit(model, task, epochs=1)
    assert all(torch.equal(site.keep, kept[path]) for path, site in found.items())
    bake(model)
    assert all(not site.module.weight[~kept[path]].any() for path, site in found.items())


def test_what_another_form_holds_is_seen_but_not_written():
    model = small_mlp()
    found = sites(model)
    attach(model[1], Codebook(torch.tensor([-1.0, 1.0]), (model[1].weight > 0).to(torch.uint8)))
    found["1"].set_mask(model, torch.zeros(32, 64, dtype=torch.bool))
    assert set(hidden(found["1"]).unique().tolist()) == {-1.0, 1.0}
    assert not write(found["1"], torch.zeros(32, 64))
    assert write(found["3"], torch.ones(4, 32))
    assert bool((model[3].weight == 1).all())


def test_initial_weights_are_drawn_anew_under_the_masks():
    model = small_cnn()
    keep = torch.rand(16, 8, 3, 3) > 0.5
    attach(model[3], Mask(keep))
    fit(model, small_task(), epochs=1)
    torch.manual_seed(5)
    reinitialise(model)
    torch.manual_seed(5)
    fresh = small_cnn()
    assert torch.equal(model[0].weight, fresh[0].weight)
    assert torch.equal(model[3].weight, fresh[3].weight * keep)
    assert torch.equal(model[1].running_mean, torch.zeros(8))


def test_what_draws_no_weights_is_noted_or_refused():
    model = small_mlp()
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    with recording() as ledger:
        reinitialise(model)
    assert ledger.notes == ["no module draws new initial weights for scale: they stay as they are"]
    with pytest.raises(BadOption, match="reset_parameters"):
        reinitialise(torch.nn.Sequential(torch.nn.Flatten()))
