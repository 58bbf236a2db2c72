"""Lee et al. 2019: the score is the derivative by a gate, counts are exact, and pruning comes before training."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, bake, mask_of
from featherweight.core.ledger import recording
from featherweight.core.site import sites
from featherweight.errors import BadData, BadOption
from featherweight.recipes.snip import batch_of, sensitivity

snip = entry("snip")


def kept(model: nn.Module) -> dict[str, torch.Tensor]:
    return {path: site.keep for path, site in sites(model).items()}


def test_the_score_is_the_finite_difference_of_the_loss_by_a_gate():
    model = small_cnn().double()
    task = small_task()
    x, y = task.train.x[:32].double(), task.train.y[:32]
    scores = sensitivity(model, task, sites(model), [(x, y)])
    assert sum(float(one.sum()) for one in scores.values()) == pytest.approx(1.0)

    def loss_with(path: str, at: int, gate: float) -> float:
        gated = copy.deepcopy(model).train()  # batch norms as in training
        weight = gated.get_submodule(path).weight
        with torch.no_grad():
            weight.view(-1)[at] *= gate
            return float(task.loss(gated(x), y))

    places = [("0", 5), ("3", 77), ("8", 30)]
    slopes = [abs(loss_with(p, at, 1 + 1e-7) - loss_with(p, at, 1 - 1e-7)) / 2e-7 for p, at in places]
    found = [float(scores[p].view(-1)[at]) for p, at in places]
    for i in (1, 2):  # scores are shares: their ratios are those of the slopes
        assert slopes[i] / slopes[0] == pytest.approx(found[i] / found[0], rel=1e-4)


def test_scores_do_not_depend_on_the_scale_of_the_loss():
    model, task = small_mlp(), small_task()
    louder = replace(task, loss=lambda output, target: 7 * F.cross_entropy(output, target))
    batches = batch_of(task, 96)
    one, other = (sensitivity(model, t, sites(model), batches) for t in (task, louder))
    for path in one:
        torch.testing.assert_close(one[path], other[path], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98])
def test_counts_are_exact_over_all_layers_and_biases_stay(sparsity):
    model = snip(small_mlp(), small_task(), sparsity=sparsity, epochs=0)
    assert sum(int((~one).sum()) for one in kept(model).values()) == int(sparsity * 2176 + 1e-9)
    assert bool((model[1].bias != 0).all())


def test_pruning_comes_before_training_on_weights_drawn_anew():
    task, start = small_task(), small_mlp()
    torch.manual_seed(3)
    trained = fit(copy.deepcopy(start), task, epochs=4, lr=1e-2)
    runs = []
    for model in (start, trained):
        torch.manual_seed(7)
        runs.append(snip(copy.deepcopy(model), task, sparsity=0.8, epochs=1))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in runs), strict=True))
    given = snip(copy.deepcopy(start), task, sparsity=0.8, epochs=0, reinitialise=False)
    for path, site in sites(given).items():
        assert torch.equal(site.weight, start.get_submodule(path).weight * site.keep)
    other = snip(copy.deepcopy(trained), task, sparsity=0.8, epochs=0, reinitialise=False)
    assert not torch.equal(kept(given)["1"], kept(other)["1"])


def test_initial_weights_of_the_variance_of_the_paper():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2000), nn.ReLU(), nn.Linear(2000, 4))
    snip(model, small_task(), sparsity=0.0, epochs=0, initial="variance_scaling")
    for weight in (bake(model)[1].weight.detach(), model[3].weight.detach()):
        assert float(weight.std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.02)
        assert float(weight.abs().max()) < 2.3 * weight.shape[1] ** -0.5


def test_masks_hold_through_training():
    model = snip(small_cnn(), small_task(), sparsity=0.7, epochs=3)
    before = kept(model)
    bake(model)
    for path, keep in before.items():
        assert not model.get_submodule(path).weight[~keep].any()


def test_it_beats_random_masks_of_the_same_layer_sizes():
    def loss_after(seed: int, shuffled: bool) -> float:
        torch.manual_seed(seed)
        model, task = small_mlp(), small_task()
        snip(model, task, sparsity=0.98, epochs=0, reinitialise=False)
        if shuffled:
            for site in sites(model).values():
                flat = site.keep.view(-1)
                site.set_mask(model, flat[torch.randperm(len(flat))].view_as(site.keep))
        fit(model, task, epochs=8, optimizer="sgd", lr=0.1)
        with torch.no_grad():
            return float(torch.stack([task.loss(model(x), y) for x, y in task.valid]).mean())

    ours, random = ([loss_after(seed, shuffled) for seed in range(5)] for shuffled in (False, True))
    assert sum(ours) < 0.5 * sum(random)


def test_an_earlier_mask_stands_and_no_layer_is_emptied():
    model = small_mlp()
    keep = torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    snip(model, small_task(), sparsity=0.8, epochs=0)
    assert not (mask_of(model[1]) & ~keep).any()
    with recording() as ledger:
        model = snip(small_mlp(), small_task(), sparsity=0.999, epochs=0)
    assert all(one.any() for one in kept(model).values())
    assert any("so that the layer is not empty" in text for text in ledger.notes)


def test_what_cannot_be_scored_is_refused():
    task = small_task(loss=lambda output, target: 0 * output.sum())
    with pytest.raises(BadData, match="no weight has an influence"):
        snip(small_mlp(), task)
    with pytest.raises(BadOption, match="sparsity"):
        snip(small_mlp(), small_task(), sparsity=1.0)


def test_batches_are_whole():
    task = small_task()
    assert [len(batch_of(task, n)) for n in (1, 32, 33, 96, 1000)] == [1, 1, 2, 3, 3]
