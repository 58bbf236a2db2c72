"""Yang et al. 2017: layers in the order of a stated energy model, what is missed most restored, least squares."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import mask_of
from featherweight.core.ledger import recording
from featherweight.core.reconstruct import Moments
from featherweight.core.task import Task, evaluate
from featherweight.errors import MissingNeed
from featherweight.recipes import energy_aware as recipe_file
from featherweight.recipes.energy_aware import Energies, Traffic, chosen, gained, refitted, seen

energy_aware = entry("energy_aware")


def test_the_model_of_energy_counts_what_is_not_zero():
    see = Traffic(inputs=50, density=0.5, outputs=20, positions=4)
    table = Energies(mac=1, register=2, buffer=3, dram=100)
    assert table.of(10, see) == 10 * 4 * 0.5 * (1 + 4 * 2) + (10 + 50 + 20) * 103
    energies = [Energies().of(n, see) for n in range(0, 100, 7)]
    assert all(a < b for a, b in pairwise(energies))


def test_what_layers_see_is_counted_per_sample():
    model, task = small_cnn().eval(), small_task()
    found = seen(model, ["0", "3", "8"], task, 2)
    assert found["0"] == Traffic(64, 1, 8 * 64, 64)
    assert found["8"].outputs == 4
    assert found["8"].positions == 1
    x = torch.cat([x for x, _ in list(task.train)[:2]])
    alive = float((model[:3](x) != 0).double().mean())
    assert found["3"].density == pytest.approx(alive)
    assert found["3"].inputs == pytest.approx(alive * 512)
    assert found["3"].positions == 16


def test_layers_are_taken_by_descending_energy(monkeypatch):
    model, task, taken = small_cnn(), small_task(), []
    kept = recipe_file.Sums.of
    monkeypatch.setattr(recipe_file.Sums, "of", lambda self, path: (taken.append(path), kept(self, path))[1])
    traffic = seen(model, ["0", "3", "8"], task, 16)
    sizes = {"0": 72, "3": 1152, "8": 64}
    expected = sorted(sizes, key=lambda path: -Energies().of(sizes[path], traffic[path]))
    with recording() as ledger:
        energy_aware(model, task, finetune=0)
    assert taken == expected
    assert any(text.startswith("modelled energy") and " -> " in text for text in ledger.notes)
    other = small_cnn()
    taken.clear()  # where only multiplications cost, the middle layer has 1152 * 16 of them, the first 72 * 64
    energy_aware(other, task, finetune=0, register=0.0, buffer=0.0, dram=0.0)
    assert taken[0] == "3"


def layer(rows=300, columns=10, outputs=4, noise=0.0):
    x = torch.randn(rows, columns).double() @ torch.randn(columns, columns).double()
    weight = torch.randn(outputs, columns + 1).double()
    y = x @ weight[:, :-1].mT + weight[:, -1] + noise * torch.randn(rows, outputs)
    return x, y, Moments.of([(x, y)]), weight


def test_restored_weights_are_those_whose_return_undoes_most_error():
    _, _, moments, weight = layer()
    kept = chosen(moments, weight, torch.ones(4, 10, dtype=torch.bool), 0.5, 0.4)
    order = weight[:, :-1].abs().flatten().argsort(descending=True)
    big = torch.zeros(40, dtype=torch.bool)
    big[order[:12]] = True  # of 20 that stay, 8 are chosen by error
    big = big.view(4, 10)
    assert kept[big].all()
    pruned = weight.clone()
    pruned[:, :-1] *= big
    gains = {}
    for o, q in (~big).nonzero().tolist():
        back = pruned.clone()
        back[o, q] = weight[o, q]
        gains[o, q] = float((moments.error(pruned) - moments.error(back)).sum()) * moments.n
        assert float(gained(moments, pruned, weight)[o, q]) == pytest.approx(gains[o, q], rel=1e-6)
    best = sorted(gains, key=gains.get, reverse=True)[:8]
    assert {tuple(at) for at in (kept & ~big).nonzero().tolist()} == set(best)


def test_refitting_never_raises_the_error_and_recovers_everything_from_all_columns():
    _, _, moments, weight = layer(noise=0.1)
    for ridge in (0.0, 1e-4, 1.0):
        kept = torch.rand(4, 10) > 0.5
        start = weight.clone()
        start[:, :-1] *= kept
        found = refitted(moments, weight, kept, True, ridge)
        assert (moments.error(found) <= moments.error(start) + 1e-12).all()
    _, _, moments, weight = layer()
    everything = torch.ones(4, 10, dtype=torch.bool)
    torch.testing.assert_close(refitted(moments, torch.zeros_like(weight), everything, True, 0.0), weight)


def test_sparsity_zero_changes_nothing():
    model, task = small_cnn(), small_task()
    before = copy.deepcopy(model.state_dict())
    energy_aware(model, task, sparsity=0.0, finetune=0)
    state = {k.replace("parametrizations.weight.original", "weight"): v for k, v in model.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_prunes_better_than_magnitude_alone():
    task = small_task()
    model = fit(small_mlp(), task, epochs=6, lr=1e-2).eval()
    truth = model(task.valid.x).detach()
    pruned, masked = copy.deepcopy(model), copy.deepcopy(model)
    energy_aware(pruned, task, sparsity=0.8, finetune=0)
    with torch.no_grad():
        for m in (masked[1], masked[3]):
            m.weight.view(-1)[m.weight.abs().flatten().argsort()[: int(0.8 * m.weight.numel())]] = 0
    for path in ("1", "3"):
        assert int((pruned.get_submodule(path).weight == 0).sum()) == int(
            (masked.get_submodule(path).weight == 0).sum()
        )
    errors = [float((m(task.valid.x) - truth).square().mean().detach()) for m in (pruned, masked)]
    assert errors[0] < 0.7 * errors[1]


def test_rounds_fraction_by_layer_and_masks():
    model, task = small_cnn(), small_task()
    model = fit(model, task, epochs=4, lr=1e-2)
    energy_aware(model, task, sparsity={"3": 0.8, "8": 0.5}, rounds=2, finetune=1)
    assert mask_of(model[0]) is None
    assert int((~mask_of(model[3])).sum()) == int(0.8 * 1152)
    assert torch.equal(model[3].weight != 0, mask_of(model[3]))
    assert int((model[8].weight == 0).sum()) == 32
    assert evaluate(model, task).value > 0.8


def test_layers_that_least_squares_cannot_refit_are_named():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 4))
    with recording() as ledger:
        energy_aware(model, small_task(), finetune=0)
    assert "2 groups" in ledger.skipped["1"]
    assert mask_of(model[1]) is None


def test_training_data_are_asked_for_before_the_work():
    model, task = small_mlp(), Task(valid=small_task().valid, calibration=[torch.randn(32, 1, 8, 8)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MissingNeed, match="finetune=0"):
        energy_aware(model, task)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    energy_aware(model, task, finetune=0)
    unlabelled = Task(valid=task.valid, train=task.calibration)
    with pytest.raises(MissingNeed, match="the loss needs labels"):
        energy_aware(small_mlp(), unlabelled)
