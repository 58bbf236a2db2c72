"""The verb `prune`: exact counts, masks that only grow, scopes, schedules, and what it refuses."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.core.channels import channel_groups
from featherweight.core.fit import fit
from featherweight.core.forms import Codebook, attach, bake, forms_of, mask_of
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.errors import BadOption, MissingNeed, UnknownName
from featherweight.ingredients.schedule.constant import constant
from featherweight.ingredients.schedule.cubic import cubic
from featherweight.ingredients.schedule.linear import linear
from featherweight.ingredients.score.magnitude import magnitude
from featherweight.prune import prune, zero_channels

ONE_SHOT = {"rounds": 1, "epochs": 0, "finetune": 0}


def zeros(model: nn.Module) -> int:
    return sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 0.99), st.sampled_from(["global", "std", "layer"]), st.sampled_from([[0.5], [0.5, -0.5, 1.0, 0.0]]))
def test_counts_are_exact_under_ties(sparsity, scope, values):
    model = small_mlp()
    with torch.no_grad():
        for layer in (model[1], model[3]):
            layer.weight.copy_(torch.tensor(values).repeat(layer.weight.numel() // len(values)).view_as(layer.weight))
    prune(model, small_task(), sparsity=sparsity, scope=scope, score=magnitude, **ONE_SHOT)
    masked = [int((~mask_of(layer)).sum()) for layer in (model[1], model[3])]
    if scope == "layer":
        assert masked == [int(sparsity * 2048 + 1e-9), int(sparsity * 128 + 1e-9)]
    assert sum(masked) == int(sparsity * 2176 + 1e-9) or scope == "layer"
    assert masked[0] < 2048
    assert masked[1] < 128


def test_sparsity_zero_changes_nothing():
    model, x = small_cnn().eval(), torch.randn(2, 1, 8, 8)
    before = model(x)
    prune(model, small_task(), sparsity=0.0, score=magnitude, **ONE_SHOT)
    assert torch.equal(model(x), before)


def test_masks_only_grow_and_pruned_weights_stay_zero_under_momentum_and_decay():
    model, seen = small_mlp(), []

    def watched_fit(model, task, **options):
        before = mask_of(model[1]).clone()
        fit(model, task, **options)
        seen.append(before)
        assert torch.equal(mask_of(model[1]), before)
        assert not model[1].weight[~before].any()
        return model

    task = small_task(fit=watched_fit)
    prune(model, task, sparsity=0.9, score=magnitude, rounds=4, epochs=4, finetune=1, optimizer="sgd", lr=0.05)
    assert len(seen) == 5
    assert all(bool((later <= earlier).all()) for earlier, later in itertools.pairwise(seen))
    bake(model)
    assert zeros(model) == int(0.9 * 2176)


def test_an_earlier_mask_and_an_earlier_codebook_stand():
    model, task = small_mlp(), small_task()
    prune(model, task, sparsity=0.5, score=magnitude, **ONE_SHOT)
    first = mask_of(model[1]).clone()
    weight = model[1].weight.detach()
    centroids = torch.tensor([-0.1, 0.1])
    attach(model[1], Codebook(centroids, (weight > 0).to(torch.uint8)))
    prune(model, task, sparsity=0.8, score=magnitude, **ONE_SHOT)
    assert bool((mask_of(model[1]) <= first).all())
    assert [type(f).__name__ for f in forms_of(model[1])] == ["Codebook", "Mask"]
    assert set(model[1].weight.unique().tolist()) <= {0.0, *centroids.tolist()}
    assert zeros(model) == int(0.8 * 2176)


def test_sparsities_by_layer_pattern():
    model = small_cnn()
    prune(model, small_task(), sparsity={"Conv2d": 0.5, "3": 0.75}, score=magnitude, **ONE_SHOT)
    assert [int((~mask_of(model[i])).sum()) for i in (0, 3)] == [36, 864]
    assert mask_of(model[8]) is None


@pytest.mark.parametrize(("scope", "told"), [("std", True), ("layer", False)])
def test_a_scope_that_has_no_say_is_noted(scope, told):
    with recording() as ledger:
        prune(small_mlp(), small_task(), sparsity={"1": 0.5}, scope=scope, score=magnitude, **ONE_SHOT)
    assert any("has no say" in text for text in ledger.notes) == told


def test_the_std_scope_is_one_threshold_in_deviations():
    model = small_mlp()
    with torch.no_grad():
        model[3].weight.mul_(100)
    plain = copy.deepcopy(model)
    prune(model, small_task(), sparsity=0.5, scope="std", score=magnitude, **ONE_SHOT)
    scaled = [(plain[i].weight.abs() / plain[i].weight.std(unbiased=False)).detach() for i in (1, 3)]
    highest_gone = max(float(s[~mask_of(model[i])].max()) for s, i in zip(scaled, (1, 3), strict=True))
    lowest_kept = min(float(s[mask_of(model[i])].min()) for s, i in zip(scaled, (1, 3), strict=True))
    assert highest_gone <= lowest_kept * (1 + 1e-6)


def test_the_global_scope_never_empties_a_layer():
    model = small_mlp()
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    prune(model, small_task(), sparsity=0.97, scope="global", score=magnitude, **ONE_SHOT)
    assert int(mask_of(model[1]).sum()) == 1


def test_tied_weights_are_pruned_together_and_counted_once():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    with recording() as ledger:
        prune(model, small_task(), sparsity=0.5, score=magnitude, **ONE_SHOT)
    assert torch.equal(model["a"].weight, model["b"].weight)
    assert int((model["b"].weight == 0).sum()) == 32
    assert "that of a" in ledger.skipped["b"]


def test_layers_of_other_kinds_are_left_alone_and_said():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "lstm": nn.LSTM(4, 4), "head": nn.Linear(4, 2)})
    with recording() as ledger:
        prune(model, small_task(), sparsity=0.5, score=magnitude, **ONE_SHOT)
    assert {path: reason.split(":")[0] for path, reason in ledger.skipped.items()} == {
        "embed": "Embedding",
        "lstm": "LSTM",
    }
    assert int((model["head"].weight == 0).sum()) == 4


def test_units_that_lost_their_connections_are_noted():
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 0.1], [0.1, 0.1, 0.1]]))
    with recording() as ledger:
        prune(model, small_task(), sparsity=0.67, score=magnitude, **ONE_SHOT)
    assert ledger.notes == ["0: 1 of 2 units have no inputs left, 1 of 3 inputs are read by no unit"]


def test_schedules_go_from_start_to_end_and_the_cubic_takes_its_largest_steps_first():
    steps = torch.linspace(0, 1, 11, dtype=torch.float64).tolist()
    for schedule in (cubic, linear):
        assert (schedule(0.0), schedule(1.0)) == (0.0, 1.0)
    assert {constant(p) for p in steps} == {1.0}
    curve = [cubic(p) for p in steps]
    moves = [b - a for a, b in itertools.pairwise(curve)]
    assert all(m > 0 for m in moves)
    assert moves == sorted(moves, reverse=True)
    s_i, s_f = 0.2, 0.9
    for p, way in zip(steps, curve, strict=True):
        assert s_i + (s_f - s_i) * way == pytest.approx(s_f + (s_i - s_f) * (1 - p) ** 3)


def test_rounds_follow_the_schedule():
    model, seen = small_mlp(), []

    def record(model, task, **options):
        seen.append(zeros(model))
        return model

    prune(
        model, small_task(fit=record), sparsity=0.9, start=0.1, schedule=linear, score=magnitude, rounds=4, finetune=0
    )
    assert seen == [int(s * 2176 + 1e-9) for s in (0.3, 0.5, 0.7, 0.9)]


def test_site_of_a_plain_tensor():
    site = Site.of(torch.tensor([[1.0, -2.0]]))
    assert site.keep.all()
    assert magnitude(site).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.2}, BadOption, "sparsity=1.2"),
        ({"sparsity": {"1": 1.0}}, BadOption, "fraction"),
        ({"sparsity": {"conv9": 0.5}}, UnknownName, "conv9"),
        ({"sparsity": {"1": 0.5}, "where": "1"}, BadOption, "leave where= out"),
        ({"scope": "globl"}, UnknownName, "did you mean 'global'"),
        ({"rounds": 0}, BadOption, "rounds=0"),
        ({"sparsity": {"1": 0.5}, "scope": "global"}, BadOption, "leave scope out"),
        ({"sparsity": 0.5, "start": 0.9}, BadOption, "start=0.9 is above sparsity=0.5"),
        ({"sparsity": {"1": 0.9, "3": 0.2}, "start": 0.3}, BadOption, "start=0.3 is above sparsity=0.2"),
        ({"epochs": -1}, BadOption, "epochs=-1"),
        ({"where": "nope"}, UnknownName, "layer pattern"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(options, error, message):
    model = small_mlp()
    with pytest.raises(error, match=message):
        prune(model, small_task(), score=magnitude, schedule=cubic, **{**ONE_SHOT, **options})
    assert not forms_of(model[1])


def test_retraining_needs_training_data():
    task = small_task()
    with pytest.raises(MissingNeed, match="train"):
        prune(small_mlp(), type(task)(valid=task.valid), sparsity=0.5, score=magnitude, schedule=cubic)


def test_soft_channels_are_zero_before_their_norms_and_learn_on():
    model = small_cnn()
    channels = channel_groups(model, small_task().inputs())
    zero_channels(model, channels, torch.cat([channels.outputs["0"][:3], channels.outputs["3"][:5]]))
    assert [int((model[i].weight.flatten(1).abs().sum(1) == 0).sum()) for i in (0, 3)] == [3, 5]
    assert model[1].weight.all()
    assert model[4].weight.all()
    for norm in (model[1], model[4]):
        nn.init.constant_(norm.bias, 0.5)
    fit(model, small_task(), epochs=1)
    assert [int((model[i].weight.flatten(1).abs().sum(1) == 0).sum()) for i in (0, 3)] == [0, 0]
