"""Which layers read which channels; the error of any choice of channels, from sums."""

import copy

import pytest
import torch
from torch import nn

import coupled
from conftest import small_cnn, small_task
from featherweight.core.channels import channel_groups, remove_channels, zero_channels
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.layerwise import Contributions, Stage, Sums, contributions, prune_layerwise, repair, stages
from featherweight.core.ledger import recording
from featherweight.core.reconstruct import augmented, layer_rows
from featherweight.core.task import Task
from featherweight.errors import CompressionError

SETTINGS = {
    "prune_ratio": 0.5, "refit": "full", "ridge": 1e-4, "positions": 10, "calibration_batches": 4,
    "round_to": 1, "epochs": 0, "finetune": 0, "lr": 1e-3, "optimizer": None,
}  # fmt: skip


class Residual(nn.Module):
    """A stem, a block with a depthwise convolution inside, and a layer that makes the channels it reads."""

    def __init__(self, activation=torch.relu) -> None:
        super().__init__()
        self.activation = activation
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.up, self.deep = nn.Conv2d(6, 10, 1), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.down, self.same = nn.Conv2d(10, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 64, 4)

    def forward(self, x):
        x = self.activation(self.norm(self.stem(x)))
        x = x + self.down(self.activation(self.deep(self.up(x))))
        x = x + self.same(x)
        return self.fc(self.activation(x).flatten(1))


def last(found: Contributions, count: int) -> torch.Tensor:
    return torch.arange(len(found.target)).flip(0)[:count]


def found_stages(model: nn.Module, task: Task | None = None) -> dict[str, Stage]:
    task = task or small_task()
    return {stage.name: stage for stage in stages(model, channel_groups(model, task.inputs()), task)}


def test_readers_are_the_layers_behind_sums_depthwise_layers_and_flattening():
    found = found_stages(Residual().eval())
    assert {name: list(stage.readers) for name, stage in found.items()} == {
        "stem": ["up", "same", "fc"],
        "up": ["down"],
    }
    assert len(found["stem"].members) == 6
    assert found["up"].readers["down"].tolist() == [*range(10), -1]
    assert found["stem"].readers["fc"].tolist() == [*torch.arange(6).repeat_interleave(64).tolist(), -1]
    assert found["stem"].readers["same"].tolist() == [*torch.arange(6).repeat_interleave(9).tolist(), -1]


def test_readers_of_a_concatenation_have_columns_of_several_stages():
    model = coupled.Dense().eval()
    task = Task(valid=[(torch.randn(2, 3, 8, 8), torch.zeros(2))])
    found = found_stages(model, task)
    assert list(found["stem"].readers) == ["convs.0", "convs.1", "convs.2", "head"]
    assert list(found["convs.1"].readers) == ["convs.2", "head"]
    at = found["convs.1"].readers["convs.2"]
    assert at.tolist() == [-1] * 90 + torch.arange(4).repeat_interleave(9).tolist() + [-1]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (coupled.Grouped(), "read by two, a convolution of 2 groups"),
        (coupled.Segmenter(), "a norm takes its statistics"),
    ],
)
def test_channels_that_cannot_be_repaired_stay_and_that_is_said(model, reason):
    task = Task(valid=[(torch.randn(2, 3, 16, 16), torch.zeros(2))])
    with recording() as ledger:
        found_stages(model.eval(), task)
    assert any(reason in text for text in ledger.skipped.values()), ledger.skipped


def test_a_layer_that_is_called_twice_is_not_repaired():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.again, self.fc = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.again(self.again(self.stem(x.flatten(1)).relu()).relu()))

    with recording() as ledger:
        assert not found_stages(Twice())
    assert any("called 2 times" in text for text in ledger.skipped.values())


def test_contributions_give_the_error_of_every_choice():
    model, task = Residual().eval(), small_task()
    original = copy.deepcopy(model)
    with torch.no_grad():
        model.stem.weight.mul_(0.9)  # an error that was there before
    found = found_stages(model)["stem"]
    sums = Sums(model, original, task, 5, 2)
    pooled = contributions(model, found, sums)
    scale = torch.rand(6).double()
    expected = 0.0
    for path, place in found.readers.items():
        batches = list(task.train)[:2]
        rows = layer_rows(model, path, task, batches, positions=5, original=original)
        x, y = (torch.cat(p) for p in zip(*rows, strict=True))
        weight = augmented(model.get_submodule(path)) * torch.cat([scale, torch.ones(1)])[place]
        error = (y - x @ weight[:, :-1].mT - weight[:, -1]).square().sum(0)
        expected += float(error.sum() / ((y - y.mean(0)).square().sum()))
    assert pooled.error(scale) == pytest.approx(expected, rel=1e-9)


def test_full_least_squares_beat_scales_and_scales_beat_nothing_also_on_held_out_samples():
    task, original = small_task(), Residual().eval()
    channels = channel_groups(original, task.inputs())
    (stage,) = (s for s in stages(original, channels, task) if s.name == "stem")
    kept = torch.tensor([True, False, True, True, False, True])
    seen, unseen = {}, {}
    for refit in ("none", "scalar", "full"):
        model = copy.deepcopy(original)
        zero_channels(model, stage.members[~kept], channels=channels)
        sums = Sums(model, original, task, None, 3)
        repair(model, stage, kept, sums, refit, 1e-6)
        seen[refit] = float(sums.of("up").error(augmented(model.up)).sum())
        held_out = Sums(model, original, small_task(calibration=task.valid), None, 3)
        unseen[refit] = float(held_out.of("up").error(augmented(model.up)).sum())
    assert seen["full"] < 0.9 * seen["scalar"]
    assert seen["scalar"] < 0.99 * seen["none"]
    assert unseen["full"] < unseen["scalar"] < unseen["none"]


@pytest.mark.parametrize("activation", [torch.relu, torch.sigmoid])
@pytest.mark.parametrize("refit", ["none", "scalar", "full"])
def test_zeros_until_the_end_are_the_same_as_removing_at_once(activation, refit):
    """A sigmoid makes a half of a channel that is zero: what reads it must not build on that."""
    model, task = Residual(activation), small_task()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.2, 0.2)
    seen = []
    twin = copy.deepcopy(model)
    prune_layerwise(model, task, last, **SETTINGS | {"refit": refit})
    assert (model.up.out_channels, model.deep.groups, model.stem.out_channels, model.fc.in_features) == (5, 5, 3, 192)

    def watched(twin, task, **options):
        seen.append({k: v.clone() for k, v in twin.state_dict().items()})
        return twin

    prune_layerwise(twin, small_task(fit=watched), last, **SETTINGS | {"refit": refit})
    assert all(torch.equal(v, seen[0][k]) for k, v in model.state_dict().items())


def test_choosing_in_stages_equals_removing_what_was_chosen():
    model, task = Residual().eval(), small_task()
    twin = copy.deepcopy(model)
    prune_layerwise(model, task, last, **SETTINGS | {"refit": "none"})
    channels = channel_groups(twin, task.inputs())
    remove_channels(twin, {"stem": [3, 4, 5], "up": [5, 6, 7, 8, 9]}, channels=channels)
    for x, _ in task.valid:
        torch.testing.assert_close(model(x), twin(x))


def test_what_is_gone_stays_gone_while_the_network_is_fine_tuned_between_stages():
    model, zeros = Residual(torch.sigmoid), []

    def fit(model, task, *, after_step=None, **options):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)  # any step at all
        if after_step is not None:
            after_step(1.0)
            zeros.append(int((model.stem.weight == 0).sum()))
        return model

    prune_layerwise(model, small_task(fit=fit), last, **SETTINGS | {"epochs": 1})
    assert zeros == [27, 27]
    assert model.stem.out_channels == 3


def test_masks_of_earlier_methods_are_kept():
    model = Residual()
    keep = torch.rand(6, 10, 1, 1) > 0.5
    attach(model.down, Mask(keep))
    prune_layerwise(model, small_task(), last, **SETTINGS)
    found = mask_of(model.down)
    assert torch.equal(found, keep[:3, :5])
    assert torch.equal(model.down.weight != 0, keep[:3, :5])


def test_nothing_removed_is_an_error():
    with pytest.raises(CompressionError, match="none of 24"):
        prune_layerwise(small_cnn(), small_task(), last, **SETTINGS | {"prune_ratio": 0.01})
