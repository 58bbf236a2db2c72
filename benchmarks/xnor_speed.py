"""How fast layers of signs are: beside PyTorch's float layers, a naive float loop, and what the machine can count.

`python benchmarks/xnor_speed.py [--only linear ...] [--threads 1 2] [--seconds 4]` writes `results/xnor_speed.json`, a
row a layer and number of threads. Float and packed layer run in turn on the same input, packing included. Ratios are
medians over the rounds, so that other load on the machine slows both, on one thread also of the processor's time, which
counts no waiting; and of the fastest rounds. The naive loop multiplies and adds one by one, on one thread: that is what
the 58 times of XNOR-Net, arXiv:1603.05279, are against. It is timed on a few outputs and scaled to all of them. The
limit counts bits of words in the nearest cache and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import nn

from featherweight import outputs, provenance
from featherweight.core.binary import SignInput
from featherweight.core.forms import Affine, Codes, attach, declare_codes
from featherweight.figures import threads_of_torch
from featherweight.runtime.executors.xnor_popcount import xnor_popcount
from featherweight.runtime.popcounts import VECTOR, WORD, WORDS
from featherweight.runtime.threads import divided

HERE = Path(__file__).parent
Clock = Callable[[], float]
CHANNELS = (256, 512, 1024, 2048)
IMAGE = {256: 14, 512: 14, 1024: 7, 2048: 7}  # sides of the images of a residual network at these widths
BATCHES = (1, 64)
VECTORS = 64  # of a run whose bits are counted in one piece


def signed(layer: nn.Module) -> nn.Module:
    """A layer with weights of plus and minus one behind signs."""
    symbols = (layer.weight >= 0).to(torch.uint8)
    codes = Codes(symbols, Affine(torch.tensor(2.0), torch.tensor(0.5)), tuple(symbols.shape))
    layer.weight.data = codes.decode()
    declare_codes(layer, "weight", codes)
    width, dim = (layer.in_features, -1) if isinstance(layer, nn.Linear) else (layer.in_channels, -3)
    attach(layer, SignInput(torch.zeros(width), dim, 1.0), "input")
    return layer


def layers() -> Iterator[tuple[str, str, nn.Module, torch.Tensor, int]]:
    """(kind, name, layer, input, multiplications) of every row."""
    for c in CHANNELS:
        for batch in BATCHES:
            name = f"linear {c} x {c}, batch {batch}"
            yield "linear", name, nn.Linear(c, c), torch.randn(batch, c), batch * c * c
    for c in CHANNELS:
        side = IMAGE[c]
        name = f"conv 3x3, {c} channels, {side} x {side}, batch 1"
        yield "conv", name, nn.Conv2d(c, c, 3, padding=1), torch.randn(1, c, side, side), 9 * c * c * side * side


@intrinsic
def _counted(typing: Any, words: Any, start: Any) -> Any:
    """The bits of 64 vectors of words, into eight sums that do not wait for each other."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])
        name = f"v{VECTOR}i64"
        count = cgutils.get_or_insert_function(builder.module, ir.FunctionType(WORDS, [WORDS]), f"llvm.ctpop.{name}")
        sums = [ir.Constant(WORDS, [0] * VECTOR)] * 8
        for v in range(VECTORS):
            place = builder.bitcast(builder.gep(data, [WORD(v * VECTOR)]), WORDS.as_pointer())
            vector = builder.load(place)
            vector.align = 8
            sums[v % 8] = builder.add(sums[v % 8], builder.call(count, [vector]))
        whole = reduce(builder.add, sums)
        total = ir.FunctionType(WORD, [WORDS])
        return builder.call(
            cgutils.get_or_insert_function(builder.module, total, f"llvm.vector.reduce.add.{name}"), [whole]
        )

    return types.uint64(words, types.intp), emit


@njit(nogil=True)
def counted(words: Any, rounds: int) -> int:
    """Rounds over four runs of 64 vectors, 16 kB: they stay in the nearest cache."""
    total = np.uint64(0)
    for i in range(rounds):
        total += _counted(words, (i & 3) * VECTORS * VECTOR)
    return total


def limit(clock: Clock, rounds: int = 20000) -> float:
    """Thousands of millions of bits that all threads count in a second, in the best of ten tries."""
    words = np.random.default_rng(0).integers(0, 2**63, (64, 4 * VECTORS * VECTOR), dtype=np.uint64)
    threads, best = torch.get_num_threads(), np.inf
    for _ in range(10):
        start = clock()
        divided(lambda first, last: [counted(words[t], rounds) for t in range(first, last)], threads, 1e9)
        best = min(best, clock() - start)
    return threads * rounds * VECTORS * VECTOR * 64 / best / 1e9


def interleaved(calls: Mapping[str, Callable[[], Any]], seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times of the calls in turn, by the clock and by the processor's time of this thread, in milliseconds."""
    clocks = (time.perf_counter, time.thread_time)
    found: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(3):
        for call in calls.values():
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(found.values()))) < 15:
        for name, call in calls.items():
            start = [clock() for clock in clocks]
            call()
            found[name].append([(clock() - s) * 1e3 for clock, s in zip(clocks, start, strict=True)])
    wall, used = ({name: np.array(times)[:, i] for name, times in found.items()} for i in (0, 1))
    return wall, used


@njit(nogil=True)
def naive(weights: Any, x: Any, out: Any) -> None:
    """`out[o] = sum_k weights[o, k] x[k]`, one product after the other: float sums keep their order."""
    for o in range(len(out)):
        total = np.float32(0)
        for k in range(x.size):
            total += weights[o, k] * x[k]
        out[o] = total


def naive_ms(terms: int, outputs_of_all: int) -> float:
    """Milliseconds of the naive loop for so many outputs of so many products, from 64 of them, in the best of five."""
    generator = np.random.default_rng(0)
    weights, x = (generator.standard_normal(shape).astype(np.float32) for shape in ((64, terms), terms))
    out, times = np.zeros(64, np.float32), []
    for _ in range(6):
        start = time.thread_time()
        naive(weights, x, out)
        times.append(time.thread_time() - start)
    return min(times[1:]) * 1e3 * outputs_of_all / 64


def row(name: str, layer: nn.Module, x: torch.Tensor, products: int, threads: int, seconds: float) -> dict[str, Any]:
    """One layer on so many threads."""
    packed = xnor_popcount(signed(layer))
    plain = type(layer).forward
    load = os.getloadavg()[0]
    with threads_of_torch(threads), torch.no_grad():
        wall, used = interleaved({"float": lambda: plain(layer, x), "packed": lambda: packed(x)}, seconds)
        best = (used if threads == 1 else wall)["packed"].min()
        bits = limit(time.thread_time if threads == 1 else time.perf_counter)
    terms = layer.weight[0].numel()
    return {
        "layer": name,
        "threads": threads,
        "rounds": len(wall["float"]),
        "ms, float": float(np.median(wall["float"])),
        "p99 ms, float": float(np.percentile(wall["float"], 99)),
        "ms, packed": float(np.median(wall["packed"])),
        "p99 ms, packed": float(np.percentile(wall["packed"], 99)),
        "float / packed": float(np.median(wall["float"] / wall["packed"])),
        "float / packed, processor's time": float(np.median(used["float"] / used["packed"])) if threads == 1 else "-",
        "float / packed, fastest rounds": float(wall["float"].min() / wall["packed"].min()),
        "naive loop, one thread / packed": naive_ms(terms, products // terms) / best,
        "of the popcount limit": products / float(best) / 1e6 / bits,
        "popcount limit, Gbit/s": bits,
        "load of the machine": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["linear", "conv"])
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4.0)
    asked = parser.parse_args()
    path = HERE / "results" / "xnor_speed.json"
    found = json.loads(path.read_text()) if path.exists() else {"table": []}
    for threads in asked.threads:
        for kind, name, layer, x, products in layers():
            if kind in asked.only:
                new = row(name, layer, x, products, threads, asked.seconds)
                kept = [old for old in found["table"] if (old["layer"], old["threads"]) != (name, threads)]
                found = {
                    "title": "Layers of signs by XNOR and popcount, beside PyTorch's float layers",
                    "table": sorted(
                        [*kept, new], key=lambda r: (r["threads"], r["layer"].split()[0], len(r["layer"]), r["layer"])
                    ),
                    "environment": provenance.environment(),
                }
                outputs.write_json(path, found)
                print(json.dumps(new), flush=True)


if __name__ == "__main__":
    main()
