"""Every method of the catalogue passes every check of the contract; representatives of all effects compose."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

import contract
import featherweight as fw
from conftest import Batches, blobs, small_task
from featherweight.catalogue import entries
from featherweight.core.forms import activation_form, codes_of
from featherweight.core.task import Metric, Task
from featherweight.errors import BadOption

METHODS = sorted(entries("method"))


def writes_onnx(name: str) -> bool:
    """Whether the run of a method writes ONNX: all do in `make test-all`."""
    return contract.own_onnx(entries()[name]) or contract.drawn(name, 4)


def each_check():
    """Every check of every method; one worker runs all checks of a method, so that the method itself runs once."""
    for name in METHODS:
        for check in contract.checks():
            slow = check is contract.check_onnx_equals_the_module and not writes_onnx(name)
            marks = [pytest.mark.xdist_group(name), *([pytest.mark.slow] if slow else [])]
            yield pytest.param(name, check, marks=marks, id=f"{name}-{check.__name__}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """Each method is run once, whatever number of checks look at it."""
    done: dict[str, contract.Ran] = {}
    every = "not slow" not in request.config.option.markexpr

    def ran(name: str) -> contract.Ran:
        if name not in done:
            model, task = contract.trained(name)
            before, folder = contract.state(model), tmp_path_factory.mktemp(name)
            method, onnx = entries()[name], every or writes_onnx(name)
            again = onnx and contract.own_onnx(method) and (every or contract.drawn(name, 4))
            result = fw.compress(model, task, name, out=folder, onnx=onnx, **method.small)
            done[name] = contract.Ran(method, model, before, task, result, folder, again)
        return done[name]

    return ran


@pytest.mark.parametrize(("name", "check"), list(each_check()))
def test_contract(name, check, runs):
    check(runs(name))


FRESH = """
import sys
import torch
sys.path.insert(0, {tests!r})
import featherweight as fw
import contract
for given in sys.stdin:
    name, folder = given.rstrip().split("=", 1)
    try:
        fresh, task = contract.network(name)
        model = fw.load(folder + "/model.fw", into=fresh)
        before = [p.detach().clone() for p in model.parameters()]
        fw.fit(model, task, epochs=1)
        changed = any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        print("told: trained" if changed else "told: nothing changed", flush=True)
    except Exception as error:
        print("told:", repr(error), flush=True)
"""


@pytest.fixture(scope="module")
def fresh():
    """A process that has run no method, and opens the files of all of them."""
    script = FRESH.format(tests=str(Path(__file__).parent))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in METHODS])
def test_file_reloads_in_a_fresh_process_and_trains(name, runs, fresh):
    fresh.stdin.write(f"{name}={runs(name).folder}\n")
    fresh.stdin.flush()
    assert next(line for line in fresh.stdout if line.startswith("told: ")) == "told: trained\n"


REPRESENTATIVES = {
    "weights": ("magnitude_iterative", {"sparsity": 0.5, "rounds": 2, "epochs": 2, "finetune": 2, "lr": 0.01}),
    "bits": ("kmeans_share", {"weight_bits": 4, "epochs": 2}),
    "channels": ("network_slimming", {"prune_ratio": 0.25, "epochs": 2, "finetune": 4, "round_to": 1}),
    "factors": ("tucker2_vbmf", {"rank": 4, "epochs": 4}),
    "student": ("kd", {"epochs": 2}),
}
REPRESENTED = {name for name, _ in REPRESENTATIVES.values()}
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


ON_GRIDS = {
    **REPRESENTATIVES,
    "int8": ("int8", {"calibration_batches": 2}),
    "dorefa": ("dorefa", {"weight_bits": 4, "act_bits": 4, "epochs": 4, "lr": 0.01}),
}


@pytest.mark.parametrize(
    ("earlier", "later", "quantized", "levels"),
    [
        ("weights", "int8", {"0", "3", "8"}, 255),
        ("channels", "int8", {"0", "3", "8"}, 255),
        ("int8", "student", {"0", "3", "8"}, 255),
        ("weights", "dorefa", {"3"}, 17),  # the grid has no zero, the mask brings one
        ("dorefa", "student", {"3"}, 16),
    ],
)
def test_grids_compose(earlier, later, quantized, levels, tmp_path):
    """Weights and activations are on their grids after the whole chain, and zeros and removed channels stay so."""
    model, task = contract.trained()
    result = fw.compress(model, task, [ON_GRIDS[earlier], ON_GRIDS[later]], out=tmp_path, onnx=False)
    layers = {path: result.model.get_submodule(path) for path in ("0", "3", "8")}
    codes = {path: codes for path, layer in layers.items() if (codes := codes_of(layer)) is not None}
    assert codes.keys() == quantized
    for path, found in codes.items():
        assert torch.equal(found.decode(), layers[path].weight)
        assert len(found.symbols.unique()) <= levels
    placed = [m for m in result.model.modules() if any(activation_form(m, at) for at in ("input", "output"))]
    assert len(placed) >= len(quantized)
    first, second = result.report["stages"]
    if earlier == "channels":
        assert second["macs"] <= first["macs"] < result.report["original"]["macs"]
    if earlier == "weights":
        zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
        assert zeros >= int(0.5 * sum(layer.weight.numel() for layer in layers.values()))
    assert result.report["result"]["metric"] > 0.8


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


# exactly these may refuse, and the cure that they name; every other method works on every kind
REFUSALS = {
    **{(name, kind): "choose another method" for name in ("albert_embedding", "albert_share") for kind in BEYOND},
    **{("sequence_kd", kind): "choose kd" for kind in BEYOND},
    **{("bert_to_bilstm", kind): "choose logit_regression" for kind in BEYOND},
    **{("ibm_structured_conv", kind): "choose another method" for kind in BEYOND if kind != "segmentation"},
    **{("compact_rnn_sharing", kind): "choose another method" for kind in BEYOND if kind != "recurrent"},
    ("xnor_net", "recurrent"): "pass keep_first_last=False",
    ("horq", "recurrent"): "pass keep_first_last=False",
    ("pact", "recurrent"): "pass keep_first_last=False",
    ("bwn", "recurrent"): "pass keep_first_last=False",
    ("dorefa", "recurrent"): "pass keep_first_last=False",
    ("equalize", "recurrent"): "leave equalize out",
    ("fitnets", "regression"): "need the scores of at least two classes",
    ("gong_pq", "recurrent"): "pass a larger one",
    ("gong_rq", "recurrent"): "pass a larger one",
    ("soulie_onthefly", "recurrent"): "pass a larger one",
    ("qcnn", "recurrent"): "pass more codebook_share",
    ("gsl", "dictionary"): "choose a method that counts weights",
    ("gsl", "recurrent"): "choose a method that counts weights",
    ("gsl", "regression"): "choose a method that counts weights",
    ("attention_transfer", "dictionary"): "choose one that takes vectors",
    ("attention_transfer", "recurrent"): "choose one that takes vectors",
    ("attention_transfer", "regression"): "choose one that takes vectors",
    ("fsp", "dictionary"): "choose one that takes vectors",
    ("fsp", "recurrent"): "choose one that takes vectors",
    ("fsp", "regression"): "choose one that takes vectors",
    ("nst_mmd", "dictionary"): "choose one that takes vectors",
    ("nst_mmd", "recurrent"): "choose one that takes vectors",
    ("nst_mmd", "regression"): "choose one that takes vectors",
    ("cross_layer_matrix", "dictionary"): "choose one that takes vectors",
    ("cross_layer_matrix", "recurrent"): "choose one that takes vectors",
    ("cross_layer_matrix", "regression"): "choose one that takes vectors",
    ("chou_full", "dictionary"): "choose one that takes vectors",
    ("chou_full", "recurrent"): "choose one that takes vectors",
    ("chou_full", "regression"): "choose one that takes vectors",
    ("kd_svd", "dictionary"): "choose one that takes vectors",
    ("kd_svd", "recurrent"): "choose one that takes vectors",
    ("kd_svd", "regression"): "choose one that takes vectors",
    ("offline_kl", "regression"): "need the scores of at least two classes",
    ("dml", "regression"): "need the scores of at least two classes",
    ("codistillation", "regression"): "need the scores of at least two classes",
    ("born_again", "regression"): "need the scores of at least two classes",
    ("srdl", "regression"): "need the scores of at least two classes",
    ("attention_transfer_gradient", "regression"): "choose sobolev",
    ("bucila_compression", "regression"): "need the scores of at least two classes",
    ("multi_teacher_triplet", "regression"): "need the scores of at least two classes",
    ("structured_kd_seg", "dictionary"): "choose kd for this network",
    ("structured_kd_seg", "recurrent"): "choose kd for this network",
    ("structured_kd_seg", "regression"): "choose kd for this network",
    ("face_neuron_selection", "regression"): "pass attributes=",
    ("face_neuron_selection", "segmentation"): "pass attributes=",
    ("mimic_detection", "dictionary"): "choose one that takes vectors",
    ("mimic_detection", "recurrent"): "choose one that takes vectors",
    ("mimic_detection", "regression"): "choose one that takes vectors",
    ("multi_teacher_video", "regression"): "need the scores of at least two classes",
    ("one", "regression"): "need the scores of at least two classes",
    ("apprentice", "regression"): "need the scores of at least two classes",
    ("conditional_adversarial_kd", "regression"): "needs the scores of at least two classes",
    ("data_free_kd", "regression"): "needs the scores of at least two classes",
    ("data_free_kd", "segmentation"): "choose a method that learns from data",
    ("lwf", "regression"): "need the scores of at least two classes",
    ("deep_rebirth", "dictionary"): "choose another method",
    ("deep_rebirth", "recurrent"): "choose another method",
    ("deep_rebirth", "regression"): "choose another method",
    ("intra_kernel_strided", "dictionary"): "choose another method",
    ("intra_kernel_strided", "recurrent"): "choose another method",
    ("intra_kernel_strided", "regression"): "choose another method",
    ("ista_bn", "dictionary"): "choose a method that ranks weights",
    ("ista_bn", "recurrent"): "choose a method that ranks weights",
    ("ista_bn", "regression"): "choose a method that ranks weights",
    ("kd", "regression"): "need the scores of at least two classes",
    ("lasso_mlp", "segmentation"): "no linear layer",
    **{("moonshine", kind): "choose another method" for kind in BEYOND if kind != "segmentation"},
    ("net2net", "recurrent"): "choose another method",
    ("canonical_order", "recurrent"): "leave this method out",
    ("universal_source_coding", "recurrent"): "leave this method out",
    ("network_slimming", "dictionary"): "choose a method that ranks weights",
    ("network_slimming", "recurrent"): "choose a method that ranks weights",
    ("network_slimming", "regression"): "choose a method that ranks weights",
}


NO_CHANNELS = "choose a method that masks weights"


def removes_channels(name: str) -> bool:
    """By its linear and convolution layers: the recurrent network has none but the last."""
    return "channels" in entries()[name].shrinks


def each_kind():
    """Every method on every kind, most of them among the slow tests: one kind a method, drawn by its name, runs always.

    So do all refusals, and the methods that stand for an effect.
    """
    kinds = sorted(BEYOND)
    for name in METHODS:
        drawn = kinds[zlib.crc32(name.encode()) % len(kinds)]
        for kind in kinds:
            always = kind == drawn or (name, kind) in REFUSALS or name in REPRESENTED
            yield pytest.param(name, kind, marks=() if always else pytest.mark.slow, id=f"{name}-{kind}")


@pytest.mark.parametrize(("name", "kind"), list(each_kind()))
def test_beyond_image_classification(name, kind, tmp_path):
    """A method works on it, or refuses it in one sentence that names a cure; never crashes, never does nothing.

    The ONNX file and the measuring are the network's matter, not the method's: one method of each effect has them.
    """
    model, task = BEYOND[kind]()
    whole = {"measure": name in REPRESENTED, "onnx": name in REPRESENTED}
    fw.fit(model, task, epochs=4, lr=0.01)
    if cure := REFUSALS.get((name, kind), NO_CHANNELS if kind == "recurrent" and removes_channels(name) else ""):
        with pytest.raises(fw.FeatherweightError, match=cure) as refusal:
            fw.compress(model, task, name, out=tmp_path, **whole, **entries()[name].small)
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "model.fw").exists()
        return
    result = fw.compress(model, task, name, out=tmp_path, **whole, **entries()[name].small)
    loaded = fw.load(tmp_path / "model.fw", into=BEYOND[kind]()[0]).eval()
    assert fw.evaluate(loaded, task).value == result.report["result"]["metric"]
    assert not contract.same(contract.state(model), contract.state(result.model))
