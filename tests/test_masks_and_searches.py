"""Methods that search widths keep the zeros that an earlier method masked, through every training on the way."""

import pytest
import torch

import featherweight as fw
from conftest import small_cnn, small_task
from featherweight.core.fit import fit

SEARCHES = {
    "netadapt": {"budget": "macs<=0.8x", "decrement": 0.3, "short_finetune": 1, "finetune": 1, "round_to": 1},
    "amc": {"budget": "macs<=0.7x", "episodes": 2, "warmup": 1, "hidden": 4, "search_batches": 1,
            "calibration_batches": 2, "finetune": 1, "round_to": 1},
    "play_and_prune": {"tolerance": 40, "alpha": 0.3, "rounds": 1, "finetune": 1, "round_to": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", SEARCHES)
def test_masked_zeros_stay(name):
    torch.manual_seed(0)
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=0.01)
    masked = ("magnitude_iterative", {"sparsity": 0.5, "scope": "layer", "rounds": 1, "epochs": 1, "finetune": 0})
    result = fw.compress(model, task, [masked, (name, SEARCHES[name])], measure=False, onnx=False)
    weight = result.model[3].weight
    assert weight.shape < model[3].weight.shape
    assert 0.3 < float((weight == 0).double().mean()) < 0.7
