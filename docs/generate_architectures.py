"""Runs the gate of every architecture, a few in a process, and writes `architectures.md` from what it found.

`python docs/generate_architectures.py` goes on where it stopped; names as arguments are run anew; `--page` writes the
page alone, which `make docs` does too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from generate import table

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
RESULTS = HERE.parent / "benchmarks" / "results" / "architectures.json"
TOGETHER = 6  # architectures in one process: what they import takes longer than they do


def sections() -> dict[str, list[str]]:
    """The names of all architectures by the heading under which they stand."""
    sys.path.insert(0, str(TESTS))
    from architectures import OWN, REAL, VISION
    from architectures_text import LANGUAGE, PARTS

    return {
        "Images": list(VISION),
        "Text, sound, and both": list(LANGUAGE),
        "What networks are made of": [*OWN, *PARTS],
        "At real size": list(REAL),
    }


def measured(names: list[str]) -> dict[str, dict[str, Any]]:
    """What the gate finds for some architectures."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        script = [sys.executable, str(TESTS / "gate.py"), str(found), *names]
        done = subprocess.run(script, capture_output=True, text=True, check=False, env=os.environ, cwd=HERE.parent)
        if found.exists():
            return json.loads(found.read_text())
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return {name: {"failed": said} for name in names}


def run(asked: list[str]) -> None:
    """Measures what is asked for, or whatever is missing; results are written as soon as they are there."""
    from featherweight import outputs, provenance

    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"title": "Architectures", "found": {}}
    names = [name for part in sections().values() for name in part]
    missing = asked or [n for n in names if n not in result["found"]]
    for start in range(0, len(missing), TOGETHER):
        result["found"] |= measured(missing[start : start + TOGETHER])
        result["found"] = {n: result["found"][n] for n in names if n in result["found"]}
        outputs.write_json(RESULTS, {**result, "environment": provenance.environment()})


def failures(facts: dict[str, Any]) -> list[str]:
    """What the gate asks for and did not get."""
    asked = {
        facts.get("failed", ""): "failed" in facts,
        facts.get("onnx_failed", ""): "onnx_failed" in facts,
        f"{facts.get('prunable', 1):.1%} of the channels can be removed": not facts.get("prunable", 1) >= 0.95,
        f"removal is {facts.get('removal_error', 0):.1e} from masking": not facts.get("removal_error", 0) <= 1e-5,
        f"the file moves the outputs by {facts.get('moved', 0):.1e}": not facts.get("moved", 0) <= 1e-6,
        f"ONNX is {facts.get('onnx_difference', 0):.1e} away": not facts.get("onnx_difference", 0) <= 1e-3,
        "a training step does not lower the loss": not facts.get("loss_after", 0) < facts.get("loss_before", 1),
        f"attributes of {', '.join(facts.get('stale', ()))} are stale": bool(facts.get("stale")),
    }
    return [what for what, wrong in asked.items() if wrong]


def free(facts: dict[str, Any]) -> str:
    """Which sizes of the inputs are free once the wiring is data."""
    sizes = facts["free_sizes"]
    every = all(all(dims) or (len(dims) == 4 and dims == [True, False, True, True]) for dims in sizes)
    if every:
        return "all"
    return "batch" if all(dims[:1] == [True] and not any(dims[1:]) for dims in sizes) else "some"


def row(name: str, facts: dict[str, Any]) -> list[Any]:
    """The row of one architecture; what was not reached is a dash."""

    def told(key: str, form: str) -> str:
        return format(facts[key], form) if facts.get(key) is not None else "-"

    loss = f"{facts['loss_before']:.3g} to {facts['loss_after']:.3g}" if "loss_after" in facts else "-"
    cells = [told("outputs", ",d"), told("channels", ",d"), told("prunable", ".1%")]
    cells += [told("removal_error", ".0e"), told("moved", ".0e"), told("onnx_difference", ".0e"), loss]
    cells += [free(facts) if "free_sizes" in facts else "-"]
    return [
        name,
        "no" if failures(facts) else "yes",
        *cells,
        told("wiring_seconds", ".1f"),
        told("groups_seconds", ".1f"),
    ]


HEAD = [
    *("architecture", "passes", "layer outputs", "channels", "can be removed", "removal against masking"),
    *("file against network", "ONNX against network", "loss in one step", "free sizes", "wiring, s", "channels, s"),
]

INTRODUCTION = """# Architectures

Generated from `benchmarks/results/architectures.json` by `make docs`; measured by `docs/generate_architectures.py`.

Each network is made from a small configuration with random weights, and then

1. is written down as data (`wire`): layers at their names, calls between them, no class;
2. has its channels found, and three in ten of them removed at random; what is left is compared, in double precision,
   with the whole network whose channels are masked (norms take their statistics over the channels that stay);
3. is saved, and opened in a fresh process in which `transformers` cannot be imported: the outputs are compared;
4. is written as ONNX there and run in ONNX Runtime, at two batch sizes;
5. takes one training step there, after which the loss must be lower.

"Can be removed" is the share of all layer outputs that do not feed an output of the network: what stays is listed below
with the operator that holds it. Differences are relative to the largest output. Free sizes: *all* are the batch and the
sizes of images or sequences, *batch* is the batch alone. Seconds are processor time on one core.
"""


def page() -> str:
    """The page from what was found."""
    found = json.loads(RESULTS.read_text())["found"]
    lines = [INTRODUCTION]
    for heading, names in sections().items():
        rows = [row(name, found[name]) for name in names if name in found]
        if heading == "At real size":
            lines += [f"## {heading}", "", "Only wired, and their channels found.", ""]
            rows = [[r[0], f"{found[r[0]].get('parameters', 0):,}", *r[2:5], *r[9:]] for r in rows]
            lines += [*table(["architecture", "parameters", *HEAD[2:5], *HEAD[9:]], rows), ""]
        else:
            lines += [f"## {heading}", "", *table(HEAD, rows), ""]
    return "\n".join([*lines, *stays(found), *failed(found)])


def stays(found: dict[str, Any]) -> list[str]:
    """What cannot be removed, by the operator that holds it."""
    rows = [
        [name, layers, reason] for name, facts in found.items() for reason, layers in (facts.get("pins") or {}).items()
    ]
    text = "Outputs of the networks aside, these layers keep some or all of their channels:"
    return ["## What stays", "", text, "", *table(["architecture", "layers", "because of"], rows), ""] if rows else []


def failed(found: dict[str, Any]) -> list[str]:
    """What does not pass, and why."""
    rows = [[name, reason] for name, facts in found.items() for reason in failures(facts)]
    lines = ["## What does not pass", ""]
    return [*lines, *(table(["architecture", "reason"], rows) if rows else ["Nothing."]), ""]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if not given.page:
        run(given.names)
    (HERE / "architectures.md").write_text(page())


if __name__ == "__main__":
    main()
