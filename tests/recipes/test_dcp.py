"""Zhuang et al. 2018: channels are added where the gradient is largest, the joint loss never rises, chance is worse."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.layerwise import Stage, stages
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData
from featherweight.recipes import dcp as recipe_file
from featherweight.recipes.dcp import Head, Loss, Part, added, asked, auxiliary, columns, exact, placed

dcp = entry("dcp")


def prepared(balance=1.0, at="3"):
    torch.manual_seed(0)
    task = small_task()
    model = fit(small_cnn(), task, epochs=4, lr=1e-2).eval()
    (stage, *_) = stages(model, channel_groups(model, task.inputs()), task)
    loss = auxiliary(model, task, at, balance)
    batches = list(task.train)[:2]
    return model, stage, Loss(model, task, at, loss.head, balance, copy.deepcopy(model), batches)


def test_losses_stand_evenly_and_groups_go_to_the_first_behind_them():
    order = [f"l{i}" for i in range(6)]
    groups = [Stage(f"g{i}", torch.arange(2), {f"l{i}": torch.zeros(1).long()}) for i in range(1, 6)]
    parts = placed(groups, order, 2)
    assert [(part.at, [g.name for g in part.groups]) for part in parts] == [
        ("l1", ["g1"]), ("l3", ["g2", "g3"]), (None, ["g4", "g5"])
    ]  # fmt: skip
    assert placed(groups[3:], order, 2) == [Part(None, groups[3:])]


@pytest.mark.parametrize(
    ("shape", "last", "outputs"), [((5, 6, 4, 4), False, (3,)), ((5, 6), True, (3,)), ((5, 7, 6), True, (2, 8))]
)
def test_a_classifier_gives_outputs_of_the_networks_shape(shape, last, outputs):
    head = Head(6, last, outputs)
    x = torch.randn(shape)
    assert head(x).shape == (5, *outputs)
    if len(shape) == 4:
        normed = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(head(x), head.linear(normed.relu().mean((2, 3))), rtol=1e-4, atol=1e-5)


def test_the_joint_loss_is_the_layers_error_and_the_classifiers():
    model, stage, loss = prepared(balance=0.7)
    (reader,) = stage.readers
    with torch.no_grad():
        model[3].weight.mul_(0.8)
    x, y = loss.batches[0]
    off = model[3](model[:3](x)) - loss.original[3](loss.original[:3](x))
    with exact(model, loss):
        guess = loss.head(model[:4](x))
        expected = off.square().mean() / 2 + 0.7 * loss.task.loss(guess, y)
        torch.testing.assert_close(loss.joint([reader], (x, y)), expected)
        assert loss.value([reader]) == pytest.approx(loss.gradients([reader])[0], rel=1e-6)


def test_the_layers_error_is_convex_in_its_weights():
    model, _, loss = prepared(balance=0.0)
    ends = [torch.randn_like(model[3].weight) for _ in range(2)]

    def at(weight):
        with torch.no_grad():
            model[3].weight.copy_(weight)
        with exact(model, loss):
            return loss.value(["3"])

    values = [at(ends[0]), at((ends[0] + ends[1]) / 2), at(ends[1])]
    assert values[1] <= (values[0] + values[2]) / 2


def test_channels_are_added_one_by_one_by_their_gradients_and_the_loss_never_rises(monkeypatch):
    model, stage, loss = prepared()
    first = model[3].weight.detach().clone()
    seen = []

    def watched(stage, slopes):
        alive = (model[3].weight.detach().flatten(2).abs().sum((0, 2)) > 0).nonzero().flatten().tolist()
        seen.append((asked(stage, slopes), alive, loss.value(["3"])))
        return asked(stage, slopes)

    monkeypatch.setattr(recipe_file, "asked", watched)
    chosen, others = added(model, stage, loss, 5, 2, None, {})
    assert sorted(chosen + others) == list(range(8))
    values = [value for _, _, value in seen]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(values))
    for count, (scores, alive, _) in enumerate(seen):
        assert set(alive) <= set(chosen[:count])
        if count < len(chosen):
            rest = scores.clone()
            rest[chosen[:count]] = -1
            assert chosen[count] == int(rest.argmax())
    last = seen[-1][0]
    assert others == sorted(others, key=lambda m: float(last[m]))
    assert (model[3].weight[:, others] == 0).all()
    assert not torch.equal(model[3].weight[:, chosen], first[:, chosen])


def test_gradients_of_channels_that_are_zero_are_those_by_the_weights():
    model, stage, loss = prepared()
    columns(model, stage, range(4, 8), None)
    for network in (model, loss.original, loss.head):
        network.double()
    loss = replace(loss, batches=[(x.double(), y) for x, y in loss.batches])
    probe = torch.zeros_like(model[3].weight)
    probe[:, 6] = 1e-5 * torch.randn(16, 3, 3)
    values = {}
    with exact(model, loss):
        _, slopes = loss.gradients(["3"])
        for sign in (1, -1):
            with torch.no_grad():
                model[3].weight.add_(sign * probe)
            values[sign] = loss.value(["3"])
            with torch.no_grad():
                model[3].weight.sub_(sign * probe)
    assert float((slopes["3"] * probe).sum()) == pytest.approx((values[1] - values[-1]) / 2, rel=1e-3)
    assert float(asked(stage, slopes)[6]) == pytest.approx(float(slopes["3"][:, 6].norm()), rel=1e-9)
    assert float(slopes["3"][:, 6].norm()) > 0


def test_chosen_channels_are_better_than_chance():
    model, stage, loss = prepared()
    start = copy.deepcopy(model.state_dict())
    added(model, stage, loss, 3, 2, None, {})
    ours = loss.value(["3"])
    chance = []
    for seed in range(6):
        model.load_state_dict(start)
        picked = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:3].tolist()
        part = Stage(stage.name, stage.members[picked], {"3": torch.full_like(stage.readers["3"], -1)})
        for number, member in enumerate(picked):
            part.readers["3"][stage.readers["3"] == member] = number
        columns(model, stage, [m for m in range(8) if m not in picked], None)
        added(model, part, loss, 3, 2, None, {})  # the same steps, on channels drawn at random
        chance.append(loss.value(["3"]))
    assert ours < sum(chance) / 6
    assert sum(ours <= value + 1e-6 for value in chance) >= 4


def test_a_tolerance_stops_when_channels_bring_little():
    model, stage, loss = prepared()
    start = copy.deepcopy(model.state_dict())
    few, _ = added(model, stage, loss, 8, 2, 0.2, {})
    model.load_state_dict(start)
    more, _ = added(model, stage, loss, 8, 2, 1e-9, {})
    assert 1 <= len(few) < len(more)


def test_prunes_a_trained_network_stage_by_stage():
    labels = []

    def watched(model, task, **options):
        labels.append(options["label"])
        return fit(model, task, **options)

    task = small_task(fit=watched)
    model = fit(small_cnn(), task, epochs=6, lr=1e-2).eval()
    with recording() as ledger:
        dcp(model, task, round_to=1, losses=1, finetune=2)
    assert labels == ["fine-tune for 3", "fine-tune for the outputs", "fine-tune"]
    assert (model[0].out_channels, model[3].out_channels) == (4, 8)
    assert "0: 4 of 8 channels chosen" in ledger.notes
    assert evaluate(model, task).value >= 0.95


def test_masks_stay_rounding_gives_channels_back_and_nan_is_refused():
    model, task = small_cnn(), small_task()
    keep = torch.rand(16, 8, 3, 3) > 0.4
    attach(model[3], Mask(keep))
    dcp(model, task, round_to=1, losses=1, finetune=1, calibration_batches=1, steps=1)
    assert mask_of(model[3]).shape == (8, 4, 3, 3)
    assert torch.equal(model[3].weight != 0, mask_of(model[3]))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 4))
    dcp(wide, task, prune_ratio=0.6, tolerance=0.9, finetune=0, calibration_batches=1, steps=1)
    assert wide[1].out_features == 16
    assert (wide[3].weight.abs().sum(0) > 0).all()
    broken = Batches(torch.full((8, 1, 8, 8), torch.nan), torch.zeros(8).long())
    quiet = Task(train=broken, valid=broken, fit=lambda model, task, **options: model)
    with pytest.raises(BadData, match="loss of the training batches"):
        dcp(small_cnn(), quiet, round_to=1)
