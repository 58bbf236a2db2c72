"""Liu et al. 2019: the shapes are the pruned network's, the weights are not; B trains as much as the large one did."""

import copy

import pytest
import torch

import featherweight as fw
from conftest import small_cnn, small_task
from featherweight.catalogue import entries, entry
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.errors import BadOption, UnknownName
from featherweight.recipes.scratch_retrain import structured

scratch = entry("scratch_retrain")
HALF = {"prune_ratio": 0.5, "round_to": 1}


def shapes(model):
    return {name: p.shape for name, p in model.named_parameters()}


def steps_of(**options):
    """How many epochs the last training of a run takes."""
    taken = []

    def watched(model, task, *, epochs, **rest):
        taken.append(epochs)
        return fit(model, task, epochs=0, **rest)

    task, model = small_task(fit=watched), small_cnn()
    ratio = cost(model, task.inputs()).macs
    model = scratch(model, task, **options)
    return taken, ratio / cost(model, task.inputs()).macs


@pytest.mark.parametrize("method", ["pfec_l1", "network_slimming"])
def test_the_network_is_the_methods_with_other_weights(method):
    task, model = small_task(), fit(small_cnn(), small_task(), epochs=6, lr=0.01)
    given = HALF if method == "pfec_l1" else {**HALF, "epochs": 1, "lr": 0.01}
    torch.manual_seed(0)
    pruned = entry(method)(copy.deepcopy(model), task, **given, finetune=0)
    torch.manual_seed(0)
    again = scratch(copy.deepcopy(model), task, method=method, options=given, epochs=0)
    assert shapes(again) == shapes(pruned)
    assert sum(p.numel() for p in again.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    for (name, a), b in zip(again.named_parameters(), pruned.parameters(), strict=True):
        if a.dim() > 1:
            both = torch.stack([a.detach().flatten(), b.detach().flatten()])
            assert float(torch.corrcoef(both)[0, 1].abs()) < 0.5, name


def test_e_trains_as_long_and_b_as_much():
    taken, _ = steps_of(options=HALF, epochs=10, budget="E")
    assert taken == [10]  # the method's own fine-tuning is left out
    taken, ratio = steps_of(options=HALF, epochs=10, budget="B")
    assert ratio > 2.5
    assert taken[-1] == pytest.approx(10 * ratio)
    taken, _ = steps_of(options=HALF, epochs=10, budget="B", most=2.0)
    assert taken[-1] == 20


def test_trains_what_is_left():
    task, model = small_task(), small_cnn()
    with recording() as ledger:
        model = scratch(model, task, options=HALF, epochs=6, lr=0.02)
    assert evaluate(model, task).value > 0.9
    assert any(text.startswith("Scratch-B: 6 epochs times") for text in ledger.notes)


def test_behind_another_method_the_chains_original_is_the_large_one():
    model, task = fit(small_cnn(), small_task(), epochs=3, lr=0.01), small_task()
    chain = [("pfec_l1", {**HALF, "finetune": 0}), ("scratch_retrain", {"method": None, "epochs": 4, "lr": 0.02})]
    result = fw.compress(model, task, chain, onnx=False)
    first, second = result.report["stages"]
    assert second["macs"] == first["macs"] < result.report["original"]["macs"]
    ratio = result.report["original"]["macs"] / second["macs"]
    assert any(f"4 epochs times {ratio:.3g}" in text for text in second["notes"])


def test_masks_stay_where_they_are():
    model, task = small_cnn(), small_task()
    keep = torch.rand(16, 8, 3, 3) > 0.5
    attach(model[3], Mask(keep))
    model = scratch(model, task, method=None, epochs=1, lr=0.02)
    assert torch.equal(mask_of(model[3]), keep)


def test_every_method_that_removes_channels_can_be_the_first_half():
    methods = {name for name, found in entries("method").items() if "channels" in found.shrinks} - {"scratch_retrain"}
    assert len(methods) >= 8
    assert all(structured(name).id == name for name in methods)


def test_bad_options():
    with pytest.raises(BadOption, match="method='magnitude_iterative' removes no channels"):
        scratch(small_cnn(), small_task(), method="magnitude_iterative")
    with pytest.raises(UnknownName, match="pfec_l1"):
        scratch(small_cnn(), small_task(), method="pfec_l")
    with pytest.raises(UnknownName, match="prune_ratio"):
        scratch(small_cnn(), small_task(), options={"prune_rate": 0.5})
    with pytest.raises(BadOption, match="name it"):
        scratch(small_cnn(), small_task(), method=None, options=HALF)
