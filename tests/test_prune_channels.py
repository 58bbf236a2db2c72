"""The verb `prune` at the grain "filter" and at grains inside weights: counts, budgets, rounds, order, momentum."""

import copy

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import small_cnn, small_mlp, small_task
from featherweight.core import measuring
from featherweight.core.channels import channel_groups, remove_channels
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.restart import Carried
from featherweight.core.task import Task
from featherweight.errors import BadData, BadOption, CompressionError, MissingNeed
from featherweight.prune import prune
from featherweight.zoo.networks import build

ONCE = {"grain": "filter", "rounds": 1, "epochs": 0, "finetune": 0, "round_to": 1}
X = torch.zeros(2, 1, 28, 28)


def widths(model):
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


def macs(model, task):
    return cost(model, task.inputs()).macs


def size_of_norm(site):
    return site.rows.abs().sum(1)


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("scope", ["layer", "global", "std"])
def test_rounds_reach_the_same_fraction_as_one_shot(rounds, scope):
    model = small_cnn()
    options = {**ONCE, "rounds": rounds, "normalise": "rank", "scope": scope}
    prune(model, small_task(), prune_ratio=0.5, **options)
    assert sum(widths(model)) == 12
    if scope == "layer":
        assert widths(model) == [4, 8]


def test_ratio_zero_is_refused_as_nothing_and_a_layer_keeps_a_channel():
    with pytest.raises(CompressionError, match="raise prune_ratio"):
        prune(small_cnn(), small_task(), prune_ratio=0.0, **ONCE)
    model = small_cnn()
    with recording() as remarks:
        prune(
            model,
            small_task(),
            prune_ratio=0.99,
            scope="global",
            score=lambda site: torch.arange(len(site.rows)) * 0.0,
            **ONCE,
        )
    assert min(widths(model)) == 1
    assert any("one channel kept" in reason for reason in remarks.skipped.values())


def test_a_mapping_gives_each_layer_its_fraction_and_leaves_the_others():
    model = small_cnn()
    prune(model, small_task(), prune_ratio={"3": 0.25}, **ONCE)
    assert widths(model) == [8, 12]


@pytest.mark.parametrize("share", [0.7, 0.3])
def test_a_budget_of_macs_is_met_and_not_by_far(share):
    model, task = build("vgg"), Task(valid=[(X, torch.zeros(2).long())], example_inputs=X)
    before = macs(model, task)
    prune(model, task, budget=f"macs<={share}x", **ONCE)
    assert share - 0.05 < macs(model, task) / before <= share


def test_budgets_of_params_and_in_rounds():
    model, task = small_cnn(), small_task()
    before = cost(model, task.inputs()).params
    prune(model, task, budget="params<=0.5x", **{**ONCE, "rounds": 3})
    assert cost(model, task.inputs()).params <= 0.5 * before


def test_a_budget_of_latency_is_timed_by_whoever_times():
    task, asked = small_task(), []

    def stopwatch(original, result, inputs):
        asked.append(macs(result, task))
        ratio = macs(result, task) / macs(original, task)
        return measuring.Timed(2.0, 2.0 * ratio, ratio)

    model = small_cnn()
    before = macs(model, task)
    with measuring.timing(stopwatch):
        prune(model, task, budget="latency<=1ms", **ONCE)
    assert len(asked) > 2
    assert macs(model, task) <= 0.5 * before
    with pytest.raises(MissingNeed, match="run it by compress"):
        prune(small_cnn(), task, budget="latency<=1ms", **ONCE)


def test_a_candidate_that_was_timed_too_low_once_is_not_taken():
    task, seen = small_task(), {}

    def stopwatch(original, result, inputs):
        share = macs(result, task) / macs(original, task)
        seen[share] = seen.get(share, 0) + 1
        ratio = 0.4 * share if seen[share] == 1 else share  # the first time of everything is far too good
        return measuring.Timed(1.0, ratio, ratio)

    model = small_cnn()
    before = macs(model, task)
    with measuring.timing(stopwatch):
        prune(model, task, budget="latency<=0.5x", **ONCE)
    assert macs(model, task) <= 0.5 * before


def test_the_budget_of_a_run_is_what_a_method_aims_at(tmp_path):
    result = fw.compress(small_cnn(), small_task(), "pfec_l1", until="macs<=0.4x", finetune=0, round_to=1, onnx=False)
    assert 0.3 < result.report["result"]["macs"] / result.report["original"]["macs"] <= 0.4
    told = fw.compress(
        small_cnn(), small_task(), "pfec_l1", until="macs<=0.4x", finetune=0, round_to=1, prune_ratio=0.25, onnx=False
    )
    assert told.report["result"]["macs"] > 0.4 * told.report["original"]["macs"], "what was asked for counts"


def test_budgets_that_channels_cannot_reach_are_refused():
    with pytest.raises(BadOption, match="asked for one of macs, params, latency"):
        prune(small_cnn(), small_task(), budget="size<=0.5x", **ONCE)
    with pytest.raises(BadOption, match='pass grain="filter"'):
        prune(small_cnn(), small_task(), budget="macs<=0.5x")
    with pytest.raises(CompressionError, match="is not reached"):
        prune(small_cnn(), small_task(), budget="macs<=1", **ONCE)


def test_soft_channels_come_back_and_hard_ones_do_not():
    task, seen = small_task(), []

    def watched(model, task, **options):
        seen.append([int((m.weight.flatten(1).abs().sum(1) == 0).sum()) for m in (model[0], model[3])])
        fit(model, task, **options)
        seen.append([int((m.weight.flatten(1).abs().sum(1) == 0).sum()) for m in (model[0], model[3])])
        return model

    model = small_cnn()
    for i in (1, 4):  # a channel that ReLU lets nothing of through does not learn
        nn.init.constant_(model[i].bias, 0.5)
    task = small_task(fit=watched)
    soft = {
        "grain": "filter",
        "permanence": "soft",
        "rounds": 3,
        "schedule": "constant",
        "scope": "layer",
        "round_to": 1,
    }
    prune(model, task, prune_ratio=0.5, epochs=3, finetune=0, lr=0.01, **soft)
    assert seen[0] == [4, 8], "zeroed before the first epoch, still in place"
    assert seen[1] == [0, 0], "and learning again after it"
    assert widths(model) == [4, 8]


def test_soft_weights_learn_between_rounds_and_are_masked_at_last():
    alive = []

    def watched(model, task, **options):
        before = model[1].weight == 0
        fit(model, task, **options)
        alive.append((int(before.sum()), int((before & (model[1].weight != 0)).sum())))
        return model

    model = small_mlp()
    prune(model, small_task(fit=watched), sparsity=0.5, scope="layer", schedule="constant", rounds=2, epochs=2,
          finetune=1, permanence="soft")  # fmt: skip
    assert alive[0][0] == 1024
    assert alive[0][1] > 500
    assert alive[-1] == (1024, 0)


def test_order_goes_through_the_network_a_group_at_a_time():
    changes = []

    def watched(model, task, **options):
        changes.append(widths(model))
        return model

    for order, first in (("forward", [4, 16]), ("backward", [8, 8])):
        changes.clear()
        options = {**ONCE, "epochs": 2, "order": order}
        prune(small_cnn(), small_task(fit=watched), prune_ratio=0.5, scope="layer", **options)
        assert changes[0] == first
        assert changes[1] == [4, 8]


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_a_budget_is_shared_by_the_groups_that_take_turns(order):
    model, task = small_cnn(), small_task()
    whole = macs(model, task)
    prune(model, task, budget="macs<=0.6x", order=order, scope="layer", **ONCE)
    assert 0.5 * whole < macs(model, task) <= 0.6 * whole
    assert model[0].out_channels < 8, "the group that comes first does not pay for all"
    assert model[3].out_channels < 16


def test_momentum_of_what_stays_is_carried_over_a_removal():
    task, model = small_task(), small_cnn()
    carried = Carried("sgd")
    fit(model, task, epochs=1, lr=0.01, optimizer=carried)
    before = carried.held.state[model[3].weight]["momentum_buffer"].clone()
    channels = channel_groups(model, task.inputs())
    remove_channels(model, {"3": [0, 5]}, channels=channels, optimizer=carried.held)
    keep = [i for i in range(16) if i not in (0, 5)]
    assert torch.equal(carried.held.state[model[3].weight]["momentum_buffer"], before[keep])
    held = carried.held
    fit(model, task, epochs=1, lr=0.02, optimizer=carried)
    assert carried.held is held
    assert {id(p) for p in held.state} <= {id(p) for p in model.parameters()}


def test_scratch_draws_the_weights_anew_in_the_shapes_that_were_found():
    task = small_task()
    kept, fresh = (
        prune(fit(copy.deepcopy(start), task, epochs=4), task, prune_ratio=0.5, recovery=recovery, **ONCE)
        for start in [small_cnn()]
        for recovery in ("finetune", "scratch")
    )
    assert widths(kept) == widths(fresh)
    assert not torch.allclose(kept[0].weight, fresh[0].weight)
    assert (fresh[1].running_mean == 0).all()


def test_masks_of_earlier_methods_stay_in_what_is_left():
    model = small_cnn()
    keep = torch.rand(model[3].weight.shape) > 0.5
    attach(model[3], Mask(keep), root=model)
    prune(model, small_task(), prune_ratio={"3": 0.5}, **{**ONCE, "finetune": 1, "score": size_of_norm})
    mask = mask_of(model[3])
    assert mask is not None
    assert mask.shape == model[3].weight.shape
    assert (model[3].weight[~mask] == 0).all()
    assert 0.3 < float(mask.float().mean()) < 0.7


@pytest.mark.parametrize(
    ("grain", "whole"), [("kernel", (2, 3)), ("shape", (0,)), ("4x9", None), ("weight", None)], ids=str
)
def test_grains_inside_weights_go_as_one(grain, whole):
    model = small_cnn()
    prune(model, small_task(), grain=grain, sparsity=0.5, where="3", rounds=1, epochs=0, finetune=0)
    zeros = model[3].weight == 0
    assert int(zeros.sum()) == zeros.numel() // 2
    if whole:
        assert torch.equal(zeros.amin(whole), zeros.amax(whole)), "nothing in a unit goes without the rest"


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_n_of_m_keeps_the_largest_n_of_every_m_inputs(n, m):
    model = small_mlp()
    weight = model[1].weight.detach().clone()
    prune(model, small_task(), grain=f"{n}:{m}", where="1", rounds=1, epochs=1, finetune=1)
    kept = (model[1].weight != 0).view(32, -1, m)
    assert (kept.sum(-1) == n).all()
    best = weight.abs().view(32, -1, m).topk(n, -1).indices
    assert torch.equal(kept.nonzero()[:, 2].view(32, -1, n).sort(-1).values, best.sort(-1).values)


@pytest.mark.parametrize("options", [{"scope": "layer"}, {"scope": "global"}, {"scope": "std"}, {"grain": "2:4"}])
def test_a_single_score_that_is_nan_is_refused_unless_it_is_masked(options):
    def score(site):
        return site.weight.abs().view(-1).index_fill(0, torch.tensor([5]), torch.nan).view(site.weight.shape)

    model = small_mlp()
    with pytest.raises(BadData, match="scores of 1 hold NaN"):
        prune(model, small_task(), score=score, rounds=1, epochs=0, finetune=0, **options)
    for layer in (model[1], model[3]):
        attach(layer, Mask(torch.arange(layer.weight.numel()).view(layer.weight.shape) != 5), root=model)
    prune(model, small_task(), score=score, rounds=1, epochs=0, finetune=0, **options)
    assert model[1].weight.view(-1)[5] == 0


def test_grains_of_a_transposed_convolution_know_its_outputs_from_its_inputs():
    for grain in ("2:4", "shape", "2x12"):
        model = nn.Sequential(nn.ConvTranspose2d(8, 6, 2), nn.Flatten(), nn.Linear(6 * 81, 4))
        prune(model, small_task((8, 8, 8)), grain=grain, sparsity=0.5, where="0", scope="layer", rounds=1, epochs=0,
              finetune=0)  # fmt: skip
        kept = mask_of(model[0]).transpose(0, 1)  # (outputs, inputs, ky, kx)
        if grain == "2:4":
            assert (kept.unflatten(1, (2, 4)).sum(2) == 2).all()
        elif grain == "shape":
            assert torch.equal(kept, kept[:1].expand_as(kept))
            assert int(kept[0].sum()) == 16
        else:
            blocks = kept.flatten(1).reshape(3, 2, -1)
            assert (blocks[:, 0] == blocks[:, 1]).all()


def test_scores_that_are_nan_or_of_another_shape_are_refused():
    with pytest.raises(BadData, match="hold NaN"):
        prune(small_cnn(), small_task(), score=lambda site: torch.full((len(site.rows),), torch.nan), **ONCE)
    with pytest.raises(BadOption, match="give one for each of 8 outputs"):
        prune(small_cnn(), small_task(), score=lambda site: torch.ones(3), **ONCE)
    with pytest.raises(BadOption, match="of its outputs"):
        prune(small_cnn(), small_task(), score=lambda site: torch.ones(3), epochs=0, finetune=0)


def test_a_score_of_outputs_masks_whole_rows():
    model = small_mlp()
    prune(
        model, small_task(), score=size_of_norm, where="1", sparsity=0.5, scope="layer", rounds=1, epochs=0, finetune=0
    )
    rows = (model[1].weight == 0).all(1)
    assert int(rows.sum()) == 16


@pytest.mark.parametrize("grain", ["4:2", "row", "0x3", "2:"])
def test_grains_that_are_none(grain):
    with pytest.raises(BadOption, match="grain"):
        prune(small_mlp(), small_task(), grain=grain)


def test_the_verb_runs_by_its_name_with_any_ingredients(tmp_path):
    options = {"score": "filter_norm", "grain": "filter", "prune_ratio": 0.5, "finetune": 1, "epochs": 0, "round_to": 1}
    result = fw.compress(small_cnn(), small_task(), "prune", out=tmp_path, **options)
    assert result.report["result"]["macs"] < result.report["original"]["macs"]
    with pytest.raises(fw.FeatherweightError, match="unknown option of prune 'grains'"):
        fw.compress(small_cnn(), small_task(), "prune", grains="filter")
