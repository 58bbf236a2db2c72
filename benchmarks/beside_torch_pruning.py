"""Half and a quarter of the workhorse's MACs, beside Torch-Pruning: `python benchmarks/beside_torch_pruning.py`.

Both start from the same weights, see the same fine-tuning (SGD, cosine, shifts and flips) and have equally many trials.
A trial fine-tunes for half an epoch and is judged on valid; the best configuration of each is then run with three seeds
and two epochs, and told on test. Ours is also told with the original as teacher in those two epochs. Rows are written
as soon as they are there; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_pruning as peer
from run import commit, read
from safetensors.torch import load_file
from torch import Tensor, nn

from featherweight import export, outputs, provenance, zoo
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.figures import batched, compare
from featherweight.provenance import seed_everything
from featherweight.prune import prune
from featherweight.recipes.kd import kd

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "beside_torch_pruning.json"
WEIGHTS = HERE / "base" / "resnet20_half_fashion_mnist.safetensors"
CUTS = (0.5, 0.25)  # of the MACs that stay
SEEDS = (0, 1, 2)
TRIAL, WHOLE, LR = 0.5, 2.0, 0.05
CALIBRATION = 16


def gate_taylor(site: Site) -> Tensor:
    """Mean square over samples of a channel's gate gradient."""
    return site.data.gates()[site.path].square().mean(0)


OURS: dict[str, dict[str, Any]] = {
    "taylor, global": {"score": gate_taylor, "scope": "global", "round_to": 1},
    "taylor, global, multiples of 8": {"score": gate_taylor, "scope": "global", "round_to": 8},
    "taylor l2-normalised, global, multiples of 8": {
        "score": gate_taylor,
        "scope": "global",
        "normalise": "l2",
        "round_to": 8,
    },
    "l1 norm, every layer alike": {"score": "filter_norm", "scope": "layer", "round_to": 1},
    "l1 norm over the layer's mean, global": {
        "score": "filter_norm",
        "scope": "global",
        "normalise": "mean",
        "coupled": "mean",
        "round_to": 1,
    },
    "taylor, mean of coupled, in 4 rounds": {
        "score": gate_taylor,
        "scope": "global",
        "coupled": "mean",
        "round_to": 1,
        "rounds": 4,
        "schedule": "linear",
    },
}
# Torch-Pruning: (importance, options of its pruner, whether the importance needs gradients)
THEIRS: dict[str, tuple[Callable[[], Any], dict[str, Any], bool]] = {
    "l1 norm, local": (partial(peer.importance.GroupMagnitudeImportance, p=1), {"global_pruning": False}, False),
    "l2 norm, global": (partial(peer.importance.GroupMagnitudeImportance, p=2), {"global_pruning": True}, False),
    "taylor, global": (peer.importance.GroupTaylorImportance, {"global_pruning": True}, True),
    "taylor, global, isomorphic": (
        peer.importance.GroupTaylorImportance,
        {"global_pruning": True, "isomorphic": True},
        True,
    ),
    "l2 norm, local": (partial(peer.importance.GroupMagnitudeImportance, p=2), {"global_pruning": False}, False),
    "batch-norm scale, global": (peer.importance.BNScaleImportance, {"global_pruning": True}, False),
}


def base() -> nn.Module:
    """The workhorse, trained."""
    model = zoo.build("resnet20_half")
    model.load_state_dict(load_file(WEIGHTS))
    return model


def ours(name: str, cut: float, task: Task) -> nn.Module:
    """The base network with the channels removed that this configuration chooses, not fine-tuned."""
    once: dict[str, Any] = {"rounds": 1, "epochs": 0, "finetune": 0, "calibration_batches": CALIBRATION}
    return prune(base(), task, grain="filter", budget=f"macs<={cut}x", **{**once, **OURS[name]})


def theirs(name: str, cut: float, task: Task) -> nn.Module:
    """The same by Torch-Pruning, in steps of 2 % until the MACs are reached."""
    model, x = base().eval(), task.inputs()[0][0]
    make, options, gradients = THEIRS[name]
    last = [m for m in model.modules() if isinstance(m, nn.Linear)]
    pruner = peer.BasePruner(
        model, x, importance=make(), pruning_ratio=0.98, iterative_steps=49, ignored_layers=last, **options
    )
    whole = cost(model, task.inputs()).macs
    while cost(model, task.inputs()).macs > cut * whole:
        if gradients:
            model.zero_grad()
            for (images, labels), _ in zip(task.calibrating(), range(CALIBRATION), strict=False):
                (nn.functional.cross_entropy(model(images), labels) / CALIBRATION).backward()
        pruner.step()
    return model


def finetuned(model: nn.Module, task: Task, epochs: float, teacher: nn.Module | None) -> nn.Module:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it so
    if teacher is not None:
        return kd(model, replace(task, teacher=teacher), epochs=epochs, lr=LR, optimizer="sgd")
    return fit(model, task, epochs=epochs, lr=LR, optimizer="sgd")


def row(tool: str, name: str, cut: float, seed: int, task: Task, epochs: float, *, taught: bool = False) -> Any:
    """One run; the network itself beside its figures."""
    seed_everything(seed, 0)
    started, whole = time.perf_counter(), cost(base(), task.inputs()).macs
    model = (ours if tool == "ours" else theirs)(name, cut, task)
    teacher = base().eval().to(memory_format=torch.channels_last) if taught else None  # type: ignore[call-overload]
    finetuned(model, task, epochs, teacher).eval()
    found = {
        "tool": tool,
        "configuration": name,
        "teacher": taught,
        "cut": cut,
        "seed": seed,
        "epochs": epochs,
        "valid": evaluate(model, task, "valid").value,
        "macs": cost(model, task.inputs()).macs / whole,
        "widths": [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)],
        "seconds": time.perf_counter() - started,
    }
    return model, found


def asked() -> Iterator[tuple[str, str, float, int, float, bool]]:
    """The trials, equally many of each: four for a half, six for a quarter, where the first four told less."""
    for cut, count in zip(CUTS, (4, 6), strict=True):
        for tool, names in (("ours", OURS), ("theirs", THEIRS)):
            for name in list(names)[:count]:
                yield tool, name, cut, 0, TRIAL, False


def finals(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, float, int, float, bool]]:
    """The runs that are told: the configuration of each tool that was best on valid."""
    for taught, tools in ((False, ("theirs", "ours")), (True, ("ours",))):
        for cut, seed in itertools.product(CUTS, SEEDS):
            for tool in tools:
                trials = [r for r in rows if r["tool"] == tool and r["cut"] == cut and r["epochs"] == TRIAL]
                best = max(trials, key=lambda r: r["valid"])["configuration"]
                yield tool, best, cut, seed, WHOLE, taught


def timed(networks: dict[str, nn.Module], task: Task) -> dict[str, Any]:
    """Latency ratios to the original in ONNX Runtime, one thread, interleaved."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, model in networks.items():
            export.onnx(model.to(memory_format=torch.contiguous_format), f"{folder}/{name}.onnx",  # type: ignore[call-overload]
                        example_inputs=task.inputs())  # fmt: skip
            sessions[name] = export.session(f"{folder}/{name}.onnx", threads=1)
        found = {}
        for batch in (1, 64):
            args, _ = batched(task.inputs(), batch)
            calls = {name: partial(run, *args) for name, run in sessions.items()}
            for one in compare(calls, runtime="onnxruntime", batch=batch, threads=1, seconds=10):
                found[f"{one.name}, batch {batch}"] = {"ratio": one.ratio, "median": one.median, "p99": one.p99}
    return found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds of what was told."""
    told = []
    for cut in CUTS:
        for tool, taught in (("theirs", False), ("ours", False), ("ours", True)):
            mine = [r for r in rows if "test" in r and (r["tool"], r["cut"], r["teacher"]) == (tool, cut, taught)]
            if mine:
                tests = [r["test"] for r in mine]
                told.append(
                    {
                        "tool": tool,
                        "teacher": taught,
                        "MACs left": cut,
                        "configuration": mine[0]["configuration"],
                        "seeds": len(mine),
                        "test": statistics.mean(tests),
                        "spread": statistics.stdev(tests) if len(tests) > 1 else None,
                        "MACs": statistics.mean(r["macs"] for r in mine),
                    }
                )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-teacher", action="store_true", help="leave the runs with a teacher out")
    plain = parser.parse_args().without_teacher
    task = zoo.task("fashion_mnist", batch_size=128, augment="shift+flip")
    result = read(RESULTS) or {"title": __doc__.split("\n")[0], "rows": [], "latency": {}}
    rows = result["rows"]
    for stage in (asked, lambda: finals(rows)):
        for tool, name, cut, seed, epochs, taught in stage():
            key = {"tool": tool, "configuration": name, "cut": cut, "seed": seed, "epochs": epochs, "teacher": taught}
            if (taught and plain) or any(key.items() <= r.items() for r in rows):
                continue
            model, found = row(tool, name, cut, seed, task, epochs, taught=taught)
            if epochs == WHOLE:
                found["test"] = evaluate(model, task, "test").value
            rows.append(found)
            result |= {"table": summary(rows), "environment": provenance.environment(), "commit": commit()}
            outputs.write_json(RESULTS, result)
            print({k: v for k, v in found.items() if k != "widths"}, flush=True)
    for cut in (cut for cut in CUTS if str(cut) not in result["latency"]):
        chosen = {r["tool"]: r["configuration"] for r in rows if r["cut"] == cut and "test" in r}
        networks = {
            "original": base(),
            "theirs": theirs(chosen["theirs"], cut, task),
            "ours": ours(chosen["ours"], cut, task),
        }
        result["latency"][str(cut)] = timed({name: net.eval() for name, net in networks.items()}, task)
        outputs.write_json(RESULTS, result)
    print(result["table"], result["latency"])


if __name__ == "__main__":
    main()
