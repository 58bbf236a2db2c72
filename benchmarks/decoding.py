"""How long files take to open: `featherweight.load(into=)` beside NNCodec's `decompress`, both as whole calls.

    python benchmarks/decoding.py --nncodec path/to/another/environment/bin/python

NNCodec (ISO/IEC 15938-17) runs in an environment of its own: what it imports at the start and does not use is stood in
for. It codes the base networks with dependent quantization at one step; the weights that come out of its file are the
ones that ours hold, bit for bit, with their integers declared. Both readers are kept open in processes of their own and
take turns, so that whatever else the machine does falls on both. Told is the least and the median of all turns, on one
thread and on two. Figures go to `results/decoding.json`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from featherweight import outputs

HERE = Path(__file__).parent
NETWORKS = {
    "lenet300": "lenet300_mnist_seed0",
    "lenet5": "lenet5_mnist_seed0",
    "resnet20": "resnet20_fashion_mnist",
    "vgg": "vgg_fashion_mnist",
    "perceptron": "",
}
CODERS = ("fast", "context_mixing")
QP = -28  # a step of about 2^-7
OTHER = """
import pickle, sys, time
sys.path.insert(0, sys.argv[4])
from nncodec_side import Finder
sys.meta_path.insert(0, Finder())
out, sys.stdout = sys.stdout, sys.stderr
from nncodec import nnc
path, qp, source = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if source:
    told = pickle.load(open(source, "rb"))
    nnc.compress(told, bitstream_path=path, qp=qp, use_dq=True, opt_qp=False, param_opt=True, row_skipping=True,
                 return_bitstream=True, verbose=False)
    pickle.dump(nnc.decompress(path, verbose=False), open(source, "wb"))
for line in sys.stdin:
    begun = time.perf_counter()
    nnc.decompress(path, verbose=False)
    print(time.perf_counter() - begun, file=out, flush=True)
"""
OURS = """
import pickle, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import torch
torch.set_num_threads(int(sys.argv[3]))
from decoding import network
from featherweight.coding import load
model = network(sys.argv[2])
for line in sys.stdin:
    begun = time.perf_counter()
    load(sys.argv[1], model, codes=False)
    print(time.perf_counter() - begun, flush=True)
"""


def network(name: str) -> Any:
    import torch
    from safetensors.torch import load_file
    from torch import nn

    from featherweight import zoo

    if not NETWORKS[name]:
        torch.manual_seed(0)
        sizes = (784, 2048, 4096, 1024, 10)
        return nn.Sequential(nn.Flatten(), *(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    model = zoo.build(name)
    model.load_state_dict(load_file(HERE / "base" / f"{NETWORKS[name]}.safetensors"))
    return model


def saved(name: str, decoded: dict[str, Any], folder: Path, coder: str) -> Path:
    """Our file of the weights that NNCodec's file holds."""
    import torch

    from featherweight.coding import save
    from featherweight.core.forms import Affine, Codes, declare_codes

    model = network(name)
    with torch.no_grad():
        for key, value in decoded.items():
            path, _, leaf = key.rpartition(".")
            module = model.get_submodule(path)
            weight = torch.as_tensor(value).reshape(getattr(module, leaf).shape)
            getattr(module, leaf).copy_(weight)
            points = weight.double().unique().abs().unique()
            step = points[points > 0].min() if weight.dim() > 1 and (points > 0).any() else None
            if step is None:
                continue
            whole = (weight.double() / step).round()
            if not torch.equal((whole.float() * step.float()), weight) or whole.abs().max() > 127:
                continue
            rule = Affine(step.float(), torch.zeros((), dtype=torch.int32))
            declare_codes(module, leaf, Codes(whole.to(torch.int8), rule, tuple(weight.shape)))
    path = folder / f"{name}_{coder}.fw"
    save(model, path, coder=coder, class_free=False)
    return path


def opened(command: list[str], threads: int) -> subprocess.Popen[str]:
    told = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=told)


def turn(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None and process.stdout is not None  # noqa: PT018
    process.stdin.write("again\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def measured(name: str, other: str, threads: int, turns: int, folder: Path) -> list[dict[str, Any]]:
    theirs, source = folder / f"{name}.nnc", folder / f"{name}.pkl"
    if not theirs.exists():
        state = {k: v.numpy() for k, v in network(name).state_dict().items() if v.dim()}
        source.write_bytes(pickle.dumps(state))
    first = "" if theirs.exists() else str(source)
    readers = {"nncodec": opened([other, "-c", OTHER, str(theirs), str(QP), first, str(HERE)], threads)}
    turn(readers["nncodec"])
    paths = {"nncodec": theirs}
    for coder in CODERS:
        paths[coder] = folder / f"{name}_{coder}.fw"
        if not paths[coder].exists():
            saved(name, pickle.loads(source.read_bytes()), folder, coder)
        command = [sys.executable, "-c", OURS, str(paths[coder]), name, str(threads), str(HERE)]
        readers[coder] = opened(command, threads)
        turn(readers[coder])
    begun, seconds = time.perf_counter(), {key: list[float]() for key in readers}
    while len(seconds["fast"]) < turns and (time.perf_counter() - begun < 60 or len(seconds["fast"]) < 3):
        for key, process in readers.items():
            seconds[key].append(turn(process))
    for process in readers.values():
        process.communicate()
    return [
        {
            "network": name,
            "threads": threads,
            "coder": key,
            "bytes": paths[key].stat().st_size,
            "least": min(found),
            "median": sorted(found)[len(found) // 2],
            "turns": len(found),
            "faster": min(seconds["nncodec"]) / min(found),
        }
        for key, found in seconds.items()
    ]


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--nncodec", required=True, help="the Python of an environment that has nncodec")
    told.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    told.add_argument("--turns", type=int, default=30)
    told.add_argument("--out", type=Path, default=HERE / "results" / "decoding.json")
    given = told.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.networks:
            for threads in (1, 2):
                rows += measured(name, given.nncodec, threads, given.turns, Path(folder))
                for row in rows[-3:]:
                    print(
                        f"{row['network']:<11} {row['threads']} {row['coder']:<15} {row['bytes']:>9} bytes "
                        f"{1e3 * row['least']:9.2f} ms (median {1e3 * row['median']:9.2f}) {row['faster']:6.2f}x",
                        flush=True,
                    )
            outputs.write_json(given.out, {"qp": QP, "rows": rows})


if __name__ == "__main__":
    main()
