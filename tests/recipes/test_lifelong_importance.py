"""EWC's score is OBD's with the Fisher diagonal, SI's paths add up to the fall of the loss, MAS needs no labels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Codebook, Mask, attach, bake, mask_of
from featherweight.core.ledger import recording
from featherweight.core.site import Site, sites
from featherweight.core.study import Study
from featherweight.core.task import Task
from featherweight.errors import BadOption
from featherweight.ingredients.score.obd_saliency import obd_saliency
from featherweight.recipes.lifelong_importance import importance, movable, path_integral

lifelong = entry("lifelong_importance")


def test_the_score_of_ewc_is_that_of_optimal_brain_damage():
    model, task = small_cnn(), small_task()
    found = sites(model)
    ours = importance(model, task, found, "ewc", "model", 3)
    study = Study(model, task, list(found), 3)
    for path in found:
        theirs = obd_saliency(Site(path, model.get_submodule(path), study=study))
        torch.testing.assert_close(ours[path], theirs, rtol=1e-9, atol=1e-15)


def test_the_score_of_ewc_at_labels_is_the_mean_of_squared_slopes():
    model, task = small_mlp(), small_task()
    total = torch.zeros(4, 32, dtype=torch.float64)
    for x, y in zip(task.train.x, task.train.y, strict=True):
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), model[3].weight)
        total += grad.double().square() / len(task.train.x)
    expected = total * model[3].weight.detach().double().square() / 2
    found = importance(model, task, sites(model), "ewc", "labels", None)["3"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)


def test_mas_scores_without_labels():
    model, task = small_mlp(), small_task()
    bare = [(x,) for x, _ in task.train]
    found = importance(model, Task(valid=bare, train=bare), sites(model), "mas", "labels", 2)["3"]
    total = torch.zeros(4, 32, dtype=torch.float64)
    for x in task.train.x[:64]:
        (grad,) = torch.autograd.grad(model(x[None]).square().sum(), model[3].weight)
        total += grad.double().abs() / 64
    torch.testing.assert_close(found, total * model[3].weight.detach().double().abs(), rtol=1e-4, atol=1e-12)


def test_paths_add_up_to_the_fall_of_the_loss_in_small_steps():
    x = torch.randn(96, 10)
    y = (x[:, :3].sum(1) > 0).long()
    data = Batches(x, y, 96)  # the gradient of all samples: one of a batch would not follow the loss of all
    task = Task(train=data, valid=data)
    model = nn.Sequential(nn.Linear(10, 16, bias=False), nn.Tanh(), nn.Linear(16, 2, bias=False))
    before = float(F.cross_entropy(model(x), y).detach())
    start = {path: site.weight.double().clone() for path, site in sites(model).items()}
    omega, moved = path_integral(model, task, sites(model), epochs=300, lr=0.01,
                                 optimizer=lambda params, lr: torch.optim.SGD(params, lr=lr))  # fmt: skip
    fall = before - float(F.cross_entropy(model(x), y).detach())
    assert fall > 0.05
    assert sum(float(one.sum()) for one in omega.values()) == pytest.approx(fall, rel=0.02)
    for path, site in sites(model).items():
        torch.testing.assert_close(start[path] + moved[path], site.weight.double())


def test_si_keeps_the_largest_omega_over_the_way_times_the_square():
    task, model = small_task(), small_mlp()
    twin = copy.deepcopy(model)
    settings = {"epochs": 4, "lr": 0.02, "optimizer": "sgd"}
    lifelong(model, task, by="si", sparsity=0.8, damping=0.3, finetune=0, **settings)
    omega, moved = path_integral(twin, task, sites(twin), **settings)
    scores = [omega[p] / (moved[p] ** 2 + 0.3) * twin[int(p)].weight.detach().double() ** 2 for p in ("1", "3")]
    kept = torch.cat([mask_of(model[i]).flatten() for i in (1, 3)])
    assert int(kept.sum()) == 2176 - int(0.8 * 2176)
    flat = torch.cat([one.flatten() for one in scores])
    assert float(flat[kept].min()) >= float(flat[~kept].max())


@pytest.mark.parametrize("by", ["si", "ewc", "mas"])
def test_each_loses_less_than_chance(by):
    def loss(model: nn.Module, task: Task) -> float:
        with torch.no_grad():
            return float(torch.stack([task.loss(model(x), y) for x, y in task.valid]).mean())

    ours = random = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        model, task = small_mlp(), small_task()
        if by != "si":
            fit(model, task, epochs=6, lr=1e-2)
        lifelong(model, task, by=by, sparsity=0.9, epochs=8, lr=0.02, finetune=0)
        ours += loss(bake(copy.deepcopy(model)), task)
        for site in sites(model).values():
            hidden = site.module.parametrizations["weight"].original
            hidden.data.copy_(torch.where(site.keep, hidden, hidden[site.keep].mean()))
            shuffled = site.keep.view(-1)[torch.randperm(site.keep.numel())].view_as(site.keep)
            site.set_mask(model, shuffled)
        random += loss(bake(model), task)
    assert ours < 0.8 * random


def test_layers_without_free_weights_have_no_paths():
    model = small_mlp()
    attach(model[1], Codebook(torch.tensor([-0.1, 0.1]), (model[1].weight > 0).to(torch.uint8)))
    with recording() as ledger:
        assert movable(sites(model)).keys() == {"3"}
    assert "no path of its own" in ledger.skipped["1"]
    with pytest.raises(BadOption, match="choose ewc or mas"):
        lifelong(model, small_task(), where="1")


@pytest.mark.parametrize("by", ["si", "mas"])
def test_an_earlier_mask_stands(by):
    model = small_mlp()
    keep = torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    lifelong(model, small_task(), by=by, sparsity=0.7, epochs=1, finetune=1)
    assert not (mask_of(model[1]) & ~keep).any()


@pytest.mark.parametrize("nothing", [{"epochs": 0}, {"fit": lambda model, task, **options: model}])
def test_without_a_path_si_has_no_scores(nothing):
    task = small_task(**{k: v for k, v in nothing.items() if k == "fit"})
    with pytest.raises(BadOption, match="none has moved"):
        lifelong(small_mlp(), task, by="si", epochs=nothing.get("epochs", 1), finetune=0)
