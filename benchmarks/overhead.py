"""What the training loop and `compress` cost beyond the work itself; writes `results/overhead.json`.

`fit` and a hand-written loop take turns on the workhorse, a few batches each: a drifting machine favours neither.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight import Task, compress, fit, outputs, provenance, sources, zoo

HERE = Path(__file__).parent
ROUNDS, STEPS = 9, 12


def by_hand(model: nn.Module, batches: list[Any]) -> None:
    """The loop that anyone would write."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def loop_ratio() -> list[float]:
    """Seconds of `fit` over seconds by hand, a ratio a round."""
    torch.set_num_threads(1)
    model = zoo.build("resnet20_half")
    batches = [(torch.randn(128, 1, 28, 28), torch.randint(0, 10, (128,))) for _ in range(STEPS)]
    task = Task(train=batches, valid=batches)
    pair = (lambda: fit(model, task, epochs=1, lr=0.01, optimizer="sgd"), lambda: by_hand(model, batches))
    for call in pair:
        call()
    ratios = []
    for turn in range(ROUNDS):
        first, second = pair if turn % 2 else pair[::-1]
        times = (timed(first), timed(second))
        ratios.append(times[0] / times[1] if turn % 2 else times[1] / times[0])
    return ratios


def nap(model: nn.Module, task: Task) -> nn.Module:
    """A method that does next to nothing."""
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    return model


def compress_seconds() -> float:
    """What `compress` with measuring off adds, with a checkpoint and the files, over the call and three evaluations."""
    model = sources.load_weights(zoo.build("resnet20_half"), HERE / "base" / "resnet20_half_fashion_mnist.safetensors")
    data = [(torch.randn(64, 1, 28, 28), torch.zeros(64).long())]
    task = Task(valid=data)
    nap(copy.deepcopy(model), task)
    return timed(lambda: compress(model, task, nap, measure=False, onnx=False))


if __name__ == "__main__":
    ratios = loop_ratio()
    added = [compress_seconds() for _ in range(3)]
    row = {
        "fit / hand-written loop, median": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "compress adds, seconds (median of 3)": statistics.median(added),
    }
    title = "Overhead of fit and of compress with measuring off, on the workhorse"
    outputs.write_json(
        HERE / "results" / "overhead.json", {"title": title, "table": [row], "environment": provenance.environment()}
    )
    print(row)
