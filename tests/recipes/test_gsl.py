"""Park et al. 2017: the model of speed, layers it leaves dense, bounds at which pruning stops, layers restored."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, bake, mask_of
from featherweight.core.ledger import recording
from featherweight.core.site import sites
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.gsl import Roofline, activations, rooflines

gsl = entry("gsl")
CONV = Roofline(work=4e8, activations=2e6, weights=1e6, flops=1e11, bandwidth=1e10)
MACHINE = {"flops": 1e10, "bandwidth": 1e10, "alpha": 2.0}


def test_the_model_of_speed():
    assert CONV.speedup(1 / 3) == pytest.approx(1.0)
    assert CONV.least == pytest.approx(2 / 3)
    assert CONV.speedup(0.2) == pytest.approx(1 / 0.6)
    crossing = 1 - CONV.most
    assert crossing == pytest.approx(2e6 / (3 * 4e8 * 1e10 / 1e11 - 2 * 1e6))
    compute = CONV.alpha * crossing * CONV.work / CONV.flops
    fetch = (CONV.activations + CONV.beta * crossing * CONV.weights) / CONV.bandwidth
    assert compute == pytest.approx(fetch)
    assert CONV.speedup(crossing / 2) < 1.15 * CONV.speedup(crossing)  # below the crossing little is left to win


def test_layers_bound_by_fetching_have_no_useful_range():
    linear = Roofline(work=2e6, activations=8e3, weights=4e6, flops=1e11, bandwidth=1e10)
    assert linear.most is None
    crowded = Roofline(work=4e8, activations=1e9, weights=1e6, flops=1e11, bandwidth=1e10)
    assert crowded.most is None
    assert all(crowded.speedup(x) < 1 for x in (0.01, 0.1, 1 / 3))


def test_what_happens_to_a_layer():
    most = CONV.most
    assert CONV.verdict(most + 0.01, settled=False, last=False) == "enough"
    assert CONV.verdict(0.7, settled=True, last=False) == "go on"
    assert CONV.verdict(0.7, settled=False, last=True) == "enough"
    assert CONV.verdict(0.6, settled=False, last=False) == "go on"
    assert CONV.verdict(0.6, settled=True, last=False) == "restore"
    assert CONV.verdict(0.6, settled=False, last=True) == "restore"


def test_work_and_traffic_are_those_of_the_layers():
    model, task = small_cnn(), small_task()
    assert activations(model, task, ["0", "3", "8"]) == {"0": 64 + 512, "3": 512 + 256, "8": 16 + 4}
    seen = {}

    def machine(**facts):
        seen[facts["weights"]] = facts
        return Roofline(**facts, flops=1e10, bandwidth=1e10)

    rooflines(model, task, sites(model), machine, 2)
    assert seen[4 * 1152] == {"work": 2 * 2 * 1152 * 16, "activations": 4 * 768 * 2, "weights": 4 * 1152}


class Watched:
    """The training loop, which remembers the weights at the start of every fit."""

    def __init__(self) -> None:
        self.starts: list[dict[str, torch.Tensor]] = []

    def __call__(self, model, task, **options):
        self.starts.append({k: v.clone() for k, v in bake(copy.deepcopy(model)).state_dict().items()})
        return fit(model, task, **options)


def test_a_layer_that_cannot_get_sparse_is_restored_bit_by_bit_and_one_never_chosen_is_left():
    watched = Watched()
    task = small_task(fit=watched)
    model = fit(small_cnn(), task, epochs=4, lr=1e-2)
    with torch.no_grad():
        model[0].weight.mul_(50)  # too far from zero for the penalty
    dense = {k: v.clone() for k, v in model.state_dict().items()}
    with recording() as ledger:
        gsl(model, task, penalty=0.5, epochs=4, every=2, lr=0.05, finetune=1, **MACHINE)
    assert torch.equal(watched.starts[-1]["0.weight"], dense["0.weight"])
    assert mask_of(model[0]) is None
    assert "it is dense again" in ledger.skipped["0"]
    assert "left dense" in ledger.skipped["8"]
    assert mask_of(model[8]) is None
    assert float((bake(model)[3].weight == 0).float().mean()) > 0.5
    assert any("times as fast by the model" in text for text in ledger.notes)


def test_above_the_upper_bound_a_layer_is_pruned_no_further():
    watched = Watched()
    model = small_cnn()
    low = {"flops": 1e10, "bandwidth": 2.5e9, "alpha": 2.0}  # where fetching soon takes longer
    (speed,) = rooflines(model, small_task(), sites(model, "3"), lambda **facts: Roofline(**facts, **low), 1).values()
    gsl(model, small_task(fit=watched), where="3", penalty=0.5, epochs=20, every=1, lr=0.05, finetune=2, **low)
    shares = [float((start["3.weight"] == 0).float().mean()) for start in watched.starts]
    assert shares[-1] >= speed.most
    assert len(shares) < 1 + 20, "it stopped before its epochs were over"
    kept = mask_of(model[3])
    assert 1 - float(kept.float().mean()) == pytest.approx(shares[-1])
    assert speed.speedup(float(kept.float().mean())) > 1


def test_an_earlier_mask_stands():
    model = small_cnn()
    keep = torch.rand(16, 8, 3, 3) > 0.3
    attach(model[3], Mask(keep))
    gsl(model, small_task(), where="3", penalty=0.5, epochs=4, lr=0.05, finetune=1, **MACHINE)
    assert not (mask_of(model[3]) & ~keep).any()


def test_a_penalty_far_too_strong_empties_no_layer():
    model = small_cnn()
    gsl(model, small_task(), penalty=50.0, epochs=2, lr=0.05, finetune=1, **MACHINE)
    assert int(mask_of(model[3]).sum()) == 1
    assert int(bake(model)[3].weight.count_nonzero()) == 1


def test_machines_and_penalties_that_bring_nothing_are_refused():
    with pytest.raises(BadOption, match="no layer gets faster"):
        gsl(small_cnn(), small_task(), flops=1e15)
    with pytest.raises(CompressionError, match="raise penalty"):
        gsl(small_cnn(), small_task(), penalty=0.0, epochs=1, **MACHINE)
    assert isinstance(small_cnn()[0], nn.Conv2d)
