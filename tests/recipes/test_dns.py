"""Guo et al. 2016: what was pruned wrongly comes back, hysteresis, surgery that becomes rare, thresholds from |w|."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import Batches, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, bake, mask_of, originals
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.task import Task
from featherweight.errors import BadOption, UnknownName
from featherweight.recipes.dns import probability, spliced, threshold

dns = entry("dns")


@pytest.mark.parametrize(("c", "kept"), [(1, 0.161), (2, 0.0451), (3, 0.0092), (4, 0.0013)])
def test_the_threshold_keeps_of_normal_weights_what_the_formula_says(c, kept):
    site = Site.of(torch.randn(1000, 2000))
    share = float((site.weight.abs() >= threshold(site, c)).float().mean())
    assert share == pytest.approx(kept, abs=0.0005)


def test_the_threshold_is_taken_over_weights_that_are_not_zero():
    weight = torch.randn(100, 100)
    half = torch.cat([weight, torch.zeros(100, 100)])
    assert threshold(Site.of(half), 1.5) == pytest.approx(threshold(Site.of(weight), 1.5))
    assert threshold(Site.of(weight), -100.0) == 0.0


def test_between_the_thresholds_a_mask_never_changes():
    size = torch.linspace(0, 2, 2001)
    for sign in (-1, 1):
        for before in (True, False):
            after = spliced(sign * size, torch.full((2001,), before), 0.9, 1.1)
            between = (size >= 0.9) & (size < 1.1)
            assert bool((after[between] == before).all())
            assert not after[size < 0.9].any()
            assert bool(after[size >= 1.1].all())


def test_surgery_becomes_rare():
    chances = [probability(i, 1e-4, 1.0) for i in range(0, 100_000, 1000)]
    assert chances[0] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(chances))
    assert probability(1, 1e9, 1.0) < 1e-8


def switched() -> tuple[nn.Module, Task]:
    """A network whose small weight is wrongly pruned: the task needs it large, and the large one small."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data.copy_(torch.tensor([[1.0, 0.01]]))
    x = torch.randn(64, 2)
    y = x @ torch.tensor([[0.0], [1.0]])
    return model, Task(train=Batches(x, y), valid=Batches(x, y), loss=F.mse_loss)


SGD = {"lr": 0.05, "optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr)}


def test_what_was_pruned_wrongly_comes_back_and_what_is_no_longer_needed_goes():
    model, task = switched()
    dns(model, task, c=0.0, epochs=30, finetune=0, until=1.0, **SGD)
    assert mask_of(model[0]).tolist() == [[False, True]]
    assert bake(model)[0].weight[0, 1].item() == pytest.approx(1.0, abs=0.02)
    assert model[0].weight[0, 0].item() == 0


@pytest.mark.parametrize("never", [{"until": 0.0}, {"gamma": 1e12}])
def test_masks_that_may_not_change_do_not_splice(never):
    model, task = switched()
    dns(model, task, c=0.0, epochs=30, finetune=0, **{"until": 1.0, **never}, **SGD)
    assert mask_of(model[0]).tolist() == [[True, False]]


def test_pruned_weights_are_gone_at_the_end_and_stay_so():
    model, task = small_mlp(), small_task()
    dns(model, task, c={"1": 1.0}, epochs=2, finetune=1)
    mask = model[1].parametrizations.weight[0].forms[0]
    assert mask.grad == "kept"
    hidden = originals(model[1], "weight")[0]
    assert not hidden[~mask.keep].any()
    assert 0 < int(mask.keep.sum()) < 2048
    assert mask_of(model[3]) is None
    before = mask.keep.clone()
    fit(model, task, epochs=2, optimizer="sgd", lr=0.1)
    assert torch.equal(model[1].weight != 0, before & (model[1].weight != 0))


def test_an_earlier_mask_stands():
    model, task = small_mlp(), small_task()
    keep = torch.rand(32, 64) > 0.3
    attach(model[1], Mask(keep))
    dns(model, task, c=-1.0, epochs=2, finetune=0, lr=0.1)
    assert not (mask_of(model[1]) & ~keep).any()
    assert int(mask_of(model[1]).sum()) > 0.5 * int(keep.sum())


def test_splicing_loses_less_than_masks_that_only_grow():
    def loss_after(seed: int, **options) -> tuple[float, int]:
        torch.manual_seed(seed)
        model, task = small_mlp(), small_task()
        fit(model, task, epochs=1, lr=1e-3)  # far from trained: magnitudes do not say yet what is needed
        dns(model, task, c=2.0, epochs=12, finetune=4, lr=0.05, **options)
        bake(model)
        with torch.no_grad():
            loss = torch.stack([task.loss(model(x), y) for x, y in task.valid]).mean()
        return float(loss), int((model[1].weight != 0).sum() + (model[3].weight != 0).sum())

    spliced_ = [loss_after(seed) for seed in range(4)]
    frozen = [loss_after(seed, until=0.0) for seed in range(4)]
    assert sum(loss for loss, _ in spliced_) < 0.7 * sum(loss for loss, _ in frozen)


def test_a_threshold_above_all_weights_leaves_the_largest_and_says_so():
    model = small_mlp()
    largest = int(model[3].weight.abs().argmax())
    with recording() as ledger:
        dns(model, small_task(), c={"3": 100.0}, epochs=0, finetune=0)
    assert mask_of(model[3]).view(-1).nonzero().tolist() == [[largest]]
    assert any(text.startswith("3: no weight is large enough to stay") for text in ledger.notes)


def test_bad_options():
    with pytest.raises(BadOption, match="band"):
        dns(small_mlp(), small_task(), band=1.5)
    with pytest.raises(UnknownName, match="conv9"):
        dns(small_mlp(), small_task(), c={"conv9": 1.0})
