"""Our files beside NNCodec's (ISO/IEC 15938-17), without training: bytes at equal divergence from the float network.

    python -m venv nnc && nnc/bin/pip install nncodec==2.1.3 "numpy<2" torch safetensors
    python benchmarks/nncodec_beside.py --nncodec nnc/bin/python [NAME ...]

writes `results/nncodec_beside.json`, and goes on where it stopped. A row is a file: its
bytes, the mean divergence of its outputs from the float network's on held-out inputs (the test images; for
EfficientNet-Lite0 crops of photographs that nothing was calibrated on), and accuracy there (for photographs: how often
the first class is that of the float network).

NNCodec codes with dependent quantization at several steps (`qp`), each in four ways: its defaults, its own choice of a
step for every tensor (`opt_qp`), the same with biases and norms on a coarser grid, and this with batch norms folded by
us before. At each divergence its best way counts. Counters of batches, which it cannot hold, are not given to it. Ours
is `trellis` and the coder of context mixing, a bare file, structure included. Ratios stand at the divergence of each of
our files, where NNCodec's bytes are interpolated, straight between logarithms; beyond its range there is none.

Lossless: the very integers that NNCodec coded, tensor by tensor, with our coder. `decoding.py` times decoding.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featherweight import compress, load, outputs, provenance, save, zoo
from featherweight.coding import pack_tensor
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import Affine, Codes
from featherweight.core.task import Task

HERE = Path(__file__).parent
RESULT = HERE / "results" / "nncodec_beside.json"
SIDE = HERE / "nncodec_side.py"
NETWORKS = {
    "LeNet-300-100": ("lenet300", "lenet300_mnist_seed0", "mnist"),
    "LeNet-5": ("lenet5", "lenet5_mnist_seed0", "mnist"),
    "ResNet-20": ("resnet20", "resnet20_fashion_mnist", "fashion_mnist"),
    "VGG": ("vgg", "vgg_fashion_mnist", "fashion_mnist"),
    "EfficientNet-Lite0": None,
}
LOSSES = {"EfficientNet-Lite0": (0.03, 0.3)}
OTHERWISE = (0.0003, 0.001, 0.003, 0.01, 0.03)
QPS = (-40, -36, -32, -28, -24, -20, -16)
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {  # whether batch norms are folded, and settings
    "defaults": (False, {}),
    "opt_qp": (False, {"opt_qp": True}),
    "opt_qp, coarser biases": (False, {"opt_qp": True, "nonweight_qp": -50}),
    "opt_qp, coarser biases, folded": (True, {"opt_qp": True, "nonweight_qp": -50}),
}
CROPS = 64


@dataclass(frozen=True)
class Given:
    """A float network, the same with its batch norms folded, its task, and what it says of held-out inputs."""

    name: str
    model: nn.Module
    folded: nn.Module
    task: Task
    held: list[tuple[Tensor, Tensor]]
    wanted: Tensor

    def measured(self, model: nn.Module) -> dict[str, float]:
        """Divergence and accuracy of a network in the place of the float one."""
        found = said(model, self.held)
        divergence = float((self.wanted.exp() * (self.wanted - found)).sum(1).mean())
        labels = torch.cat([y for _, y in self.held])
        return {"KL": divergence, "accuracy": float((found.argmax(1) == labels).double().mean())}


@torch.no_grad()
def said(model: nn.Module, held: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([model.eval()(x) for x, _ in held]).double().log_softmax(1)


def given(name: str, data: str | None) -> Given:
    """A network by its name."""
    if NETWORKS[name] is None:
        from photographs import CALIBRATED_ON, HELD_OUT, crops, efficientnet_lite0

        model = efficientnet_lite0()
        inputs = crops(HELD_OUT, CROPS, 2).split(16)
        held = [(x, y) for x, y in zip(inputs, said(model, [(x, x) for x in inputs]).argmax(1).split(16), strict=True)]
        seen = [(x, torch.zeros(16, dtype=torch.long)) for x in crops(CALIBRATED_ON, CROPS, 1).split(16)]
        task = Task(valid=held[:1], calibration=seen)
    else:
        network, file, data_set = NETWORKS[name]
        model = zoo.build(network)
        model.load_state_dict(load_file(HERE / "base" / f"{file}.safetensors"))
        task = zoo.task(data_set, root=data)
        assert task.test is not None
        held = [(x, y) for x, y in task.test]
    model = model.eval().requires_grad_(False)
    folded = fold_batchnorm(copy.deepcopy(model), held[0][0][:2])
    return Given(name, model, folded, task, held, said(model, held))


def ours(one: Given, loss: float, folder: Path) -> dict[str, Any]:
    """One file of ours."""
    start = time.perf_counter()
    result = compress(one.model, one.task, "trellis", loss=loss, measure=False)
    seconds = time.perf_counter() - start
    bare, fast = folder / "ours.fw", folder / "fast.fw"
    save(result.model, bare, bare=True, coder="context_mixing")
    save(result.model, fast, bare=True, coder="fast")
    back = load(bare, into=copy.deepcopy(one.model))
    row = {"network": one.name, "who": "ours", "setting": loss, "bytes": bare.stat().st_size}
    return row | one.measured(back) | {"fast bytes": fast.stat().st_size, "seconds": seconds}


def theirs(one: Given, python: str, qps: tuple[int, ...], folder: Path) -> Iterator[dict[str, Any]]:
    """Files of NNCodec, in all ways at all steps."""
    for folded in (False, True):
        model = one.folded if folded else one.model
        ways = {way: options for way, (whether, options) in WAYS.items() if whether == folded}
        runs = [(way, qp, {"qp": qp, **options}) for way, options in ways.items() for qp in qps]
        save_file({k: v.contiguous() for k, v in model.state_dict().items() if v.dim()}, folder / "in.safetensors")
        asked = json.dumps([options for *_, options in runs])
        run([python, str(SIDE), str(folder / "in.safetensors"), str(folder), asked])
        for number, (way, qp, _) in enumerate(runs):
            back = copy.deepcopy(model)
            state = load_file(folder / str(number) / "decoded.safetensors")
            back.load_state_dict({k: state.get(k, v).to(v.dtype) for k, v in model.state_dict().items()})
            stream = folder / str(number) / "stream.nnc"
            row = {"network": one.name, "who": "NNCodec", "setting": f"{way}, qp {qp}", "bytes": stream.stat().st_size}
            yield row | one.measured(back) | lossless(folder / str(number) / "coded.npz")


def lossless(path: Path) -> dict[str, int]:
    """The integers that NNCodec coded: its bytes for them, and ours."""
    coded, mine, its = np.load(path), 0, 0
    for name in coded.files:
        if name.endswith("|integers"):
            integers = torch.from_numpy(coded[name]).int()
            codes = Codes(integers, Affine(torch.tensor(1.0), torch.tensor(0)), tuple(integers.shape))
            mine += len(pack_tensor(codes.decode(), codes, coder="context_mixing"))
            its += int(coded[name.replace("|integers", "|bytes")])
    return {"integers, NNCodec": its, "integers, ours": mine}


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def envelope(rows: list[dict[str, Any]], divergence: float) -> float | None:
    """The fewest bytes of any way at a divergence, straight between the logarithms of neighbouring steps."""
    ways: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        ways.setdefault(row["setting"].rpartition(", qp")[0], []).append((math.log(row["KL"]), math.log(row["bytes"])))
    found, at = [], math.log(divergence)
    for points in ways.values():
        for (x, y), (u, v) in zip(sorted(points), sorted(points)[1:], strict=False):
            if x <= at <= u:
                found.append(math.exp(y + (v - y) * (at - x) / max(u - x, 1e-12)))
    return min(found, default=None)


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of our files beside NNCodec's bytes at its divergence."""
    found = []
    for row in rows:
        if row["who"] == "ours":
            beside = [other for other in rows if other["network"] == row["network"] and other["who"] == "NNCodec"]
            theirs_ = envelope(beside, row["KL"])
            best = None if theirs_ is None else round(theirs_)
            found.append({**row, "NNCodec at this KL": best, "ratio": None if best is None else row["bytes"] / best})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NETWORKS), help=", ".join(NETWORKS))
    parser.add_argument("--nncodec", required=True, help="the Python in which nncodec 2.1.3 is installed")
    parser.add_argument("--data", help="the folder of the data sets")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    state["environment"] = provenance.environment()

    def keep() -> None:
        state["compared"] = compared(state["rows"])
        outputs.write_json(options.out, state)

    for name in options.names:
        done = {(row["who"], row["setting"]) for row in state["rows"] if row["network"] == name}
        one = given(name, options.data)
        with tempfile.TemporaryDirectory() as folder:
            if not any(who == "NNCodec" for who, _ in done):
                state["rows"] += list(theirs(one, options.nncodec, QPS, Path(folder)))
                keep()
            for loss in LOSSES.get(name, OTHERWISE):
                if ("ours", loss) not in done:
                    state["rows"].append(ours(one, loss, Path(folder)))
                    keep()
                    print(state["compared"][-1], flush=True)


if __name__ == "__main__":
    main()
