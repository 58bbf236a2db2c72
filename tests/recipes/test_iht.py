"""Jin et al. 2016: the projection is the nearest sparse vector, supports are recovered, it ends with exactly k."""

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
from featherweight.core.masks import largest
from featherweight.core.task import Task
from featherweight.errors import BadOption

iht = entry("iht")


def test_the_k_largest_are_the_euclidean_projection():
    for seed in range(5):
        torch.manual_seed(seed)
        w = torch.randn(8)
        keep = largest({"w": w.abs()}, {"w": 5 / 8}, within={"w": torch.ones(8).bool()})["w"]
        assert int(keep.sum()) == 3
        ours = float((w * ~keep).square().sum())
        others = [float(w.square().sum() - w[list(s)].square().sum()) for s in itertools.combinations(range(8), 3)]
        assert ours == pytest.approx(min(others), abs=1e-6)


def sensing(seed: int) -> tuple[nn.Module, Task, torch.Tensor]:
    """Compressed sensing: 60 random measurements of a vector of 80 entries, 5 of which are not zero."""
    torch.manual_seed(seed)
    x, truth = torch.randn(60, 80), torch.zeros(80, 1)
    truth[torch.randperm(80)[:5]] = torch.randn(5, 1).sign() * (1 + torch.rand(5, 1))
    model = nn.Sequential(nn.Linear(80, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    return model, Task(train=Batches(x, x @ truth, 60), valid=Batches(x, x @ truth, 60), loss=F.mse_loss), truth


GRADIENT = {"lr": 0.25, "optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr)}


def test_it_recovers_the_support_of_sparse_regression():
    for seed in (0, 2):
        model, task, truth = sensing(seed)
        with recording() as ledger:
            iht(model, task, sparsity=75 / 80, cycles=8, epochs=8, dense_share=1.0, finetune=100, **GRADIENT)
        came = [int(text.split(": ")[1].split()[0]) for text in ledger.notes if text.startswith("cycle")]
        assert came[0] == 0
        assert sum(came) > 0, "a weight that was cut at first has come back"
        assert torch.equal(mask_of(model[0]).view(-1), truth.view(-1) != 0)
        torch.testing.assert_close(model[0].weight.T, truth, atol=0.02, rtol=0)


def test_one_shot_does_not():
    wrong = 0
    for seed in (0, 2):
        model, task, truth = sensing(seed)
        iht(model, task, sparsity=75 / 80, cycles=1, epochs=1, dense_share=1.0, finetune=0, **GRADIENT)
        wrong += int((mask_of(model[0]).view(-1) != (truth.view(-1) != 0)).sum())
    assert wrong > 0


def test_counts_are_exact_and_what_was_cut_starts_from_zero():
    model, seen = small_mlp(), []

    def watched(model, task, **options):
        seen.append((options["label"], originals(model[1], "weight")[0].detach().clone(), mask_of(model[1]).clone()))
        return fit(model, task, **options)

    task = small_task(fit=watched)
    iht(model, task, sparsity=0.8, cycles=3, epochs=6, finetune=1, lr=0.05)
    assert [label.split()[0] for label, *_ in seen] == ["dense", "sparse"] * 3 + ["fine-tune"]
    sparse, restored = seen[1], seen[2]
    assert int((~sparse[2]).sum()) == int(0.8 * 2048)
    assert bool(restored[2].all())
    assert not restored[1][~sparse[2]].any()
    bake(model)
    assert [int((model[i].weight == 0).sum()) for i in (1, 3)] == [int(0.8 * 2048), int(0.8 * 128)]


def test_ranking_all_layers_together():
    model = small_mlp()
    iht(model, small_task(), sparsity=0.9, scope="global", cycles=1, epochs=1, finetune=0)
    counts = [int(mask_of(model[i]).sum()) for i in (1, 3)]
    assert sum(counts) == 2176 - int(0.9 * 2176)
    assert counts[1] > 12
    with pytest.raises(BadOption, match="global"):
        iht(model, small_task(), sparsity={"1": 0.5}, scope="global")


def test_an_earlier_mask_stands():
    model = small_mlp()
    keep = torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    iht(model, small_task(), sparsity={"1": 0.75}, cycles=2, epochs=2, finetune=1)
    assert not (mask_of(model[1]) & ~keep).any()
    assert int(mask_of(model[1]).sum()) == 512
