"""Wen et al. 2016: groups shrink by exactly lr * penalty, to exact zeros; what is zero goes without a trace."""

import copy

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups
from featherweight.core.columns import live_columns, reduced_product
from featherweight.core.fit import fit
from featherweight.core.groups import Groups, Part, makers, readers, shapes
from featherweight.core.ledger import recording
from featherweight.core.residual import branches
from featherweight.core.site import sites
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.zoo import build

ssl = entry("ssl")
SGD = {"optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr)}
OFF = {"filter_penalty": 0.0, "channel_penalty": 0.0}


def no_loss(**options):
    return small_task(loss=lambda output, target: 0 * output.sum(), **options)


def test_a_group_no_longer_than_the_step_is_exactly_zero():
    layer = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, 0.4], [0.6, 0.8], [3.0, 4.0]]))  # of norm 0.5, 1 and 5
    Groups((Part("", "weight", torch.arange(3)[:, None]),), 3).shrink(layer, 1.0)
    assert (layer.weight[:2] == 0).all()
    torch.testing.assert_close(layer.weight[2], torch.tensor([2.4, 3.2]))


def test_every_step_shortens_every_group_by_lr_times_penalty():
    model, seen = small_cnn(), []

    def watched(model, task, **options):
        groups = makers(copy.deepcopy(model), channel_groups(copy.deepcopy(model), task.inputs()))
        seen.append(groups.norms(model))
        inner = options.pop("after_step")

        def record(progress):
            inner(progress)
            seen.append(groups.norms(model))

        return fit(model, task, after_step=record, **options)

    with pytest.raises(CompressionError, match="raise the penalties"):  # nothing is zero yet
        ssl(model, no_loss(fit=watched), filter_penalty=0.1, channel_penalty=0, epochs=1, lr=0.1, **SGD)
    assert len(seen) == 4
    torch.testing.assert_close(seen[0] - seen[1], torch.full_like(seen[0], 0.01), rtol=0, atol=1e-5)


def test_the_groups_are_the_papers():
    model = small_cnn()
    channels = channel_groups(model, torch.zeros(2, 1, 8, 8))
    first, second, last = model[0].weight.detach(), model[3].weight.detach(), model[8].weight.detach()
    made, read = makers(model, channels).norms(model), readers(model, channels).norms(model)
    torch.testing.assert_close(made[channels.outputs["0"]], first.flatten(1).norm(dim=1))
    torch.testing.assert_close(made[channels.outputs["3"]], second.flatten(1).norm(dim=1))
    torch.testing.assert_close(read[channels.outputs["0"]], second.transpose(0, 1).flatten(1).norm(dim=1))
    torch.testing.assert_close(read[channels.outputs["3"]], last.norm(dim=0))
    columns = shapes({"3": sites(model)["3"]}).norms(model)
    torch.testing.assert_close(columns, second.flatten(1).norm(dim=0))


def test_a_filter_that_two_layers_share_through_a_sum_is_one_group():
    model = build("resnet:depth=8,channels=(4,4,4)", classes=4)
    channels = channel_groups(model, torch.zeros(1, 1, 8, 8))
    convs = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    tied = [path for path in convs if torch.equal(channels.outputs[path], channels.outputs["conv1"])]
    assert tied == ["conv1", "stages.0.0.conv2"]
    norms = makers(model, channels).norms(model)[channels.outputs["conv1"]]
    both = torch.stack([model.get_submodule(path).weight.detach().flatten(1).norm(dim=1) for path in tied])
    torch.testing.assert_close(norms, both.norm(dim=0))


def test_columns_of_noise_vanish_and_columns_of_signal_stay():
    """The shapes of a first linear layer are its inputs: the lasso selects them."""
    torch.manual_seed(1)
    y = torch.arange(256) % 4
    signal = torch.randn(4, 8)[y] + 0.2 * torch.randn(256, 8)
    data = Batches(torch.cat([signal, torch.randn(256, 8)], 1), y)
    task = Task(train=data, valid=data)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    with recording() as ledger:
        ssl(model, task, **OFF, shape_penalty=0.1, epochs=30, lr=0.1, finetune=3, optimizer="sgd")
    live = live_columns(model[0].weight)
    assert live[:8].sum() >= 4
    assert live[8:].sum() == 0
    assert evaluate(model, task).value > 0.95
    assert any("rows of the matrix of patches are left" in text for text in ledger.notes)


def test_removed_columns_shrink_the_matrix_product_exactly():
    layer = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2))
    with torch.no_grad():
        layer.weight[:, 0, 1, 1] = 0
        layer.weight[:, 2] = 0
    x = torch.randn(2, 3, 9, 8)
    assert int(live_columns(layer.weight).sum()) == 18 - 1 - 6
    torch.testing.assert_close(reduced_product(layer, x), layer(x))


class Dead(nn.Module):
    """Channels 1 and 3 of the first layer are constants, 0 is not read; no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)
        with torch.no_grad():
            self.conv1.weight[[1, 3]] = 0
            self.conv1.bias[[1, 3]] = torch.tensor([0.7, -0.5])
            self.conv2.weight[:, 0] = 0
            self.norm.running_mean.normal_()

    def forward(self, x):
        return self.fc(self.norm(self.conv2(self.conv1(x).relu())).relu().mean((2, 3)))


@pytest.mark.parametrize("fold", [True, False])
def test_channels_that_are_zero_go_without_a_trace(fold):
    model, task = Dead().eval(), no_loss()
    before = model(task.valid.x)
    ssl(model, task, filter_penalty=1e-9, channel_penalty=1e-9, epochs=0, finetune=0, round_to=1, fold=fold)
    assert (model.conv1.out_channels, model.conv2.in_channels) == (3, 3)
    torch.testing.assert_close(model.eval()(task.valid.x), before, rtol=1e-5, atol=1e-5)


class Repeated(nn.Module):
    """One layer under two names, called twice; a channel of its input and output is the same constant in both calls."""

    def __init__(self) -> None:
        super().__init__()
        again = nn.Linear(6, 6)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), again, again, nn.Linear(6, 4))
        with torch.no_grad():
            for layer in (self.layers[1], again):
                layer.weight[2] = 0
                layer.bias[2] = 0.7

    def forward(self, x):
        return self.layers(x)


def test_a_layer_with_two_names_takes_a_constant_once():
    model, task = Repeated(), no_loss()
    before = model(task.valid.x)
    ssl(model, task, filter_penalty=1e-9, channel_penalty=1e-9, epochs=0, finetune=0, round_to=1)
    assert model.layers[2].weight.shape == (5, 5)
    torch.testing.assert_close(model(task.valid.x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_a_block_whose_branch_is_zero_is_its_shortcut(shortcut):
    model, task = build("resnet:depth=14,channels=(4,8,8)", classes=4), no_loss()
    fit(model, small_task(), epochs=1)
    path = {"identity": "stages.1.1", "projection": "stages.1.0"}[shortcut]
    assert path in [branch.block for branch in branches(model, task.inputs())]
    block = model.get_submodule(path)
    with torch.no_grad():
        for layer in (block.conv1, block.bn1, block.conv2, block.bn2):
            for p in layer.parameters():
                p.zero_()
    before = model.eval()(task.valid.x)
    with recording() as ledger:
        ssl(model, task, **OFF, depth_penalty=1e-9, epochs=0, finetune=0, fold=False, round_to=1)
    assert sum(1 for _ in model.get_submodule(path).modules()) <= 4
    assert any(text.startswith("1 of 6 residual branches removed") for text in ledger.notes)
    torch.testing.assert_close(model.eval()(task.valid.x), before, rtol=1e-4, atol=1e-5)


def test_depth_lasso_removes_a_branch_that_is_not_needed():
    task = small_task()
    model = build("resnet:depth=14,channels=(4,8,8)", classes=4)
    fit(model, task, epochs=6, lr=0.01)
    block = model.stages[2][1]
    with torch.no_grad():  # a branch that does next to nothing
        for norm in (block.bn1, block.bn2):
            norm.weight.mul_(0.02)
            norm.bias.mul_(0.02)
        block.conv1.weight.mul_(0.01)
        block.bn1.running_mean.mul_(0.01)
        block.bn1.running_var.mul_(1e-4)
    with recording() as ledger:
        ssl(model, task, **OFF, depth_penalty=1.0, epochs=6, lr=0.02, finetune=2)
    assert isinstance(model.stages[2][1], nn.ReLU)
    assert any("residual branches removed: stages.2.1" in text for text in ledger.notes)
    assert evaluate(model, task).value > 0.8


def test_slims_and_recovers():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=0.01)
    before, weights = evaluate(model, task).value, sum(p.numel() for p in model.parameters())
    ssl(model, task, filter_penalty=0.7, channel_penalty=0.7, epochs=60, lr=0.02, finetune=10, round_to=1)
    assert sum(p.numel() for p in model.parameters()) < 0.7 * weights
    assert evaluate(model, task).value >= before - 0.1


def test_bad_options():
    with pytest.raises(BadOption, match="all penalties are zero"):
        ssl(small_cnn(), small_task(), **OFF)
    with pytest.raises(BadOption, match="no groups of the kind depth"):
        ssl(small_cnn(), small_task(), **OFF, depth_penalty=1.0)
    with pytest.raises(BadOption, match="no groups of the kind filter"):
        ssl(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), small_task())


def test_one_group_of_a_layer_stays_and_dead_layers_are_refused():
    model = small_mlp()
    ssl(model, no_loss(), filter_penalty=100.0, channel_penalty=0, epochs=1, lr=0.1, round_to=1)
    assert (model[1].out_features, model[3].in_features) == (1, 1)
    model = small_mlp()
    with torch.no_grad():
        model[1].weight[:16] = 0
        model[3].weight[:, 16:] = 0
    with pytest.raises(CompressionError, match="every channel of 1 became zero"):
        ssl(model, no_loss(), epochs=0)
