"""Han 2015, Li 2017: what bears more loses more, at one tolerated drop, until the whole is saved that was asked for."""

import itertools

import pytest
import torch
from torch import nn

from conftest import Batches, blobs, small_cnn, small_mlp, small_task
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.forms import mask_of
from featherweight.core.ledger import recording
from featherweight.core.sensitivity import Curve
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.ingredients.allocation.layer_sensitivity import layer_sensitivity
from featherweight.prune import prune

ONE_SHOT = {"rounds": 1, "epochs": 0, "finetune": 0}


def curves(seed: int) -> dict[str, Curve]:
    generator = torch.Generator().manual_seed(seed)
    ratios = (0.0, 0.25, 0.5, 0.75, 0.9)
    found = {}
    for layer in ("a", "b", "c"):
        drops = [0.0, *torch.rand(4, generator=generator).cumsum(0).tolist()]
        part = float(torch.rand(1, generator=generator)) / 3
        found[layer] = Curve(ratios, tuple(drops), tuple(part * r for r in ratios))
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_the_tolerance_is_the_least_that_saves_enough(seed, part):
    found = curves(seed)
    share = part * sum(curve.saved[-1] for curve in found.values())
    chosen = layer_sensitivity(found, share)
    places = {layer: found[layer].ratios.index(ratio) for layer, ratio in chosen.items()}
    assert sum(found[layer].saved[place] for layer, place in places.items()) >= share - 1e-12
    worst = max(found[layer].drops[place] for layer, place in places.items())
    for tolerance in (d for curve in found.values() for d in curve.drops):
        most = [max(s for d, s in zip(c.drops, c.saved, strict=True) if d <= tolerance) for c in found.values()]
        if sum(most) >= share:
            assert worst <= tolerance


def test_what_cannot_be_saved_gives_the_most():
    assert layer_sensitivity(curves(0), 1.0) == {"a": 0.9, "b": 0.9, "c": 0.9}
    assert layer_sensitivity(curves(0), 0.0) == {"a": 0.0, "b": 0.0, "c": 0.0}


class Lopsided(nn.Module):
    """A network whose wide layer does nothing but pass on: it bears any pruning of what it has too much of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(16, 24), nn.Linear(24, 96), nn.Linear(96, 4)

    def forward(self, x):
        return self.last(self.spare(self.first(x).relu()).relu())


def lopsided() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    x, y = blobs((16,), n=512, noise=0.8)
    task = Task(train=Batches(x[:256], y[:256]), valid=Batches(x[256:], y[256:]))
    return fit(Lopsided(), task, epochs=8, lr=0.01), task


def test_the_layer_that_bears_more_loses_more_and_the_total_is_exact():
    model, task = lopsided()
    with recording() as ledger:
        prune(model, task, sparsity=0.7, allocation="layer_sensitivity", **ONE_SHOT)
    layers = {"first": model.first, "spare": model.spare, "last": model.last}
    gone = {name: float((~mask_of(layer)).double().mean()) for name, layer in layers.items()}
    masked = sum(int((~mask_of(layer)).sum()) for layer in layers.values())
    size = sum(layer.weight.numel() for layer in layers.values())
    assert masked == pytest.approx(0.7 * size, abs=len(layers))
    table = ledger.tables["sensitivity"]
    at_most = {row["path"]: row["points"][8]["metric"] for row in table["layers"]}  # 90 % of each alone
    assert gone[max(at_most, key=at_most.get)] == max(gone.values())
    assert gone[min(at_most, key=at_most.get)] == min(gone.values())
    assert {row["path"]: row["chosen"] for row in table["layers"]} == pytest.approx(gone, abs=0.02)


def test_it_keeps_more_accuracy_than_the_same_fraction_of_every_layer():
    lost = {}
    for allocation, scope in (("layer_sensitivity", "std"), (None, "layer")):
        model, task = lopsided()
        before = evaluate(model, task).value
        prune(model, task, sparsity=0.85, allocation=allocation, scope=scope, **ONE_SHOT)
        lost[allocation] = before - evaluate(model, task).value
    assert lost["layer_sensitivity"] < lost[None]


def test_a_budget_of_macs_is_reached_in_rounds_and_not_overshot():
    for rounds in (1, 3):
        model, task = small_cnn(), small_task()
        fit(model, task, epochs=6, lr=0.01)
        with recording() as ledger:
            prune(model, task, score="filter_norm", grain="filter", budget="macs<=0.5x", round_to=1,
                  allocation="layer_sensitivity", **{**ONE_SHOT, "rounds": rounds})  # fmt: skip
        left = cost(model, task.inputs()).macs / ledger.tables["sensitivity"]["whole"]["macs"]
        assert 0.35 < left <= 0.5


def test_a_fraction_of_the_channels():
    model, task = small_cnn(), small_task()
    prune(model, task, score="filter_norm", grain="filter", prune_ratio=0.5, round_to=1,
          allocation="layer_sensitivity", **ONE_SHOT)  # fmt: skip
    assert model[0].out_channels + model[3].out_channels <= 12
    assert model[0].out_channels >= 1


def test_what_it_refuses():
    task = small_task()
    with pytest.raises(BadOption, match="sparsity names a fraction for each"):
        prune(small_mlp(), task, sparsity={"1": 0.5}, allocation="layer_sensitivity")
    with pytest.raises(BadOption, match="removes the same of every layer"):
        prune(small_mlp(), task, grain="2:4", allocation="layer_sensitivity")
    with pytest.raises(CompressionError, match=r"macs<=0.001x is not reached"):
        prune(small_cnn(), task, score="filter_norm", grain="filter", budget="macs<=0.001x",
              allocation="layer_sensitivity", **ONE_SHOT)  # fmt: skip


def test_beyond_the_grid_a_sparsity_is_still_reached():
    model = small_mlp()
    prune(model, small_task(), sparsity=0.99, allocation="layer_sensitivity", **ONE_SHOT)
    kept = sum(int(mask_of(model[i]).sum()) for i in (1, 3))
    assert kept == pytest.approx(0.01 * 2176, abs=2)


def test_ratios_rise_with_what_is_asked():
    found = curves(3)
    whole = sum(curve.saved[-1] for curve in found.values())
    saved = []
    for part in (0.2, 0.4, 0.6, 0.8):
        chosen = layer_sensitivity(found, part * whole)
        saved.append(sum(c.saved[c.ratios.index(chosen[n])] for n, c in found.items()))
    assert all(a <= b for a, b in itertools.pairwise(saved))
