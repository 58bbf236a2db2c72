"""Every method of the catalogue passes every check of the contract; representatives of all effects compose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import contract
import featherweight as fw
from conftest import Batches, blobs, small_task
from featherweight.catalogue import entries
from featherweight.core.task import Metric, Task
from featherweight.errors import BadOption

METHODS = sorted(entries("method"))
# one worker runs all checks of a method, so that the method itself runs once
GROUPED = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in METHODS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each method is run once, whatever number of checks look at it."""
    done: dict[str, contract.Ran] = {}

    def ran(name: str) -> contract.Ran:
        if name not in done:
            model, task = contract.trained()
            folder: Path = tmp_path_factory.mktemp(name)
            result = fw.compress(model, task, name, out=folder, **entries()[name].small)
            done[name] = contract.Ran(entries()[name], model, task, result, folder)
        return done[name]

    return ran


@pytest.mark.parametrize("check", list(contract.checks()), ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", GROUPED)
def test_contract(name, check, runs):
    check(runs(name))


FRESH = """
import sys
import torch
sys.path.insert(0, {tests!r})
import featherweight as fw
from conftest import small_cnn, small_task
for folder in sys.argv[1:]:
    model = fw.load(folder + "/model.fw", into=small_cnn())
    before = [p.detach().clone() for p in model.parameters()]
    fw.fit(model, small_task(), epochs=1)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters())), folder
    print("trained", folder)
"""


def test_files_reload_in_a_fresh_process_and_train(runs):
    folders = [str(runs(name).folder) for name in METHODS]
    script = FRESH.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained") == len(METHODS)


REPRESENTATIVES = {
    "weights": ("magnitude_iterative", {"sparsity": 0.5, "rounds": 2, "epochs": 2, "finetune": 2, "lr": 0.01}),
    "bits": ("kmeans_share", {"weight_bits": 4, "epochs": 2}),
    "channels": ("network_slimming", {"prune_ratio": 0.25, "epochs": 2, "finetune": 4, "round_to": 1}),
    "factors": ("tucker2_vbmf", {"rank": 4, "epochs": 4}),
    "student": ("kd", {"epochs": 2}),
}
LEGAL = [
    (a, b)
    for a in REPRESENTATIVES
    for b in REPRESENTATIVES
    if a != b and (a, b) not in {("weights", "factors"), ("bits", "channels"), ("bits", "factors")}
]


@pytest.mark.parametrize(("earlier", "later"), LEGAL, ids=lambda v: v)
def test_effects_compose(earlier, later, tmp_path):
    """What the earlier method achieved is still there after the later one."""
    model, task = contract.trained()
    chain = [REPRESENTATIVES[earlier], REPRESENTATIVES[later]]
    result = fw.compress(model, task, chain, out=tmp_path, onnx=False)
    first, second = result.report["stages"]
    if earlier == "weights":
        assert second["nonzeros"] <= first["nonzeros"]
        assert sparsity(second) > 0.7 * sparsity(first)
    if earlier == "bits":
        assert second["size"] <= 1.1 * first["size"]
    if earlier in ("channels", "factors"):
        assert second["macs"] <= first["macs"]
    assert result.report["result"]["metric"] > 0.5


def sparsity(stage: dict) -> float:
    return 1 - stage["nonzeros"] / stage["params"]


@pytest.mark.parametrize(
    ("earlier", "later"), [("weights", "factors"), ("bits", "channels"), ("bits", "factors")], ids=lambda v: v
)
def test_orders_that_lose_are_refused(earlier, later):
    model, task = contract.trained()
    with pytest.raises(BadOption, match="would lose what that achieved"):
        fw.compress(model, task, [REPRESENTATIVES[earlier], REPRESENTATIVES[later]])


# --- beyond image classification --------------------------------------------------------------------------------------


class DictNet(nn.Module):
    """Takes keyword inputs and returns a dictionary, as text models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.head = nn.Linear(24, 4)

    def forward(self, features):
        return {"logits": self.head(self.body(features))}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def _mse(output, target):
    return nn.functional.mse_loss(output.squeeze(-1), target)


def _regression():
    x, y = blobs((16,))
    score = Metric("error", per_sample=lambda o, t: (o.squeeze(-1) - t).square(), higher_is_better=False)
    data = Batches(x, y.float())
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    return model, Task(train=data, valid=data, loss=_mse, metric=score)


def _segmentation():
    x, _ = blobs((1, 8, 8))
    data = Batches(x, (x[:, 0] > 0).long())
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 2, 1),
    )
    pixels = Metric("pixel accuracy", per_sample=lambda o, t: (o.argmax(1) == t).float().mean((1, 2)))
    return model, Task(train=data, valid=data, metric=pixels)


def _dictionary():
    x, y = blobs((16,))
    data = [{"features": a, "labels": b} for a, b in Batches(x, y)]
    return DictNet(), Task(train=data, valid=data)


def _recurrent():
    return Recurrent(), small_task((6, 8))


BEYOND = {"regression": _regression, "segmentation": _segmentation, "dictionary": _dictionary, "recurrent": _recurrent}


@pytest.mark.parametrize("kind", sorted(BEYOND))
@pytest.mark.parametrize("name", METHODS)
def test_beyond_image_classification(name, kind, tmp_path):
    """A method works on it, or refuses it in one sentence that names a cure; never crashes, never does nothing."""
    model, task = BEYOND[kind]()
    fw.fit(model, task, epochs=4, lr=0.01)
    try:
        result = fw.compress(model, task, name, out=tmp_path, **entries()[name].small)
    except fw.FeatherweightError as error:
        refusal = str(error)
    else:
        loaded = fw.load(tmp_path / "model.fw", into=BEYOND[kind]()[0]).eval()
        assert fw.evaluate(loaded, task).value == result.report["result"]["metric"]
        return
    assert len(refusal) > 30
    assert "\n" not in refusal
    assert not (tmp_path / "model.fw").exists()
