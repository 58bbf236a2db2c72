"""He et al. 2019: the filters whose distances to all others sum to least go; translation changes nothing."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.site import Site
from featherweight.core.task import evaluate
from featherweight.errors import BadData
from featherweight.ingredients.score.filter_norm import filter_norm
from featherweight.ingredients.score.geometric_median import geometric_median

fpgm = entry("fpgm")
NOW = {"rounds": 1, "epochs": 0, "finetune": 0, "round_to": 1}


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6))
def test_scores_are_those_of_a_double_loop(filters, inputs, seed):
    weight = torch.randn(filters, inputs, 3, 3, generator=torch.Generator().manual_seed(seed))
    expected = [sum(float((a - b).double().norm()) for b in weight) for a in weight]
    torch.testing.assert_close(geometric_median(Site.of(weight)), torch.tensor(expected).double())


def test_a_common_translation_changes_these_scores_not_at_all_and_norms_a_lot():
    weight = torch.randn(16, 8, 3, 3)
    moved = weight + 3 * torch.randn(1, 8, 3, 3)
    torch.testing.assert_close(geometric_median(Site.of(moved)), geometric_median(Site.of(weight)))
    assert not torch.equal(filter_norm(Site.of(moved)).argsort(), filter_norm(Site.of(weight)).argsort())


def test_large_filters_in_the_middle_go_before_small_ones_at_the_border():
    weight = torch.tensor([[10.0, 0], [10, 1], [10, -1], [9, 0], [11, 0], [0.5, 0]])  # the last: small, far away
    assert geometric_median(Site.of(weight)).argmin() == 0
    assert filter_norm(Site.of(weight)).argmin() == 5


def test_duplicates_have_equal_scores_and_a_far_pair_of_them_is_kept():
    near = torch.randn(6, 4) * 0.1
    far = torch.full((1, 4), 9.0)
    scores = geometric_median(Site.of(torch.cat([near, near[:1], far, far])))
    assert scores[0] == pytest.approx(float(scores[6]), rel=1e-12)
    assert scores[7] == pytest.approx(float(scores[8]), rel=1e-12)
    assert set(scores.argsort(descending=True)[:2].tolist()) == {7, 8}


def test_the_nearest_to_the_median_of_every_layer_go():
    model = small_cnn()
    kept = {}
    for i in (0, 3):
        rows = model[i].weight.detach().flatten(1)
        scores = torch.zeros(len(rows))
        for a, b in itertools.product(range(len(rows)), repeat=2):
            scores[a] += (rows[a] - rows[b]).norm()
        kept[i] = scores.argsort()[int(0.4 * len(rows)) :].sort().values
    expected = [model[0].weight.detach()[kept[0]], model[3].weight.detach()[kept[3]][:, kept[0]]]
    fpgm(model, small_task(), prune_ratio=0.4, **NOW)
    assert torch.equal(model[0].weight, expected[0])
    assert torch.equal(model[3].weight, expected[1])


def test_it_learns_while_it_prunes_and_refuses_nan():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2)
    before = evaluate(model, task).value
    fpgm(model, task, prune_ratio=0.5, rounds=4, epochs=4, finetune=4, round_to=1)
    assert evaluate(model, task).value >= before - 0.1
    with torch.no_grad():
        model[0].weight[1] = torch.nan
    with pytest.raises(BadData, match="weights of 0 are not finite"):
        fpgm(model, task, **NOW)
