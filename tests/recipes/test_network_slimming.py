"""Liu et al. 2017: the penalty shrinks scales, one global threshold removes its exact share, dead channels go free."""

import copy
import itertools

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups, remove_channels
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.core.widths import rounded, smallest
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.network_slimming import channel_scores, scaled_norms

slim = entry("network_slimming")
X = torch.zeros(2, 1, 8, 8)


class Residual(nn.Module):
    """A stem and two residual blocks whose outputs are coupled."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 2 * width, 3, padding=1),
                nn.BatchNorm2d(2 * width),
                nn.ReLU(),
                nn.Conv2d(2 * width, width, 3, padding=1),
                nn.BatchNorm2d(width),
            )
            for _ in range(2)
        )
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.fc(x.mean((2, 3)))


def scales(model):
    return torch.cat([m.weight.detach().abs() for m in model.modules() if isinstance(m, nn.BatchNorm2d)])


def test_penalty_shrinks_the_scales():
    task, start = small_task(), small_cnn()
    free, pulled = (
        slim(copy.deepcopy(start), task, penalty=p, epochs=8, finetune=0, round_to=1, prune_ratio=0.05)
        for p in (0.0, 1e-1)
    )
    assert float(scales(pulled).sum()) < 0.8 * float(scales(free).sum())


def test_the_penalty_pulls_every_scale_by_the_same_amount_whatever_its_size_and_sign():
    seen = []

    def watched_fit(model, task, **options):
        def record(progress=0.0):
            seen.append([model[i].weight.detach().clone() for i in (1, 4)])

        record()
        return fit(model, task, after_step=record, **{**options, "decay": "constant"})

    task = small_task(fit=watched_fit, loss=lambda output, target: 0 * output.sum())  # only the penalty is left
    model = small_cnn()
    with torch.no_grad():
        for i in (1, 4):
            size = torch.linspace(0.05, 2.0, len(model[i].weight))
            model[i].weight.copy_(size * (-1) ** torch.arange(len(size)))
    sgd = {"optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr), "lr": 0.1}
    slim(model, task, penalty=0.02, epochs=1, finetune=0, prune_ratio=0.25, round_to=1, **sgd)
    for earlier, later in itertools.pairwise(seen[:4]):
        for old, new in zip(earlier, later, strict=True):
            torch.testing.assert_close(old - new, 0.1 * 0.02 * old.sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.7])
def test_global_threshold_removes_exactly_its_share(ratio):
    model = small_cnn()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.2, 1.0)
            m.weight.data[::2] *= -1  # the size of a scale counts, not its sign
    before = scales(model)
    slim(model, small_task(), prune_ratio=ratio, epochs=0, finetune=0, round_to=1)
    after = scales(model)
    assert len(before) - len(after) == int(ratio * len(before))
    assert after.min() >= before.sort().values[: int(ratio * len(before))].max()
    assert model(X).shape == (2, 4)


def test_dead_channels_are_removed_without_a_trace():
    task = small_task()
    model = fit(small_cnn(), task, epochs=2)
    with torch.no_grad():
        for norm, dead in ((model[1], [0, 3, 5]), (model[4], [1, 2, 7, 8, 15])):
            norm.weight[dead] = 0
            norm.bias[dead] = 0
    before = model.eval()(task.valid.x)
    slim(model, task, prune_ratio=8 / 24, epochs=0, finetune=0, round_to=1)
    assert (model[0].out_channels, model[3].out_channels) == (5, 11)
    torch.testing.assert_close(model.eval()(task.valid.x), before, rtol=1e-5, atol=1e-6)


def test_coupled_channels_share_the_largest_scale_and_go_together():
    model = Residual()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.2, 1.0)
    channels, norms = channel_groups(model, X), scaled_norms(model)
    scores = channel_scores(channels, norms, "max")
    assert len(scores) == 8 + 2 * 16
    members = torch.stack([m.weight.detach() for m in (model.stem[1], model.blocks[0][4], model.blocks[1][4])])
    torch.testing.assert_close(scores[channels.outputs["stem.0"]], members.amax(0).double())
    for how, pooled in (("mean", members.mean(0)), ("sum", members.sum(0))):
        scored = channel_scores(channels, norms, how)
        torch.testing.assert_close(scored[channels.outputs["stem.0"]], pooled.double())
    slim(model, small_task(), prune_ratio=0.5, epochs=0, finetune=0, round_to=1)
    widths = {model.stem[0].out_channels, *(block[3].out_channels for block in model.blocks), model.fc.in_features}
    assert len(widths) == 1


def test_rounding_keeps_multiples_in_layers_wider_than_them():
    model = small_cnn()
    channels = channel_groups(model, X)
    first, second = channels.outputs["0"], channels.outputs["3"]
    doomed = torch.cat([first[:5], second[:11]])
    for round_to, kept in ((1, (3, 5)), (2, (4, 6)), (4, (4, 8)), (8, (3, 8)), (16, (3, 5))):
        left = rounded(channels, doomed, round_to)
        assert (8 - int(torch.isin(first, left).sum()), 16 - int(torch.isin(second, left).sum())) == kept
        assert torch.equal(left, doomed[torch.isin(doomed, left)])
    spared = doomed[~torch.isin(doomed, rounded(channels, doomed, 4))]
    assert spared.tolist() == [int(first[4]), *second[8:11].tolist()]


def test_no_layer_is_emptied_and_that_is_said():
    model = small_cnn()
    nn.init.constant_(model[1].weight, 0.01)
    with recording() as ledger:
        slim(model, small_task(), prune_ratio=0.5, epochs=0, finetune=0, round_to=1)
    assert model[0].out_channels == 1
    assert any("one channel kept" in reason for reason in ledger.skipped.values())


def test_slims_and_recovers():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2)
    before = evaluate(model, task).value
    weights = sum(p.numel() for p in model.parameters())
    with recording() as ledger:
        slim(model, task, prune_ratio=0.5, penalty=1e-2, epochs=4, finetune=6)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * weights
    assert evaluate(model, task).value >= before - 0.1
    assert any("channels removed" in text for text in ledger.notes)


def test_masks_survive():
    model = small_cnn()
    attach(model[3], Mask(torch.rand(16, 8, 3, 3) > 0.5))
    slim(model, small_task(), epochs=1, finetune=1, prune_ratio=0.3, round_to=1)
    keep = mask_of(model[3])
    assert keep is not None
    assert keep.shape == model[3].weight.shape
    assert 0.3 < float((model[3].weight == 0).float().mean()) < 0.7


def test_removal_on_a_copy_equals_the_recipe():
    model = Residual()
    twin = copy.deepcopy(model)
    channels = channel_groups(twin, X)
    doomed = smallest(channel_scores(channels, scaled_norms(twin), "max"), 0.25)
    remove_channels(twin, channels.legal(doomed), channels=channels)
    slim(model, small_task(), prune_ratio=0.25, epochs=0, finetune=0, round_to=1)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_bad_options():
    task = small_task()
    with pytest.raises(BadOption, match="magnitude_iterative"):
        slim(small_mlp(), task)
    with pytest.raises(BadOption, match="prune_ratio"):
        slim(small_cnn(), task, prune_ratio=1.2)
    with pytest.raises(CompressionError, match="none of"):
        slim(small_cnn(), task, prune_ratio=0.01, epochs=0)
