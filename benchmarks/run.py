"""Runs one benchmark by name, or lists what there is: `python benchmarks/run.py [NAME ...]`.

An experiment is data: `experiments/NAME.json` names a network, its weights, data, a chain and seeds. So is its result:
`results/NAME.json` holds a row a seed, written as soon as it is there, and what they come to. A run that was stopped
goes on with the seeds that are missing, and inside a seed with the method that is. An experiment that was changed is
measured anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from featherweight import FeatherweightError, compress, outputs, provenance, save, sources
from featherweight.core import progress

HERE = Path(__file__).parent
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def listing() -> str:
    """What there is, and how far each has run."""
    rows = []
    for path in sorted((HERE / "experiments").glob("*.json")):
        asked = json.loads(path.read_text())
        done = read(HERE / "results" / path.name).get("rows", [])
        rows.append(f"{path.stem:36s} {len(done)} of {len(asked['seeds'])} seeds   {asked['title']}")
    return "\n".join(rows)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def run(name: str) -> None:
    """Runs the seeds of an experiment that are missing."""
    path = HERE / "experiments" / f"{name}.json"
    if not path.exists():
        known = ", ".join(p.stem for p in sorted((HERE / "experiments").glob("*.json")))
        raise FeatherweightError(f"there is no experiment {name!r}: choose one of {known}")
    asked = json.loads(path.read_text())
    identity = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    result_path = HERE / "results" / f"{name}.json"
    result = read(result_path)
    if result.get("experiment") != identity:
        result = {"experiment": identity, "title": asked["title"], "asked": asked, "rows": []}
    for seed in asked["seeds"]:
        if seed not in [row["seed"] for row in result["rows"]]:
            result["rows"].append(one(name, asked, seed))
            result |= {"summary": summary(result["rows"]), "environment": provenance.environment(), "commit": commit()}
            outputs.write_json(result_path, result)
    print(f"{name}: " + "; ".join(f"{k} {told(v)}" for k, v in result["summary"].items()))


def one(name: str, asked: dict[str, Any], seed: int) -> dict[str, Any]:
    """One seed: the base network, the chain, a bare file beside the full one."""
    model = sources.load_weights(sources.network(asked["net"]), HERE / asked["weights"].format(seed=seed))
    if asked.get("channels_last"):  # trains faster on some networks, computes the same
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it so
    task = sources.task(asked["data"], batch_size=asked.get("batch_size", 128))
    out = HERE / "cache" / name / f"seed{seed}"
    with progress.showing(True):
        progress.say(f"{name}, seed {seed}")
    chain = [(method, options) for method, options in asked["chain"]]
    limits = {key: asked.get(key) for key in ("until", "guard")}
    result = compress(model, task, chain, out=out, seed=seed, resume=True, show=True, **limits)
    report = result.report
    bare = save(result.model, out / "bare.fw", bare=True, coder=report["coder"])
    before, after = report["original"], report["result"]
    return {
        "seed": seed,
        "original": before["metric"],
        "result": after["metric"],
        "drop_points": report["drop"]["points"],
        "paired_interval": report["drop"]["paired_interval"],
        "paired_test": report["drop"]["paired_test"],
        "bytes": after["bytes"],
        "bare_bytes": bare.bytes,
        "times_smaller": before["bytes"] / after["bytes"],
        "times_smaller_bare": before["bytes"] / bare.bytes,
        "macs": [before["macs"], after["macs"]],
        "macs_left": after["macs"] / before["macs"],
        "params": [before["params"], after["params"]],
        "nonzeros_left": after["nonzeros"] / before["params"],
        "latency": [row for row in report["latency"] if row["name"] == "result"],
        "latency_ratio": {
            f"{r['runtime']}, batch {r['batch']}": r["ratio"] for r in report["latency"] if r["name"] == "result"
        },
        "onnx": report["onnx"],
        "budget": report["budget"],
        "seconds": sum(stage["seconds"] for stage in report["stages"]),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and 95 % interval (Student's t over seeds) of the figures."""
    keys = ("original", "result", "drop_points", "bytes", "bare_bytes", "times_smaller_bare", "macs_left", "seconds")
    found = {key: mean([row[key] for row in rows]) for key in keys}
    ratios = rows[0]["latency_ratio"]
    return found | {f"latency, {where}": mean([row["latency_ratio"][where] for row in rows]) for where in ratios}


def mean(values: list[float]) -> dict[str, float | None]:
    """Mean and the half width of its 95 % interval; no interval for a single value."""
    n = len(values)
    centre = sum(values) / n
    if n == 1:
        return {"mean": centre, "half": None, "n": 1}
    deviation = math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1))
    return {"mean": centre, "half": STUDENT[min(n - 2, len(STUDENT) - 1)] * deviation / math.sqrt(n), "n": n}


def told(value: dict[str, Any]) -> str:
    half = "" if value["half"] is None else f" +- {value['half']:.3g}"
    return f"{value['mean']:.5g}{half}"


def commit() -> str:
    """The commit that the figures belong to, with a plus if files were changed since."""
    git = ["git", "-C", str(HERE)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    changed = subprocess.run(
        [*git, "status", "--porcelain", "../src"], capture_output=True, text=True, check=False
    ).stdout
    return head.strip() + ("+" if changed.strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names
    if not names:
        print(listing())
    try:
        for name in names:
            run(name)
    except FeatherweightError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
