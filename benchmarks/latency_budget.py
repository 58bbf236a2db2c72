"""`latency<=0.5x` as the only budget: `python benchmarks/latency_budget.py [NETWORK ...]`.

Channels are removed until ONNX Runtime takes half the time (batch 1, one thread, interleaved), then the network is
fine-tuned; the same widths are trained from new weights for as many epochs. A row a network, written when it is there.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from run import commit, read
from safetensors.torch import load_file
from torch import nn

from featherweight import compress, outputs, provenance, zoo
from featherweight.core.fit import fit
from featherweight.core.restart import reinitialise
from featherweight.core.task import evaluate

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "latency_budget.json"
NETWORKS = {
    "resnet20": ("resnet20", "resnet20_fashion_mnist"),
    "mobilenet_v2": ("mobilenet_v2:halvings=3", "mobilenet_v2_fashion_mnist"),
}
EPOCHS, LR = 2.0, 0.05
HOW: dict[str, Any] = {"score": "fisher", "scope": "global", "coupled": "mean", "calibration_batches": 16}


def row(name: str) -> dict[str, Any]:
    """One network under the budget, and its widths trained from scratch."""
    spec, weights = NETWORKS[name]
    task = zoo.task("fashion_mnist", batch_size=128, augment="shift+flip")
    model = zoo.build(spec)
    model.load_state_dict(load_file(HERE / "base" / f"{weights}.safetensors"))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it so
    once = {"grain": "filter", "rounds": 1, "epochs": 0, "finetune": EPOCHS, "lr": LR, "optimizer": "sgd"}
    result = compress(model, task, "prune", until="latency<=0.5x", **once, **HOW)
    scratch = reinitialise(copy.deepcopy(result.model))
    fit(scratch, task, epochs=EPOCHS, lr=0.1, optimizer="sgd").eval()
    report = result.report
    timed = {(r["runtime"], r["batch"]): r["ratio"] for r in report["latency"] if r["name"] == "result"}
    return {
        "network": name,
        "test, original": report["original"]["metric"],
        "test, pruned": report["result"]["metric"],
        "test, same widths from scratch": evaluate(scratch, task, "test").value,
        "epochs of both": EPOCHS,
        "latency, batch 1": timed["onnxruntime", 1],
        "latency, batch 64": timed["onnxruntime", 64],
        "MACs left": report["result"]["macs"] / report["original"]["macs"],
        "widths": str([m.out_channels for m in result.model.modules() if isinstance(m, nn.Conv2d)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NETWORKS))
    result = read(RESULTS) or {"title": "latency<=0.5x as the only budget (Fashion-MNIST)", "table": []}
    for name in parser.parse_args().names:
        if name not in [one["network"] for one in result["table"]]:
            result["table"].append(row(name))
            result |= {"how": HOW, "environment": provenance.environment(), "commit": commit()}
            outputs.write_json(RESULTS, result)
            print(result["table"][-1], flush=True)


if __name__ == "__main__":
    main()
