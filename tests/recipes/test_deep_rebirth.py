"""Li et al. 2018: what can be merged exactly is, what must be learned starts from least squares, calls get fewer."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.errors import BadOption
from featherweight.recipes.deep_rebirth import Sides, blocks, leaves, merge_block, merge_stream, parallel, streams

rebirth = entry("deep_rebirth")
STILL = {"epochs": 0, "finetune": 0}


def pooled(pool, *between, padding=1):
    first = (nn.Conv2d(1, 8, 3, padding=padding, bias=False), nn.BatchNorm2d(8), *between, pool)
    return nn.Sequential(
        *first, nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


class Inception(nn.Module):
    """Branches 1x1, 1x1-3x3, 1x1-5x5 and pool-1x1, put together."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.unit(4, 3, 1)
        self.three = nn.Sequential(self.unit(4, 4, 1), self.unit(4, 6, 3))
        self.five = nn.Sequential(self.unit(4, 2, 1), self.unit(2, 2, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), self.unit(4, 3, 1))

    @staticmethod
    def unit(inputs, outputs, kernel):
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class Single(nn.Module):
    """Parallel single convolutions of one stride."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(4, 3, 1, 2), nn.Conv2d(4, 5, 3, 2, 1, bias=False)
        self.five = nn.Conv2d(4, 2, (5, 3), 2, (2, 1))
        self.act = nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        return self.act(torch.cat([self.one(x), self.three(x), self.five(x)], 1))


def inside(block, width):
    stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
    return nn.Sequential(stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def calls(model, task):
    return len(leaves(model, task)[1].steps)


def test_batch_norms_are_folded_exactly():
    task, model = small_task(), fit(small_cnn(), small_task(), epochs=3, lr=0.01).eval()
    before, many = model(task.valid.x), calls(model, task)
    rebirth(model, task, **STILL)
    assert calls(model, task) == many - 2
    torch.testing.assert_close(model.eval()(task.valid.x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "step"), [(2, 2), (3, 2), ((2, 3), (1, 3))])
def test_an_average_pooling_is_a_larger_kernel(size, step):
    task, model = small_task(), fit(pooled(nn.AvgPool2d(size, step)), small_task(), epochs=2).eval()
    before, macs = model(task.valid.x), cost(model, task.inputs()).macs
    with recording() as ledger:
        rebirth(model, task, **STILL)
    height, width = (size, size) if isinstance(size, int) else size
    assert model[0].kernel_size == (3 + height - 1, 3 + width - 1)
    assert isinstance(model[2], nn.Identity)
    torch.testing.assert_close(model.eval()(task.valid.x), before, rtol=1e-4, atol=1e-5)
    assert cost(model, task.inputs()).macs != macs
    assert any("1 batch norms folded, 1 poolings" in text for text in ledger.notes)


@pytest.mark.parametrize("relu", [False, True])
def test_parallel_convolutions_are_one_exactly(relu):
    task, model = small_task(), inside(Single(relu), 10).eval()
    before, many = model(task.valid.x), calls(model, task)
    rebirth(model, task, **STILL)
    merged = model[1][0]
    assert isinstance(merged, nn.Conv2d)
    assert (merged.kernel_size, merged.padding, merged.stride) == ((5, 3), (2, 1), (2, 2))
    assert calls(model, task) == many - 3
    torch.testing.assert_close(model(task.valid.x), before, rtol=1e-5, atol=1e-5)
    assert parallel([[nn.Conv2d(4, 3, 1, 2)], [nn.Conv2d(4, 3, 3, 1, 1)]]) is None  # of two strides


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, 1)])
def test_regression_beats_a_random_start_after_as_many_steps(pool):
    """The stride of a max pooling moves into the convolution: a quarter of its MACs."""
    task = small_task()
    model = fit(pooled(pool, nn.ReLU()), task, epochs=6, lr=0.01)
    original, batches = copy.deepcopy(rebirth(model, task, merge="branch", **STILL)), list(task.train)
    (stream,) = streams(model, task)
    assert (stream.conv, stream.pool, stream.linear) == ("0", "3", False)
    macs = cost(model, task.inputs()).layers["0"].macs
    assert merge_stream(Sides(model, original, task, batches), stream, "same") == "learned"
    left = cost(model, task.inputs()).layers["0"].macs / model[0].weight.numel() * original[0].weight.numel()
    assert left <= macs / 4 * 1.01
    anew = copy.deepcopy(model)
    anew[0].reset_parameters()

    def gap(network):
        x = task.valid.x
        with torch.no_grad():
            return float((network[:4](x) - original[:4](x)).square().mean())

    assert gap(model) < 0.5 * gap(anew)
    for network in (model, anew):
        fit(network, task, epochs=1, lr=1e-3, optimizer="sgd")
    with torch.no_grad():
        losses = [float(task.loss(network(task.valid.x), task.valid.y)) for network in (model, anew)]
    assert losses[0] < losses[1]


def test_a_local_response_norm_is_dropped_and_learned():
    task = small_task()
    model = fit(pooled(nn.MaxPool2d(2), nn.ReLU(), nn.LocalResponseNorm(3)), task, epochs=6, lr=0.01)
    before, many = evaluate(model, task).value, calls(model, task)
    rebirth(model, task, epochs=2, finetune=4, lr=0.01)
    assert calls(model, task) == many - 3  # with the batch norm and the pooling
    assert evaluate(model, task).value >= before - 0.04


def test_the_longest_branch_of_a_block_learns_the_others():
    task = small_task()
    model = fit(inside(Inception(), 14), task, epochs=15, lr=0.02)
    before, many = evaluate(model, task).value, calls(model, task)
    original = copy.deepcopy(rebirth(copy.deepcopy(model), task, merge="streamline", **STILL))
    trial = copy.deepcopy(original)
    (block,) = blocks(trial, task)
    assert block.path == "1"
    kind, path = merge_block(Sides(trial, original, task, list(task.train)), block)
    assert (kind, path) == ("learned", "1.2")
    x = task.valid.x
    with torch.no_grad():
        old, new = original[:2](x), trial[:2](x)
    torch.testing.assert_close(new[:, 9:11], old[:, 9:11], rtol=1e-4, atol=1e-5)  # the kept branch is what it was
    assert float((new - old).square().mean()) < 0.5 * float((old - old.mean((0, 2, 3), keepdim=True)).square().mean())
    rebirth(model, task, epochs=4, finetune=10, lr=0.01)
    assert calls(model, task) <= many - 12
    assert evaluate(model, task).value >= before - 0.04


def test_only_the_new_layer_learns_faster():
    rates = []

    def watched(model, task, **options):
        if options["label"].startswith("relearn"):
            made = options["optimizer"](list(model.parameters()), 0.01)
            rates.extend((group["lr"], len(group["params"])) for group in made.param_groups)
        return model

    model = pooled(nn.MaxPool2d(2), nn.ReLU())
    rebirth(model, small_task(fit=watched), lr=0.01)
    assert rates == [(0.01, 4), (pytest.approx(0.1), 2)]


def test_masks_survive():
    model = pooled(nn.MaxPool2d(2), nn.ReLU())
    keep = torch.rand(8, 1, 3, 3) > 0.5
    attach(model[0], Mask(keep))
    rebirth(model, small_task(), epochs=1, finetune=1)
    assert model[0].stride == (2, 2)
    assert not (mask_of(model[0]) & ~keep).any()


def test_what_stays_is_told_and_nothing_to_merge_is_an_error():
    with pytest.raises(BadOption, match="choose another method"):
        rebirth(small_mlp(), small_task())
    model = pooled(nn.MaxPool2d(2, 2, dilation=3), nn.ReLU(), padding=0)
    with recording() as ledger:
        rebirth(model, small_task(), **STILL)
    assert isinstance(model[3], nn.MaxPool2d)
    assert "does not take over 3" in ledger.skipped["0"]
