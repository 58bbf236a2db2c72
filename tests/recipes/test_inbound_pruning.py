"""Polyak and Wolf 2015, first method: kernels whose contribution does not vary go, and the bias takes their means."""

import copy

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.reconstruct import Moments, augmented, gather
from featherweight.core.task import Task, evaluate
from featherweight.recipes.inbound_pruning import constants, most_active, variances

inbound_pruning = entry("inbound_pruning")
ONLY = {"epochs": 0, "finetune": 0}


def rows(layer, x):
    with torch.no_grad():
        parts = gather(layer, x, layer(x), None, torch.Generator().manual_seed(0))
        return [torch.cat(part) for part in zip(*parts, strict=True)]


def by_channel(layer, x):
    """The contribution of every channel to every output: (channels, samples, outputs, ...)."""
    parts = []
    for i in range(x.shape[1]):
        alone = torch.zeros_like(x)
        alone[:, i] = x[:, i]
        parts.append(layer(alone).detach() - layer(torch.zeros_like(x)).detach())
    return torch.stack(parts)


@pytest.mark.parametrize("layer", [nn.Conv2d(5, 3, 3, padding=1), nn.Linear(5, 3)])
def test_scores_are_the_variances_of_contributions(layer):
    x = torch.randn(6, 5, 7, 7) if isinstance(layer, nn.Conv2d) else torch.randn(40, 5)
    moments = Moments.of([rows(layer, x)])
    kernels = torch.arange(5).repeat_interleave(layer.weight[0, 0].numel())
    found = by_channel(layer, x)
    dims = tuple(d for d in range(1, found.dim()) if d != 2)
    expected = found.double().var(dims, unbiased=False).mT
    torch.testing.assert_close(variances(moments, augmented(layer), kernels), expected, rtol=1e-4, atol=1e-6)
    bias = layer.bias if isinstance(layer, nn.Linear) else layer.bias[:, None, None]
    torch.testing.assert_close(found.sum(0) + bias.detach(), layer(x).detach(), rtol=1e-4, atol=1e-5)
    kept = torch.rand(3, layer.weight[0].numel()) > 0.5
    dropped = augmented(layer) * torch.cat([~kept, torch.zeros(3, 1, dtype=torch.bool)], 1)
    x, _ = rows(layer, x)
    torch.testing.assert_close(constants(moments, augmented(layer), kept), (x @ dropped[:, :-1].mT).mean(0))


@pytest.mark.parametrize("bias", [True, False])
def test_inputs_that_are_constant_are_dropped_without_a_trace(bias):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    x = torch.randn(32, 4, 6, 6)
    x[:, 1], x[:, 3] = 0.7, -2.0
    before = model(x)
    data = Batches(x, torch.zeros(32).long())
    inbound_pruning(model, Task(train=data, valid=data), where="0", **ONLY)
    keep = mask_of(model[0])
    assert keep[:, [0, 2]].all()
    assert not keep[:, [1, 3]].any()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    twin = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 4))
    before = twin(x)
    inbound_pruning(twin, Task(train=data, valid=data), where="0", compensate=False, **ONLY)
    assert float((twin(x) - before).abs().max().detach()) > 0.1


def test_every_filter_keeps_equally_many_of_its_own_inputs():
    scores = torch.rand(7, 10).double()
    kept = most_active(scores, torch.ones(7, 10, 3, 3, dtype=torch.bool), 0.65)
    assert kept.flatten(2).any(2).sum(1).tolist() == [4] * 7
    for row, keep in zip(scores, kept[..., 0, 0], strict=True):
        assert row[keep].min() > row[~keep].max()
    keep = torch.ones(7, 10, dtype=torch.bool)
    keep[0, :8] = False  # masked before: they are gone first
    assert most_active(scores, keep, 0.5)[0].tolist() == keep[0].tolist()
    assert most_active(scores, keep, 0.99).sum(1).tolist() == [1] * 7


def test_goes_from_the_first_layer_to_the_last_and_fine_tunes_after_each():
    labels = []

    def watched(model, task, **options):
        labels.append((options["label"], [p for p in ("0", "3", "8") if mask_of(model.get_submodule(p)) is not None]))
        return fit(model, task, **options)

    model, task = small_cnn(), small_task(fit=watched)
    with recording() as ledger:
        inbound_pruning(model, task, epochs=1, finetune=1)
    assert labels == [("0", []), ("3", ["3"]), ("8", ["3", "8"]), ("fine-tune", ["3", "8"])]  # "0" has one input
    assert "3: 50.0% of its weights masked, by kernels" in ledger.notes


def test_prunes_a_trained_network_better_than_by_size_of_kernels():
    task = small_task()
    model = fit(small_mlp(), task, epochs=6, lr=1e-2).eval()
    truth = model(task.valid.x).detach()
    pruned, masked = copy.deepcopy(model), copy.deepcopy(model)
    inbound_pruning(pruned, task, sparsity={"3": 0.5}, **ONLY)
    with torch.no_grad():
        for row in masked[3].weight:
            row[row.abs().argsort()[:16]] = 0
    assert (pruned[3].weight != 0).sum(1).tolist() == [16] * 4
    errors = [float((m(task.valid.x) - truth).square().mean().detach()) for m in (pruned, masked)]
    assert errors[0] < 0.7 * errors[1]
    inbound_pruning(model, task, epochs=1, finetune=2, lr=1e-2)
    assert evaluate(model, task).value >= 0.95


def test_earlier_masks_stay_and_odd_layers_are_named():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 4))
    keep = torch.rand(4, 64) > 0.3
    attach(model[3], Mask(keep))
    with recording() as ledger:
        inbound_pruning(model, small_task(), where=["1", "3"], **ONLY)
    assert not (mask_of(model[3]) & ~keep).any()
    assert (mask_of(model[3]).sum(1) <= 32).all()
    assert "2 groups" in ledger.skipped["1"]
