"""Writes the generated pages: `methods.md` from the catalogue, `results.md` from the results of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from featherweight.catalogue import entries

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"


def methods() -> str:
    """Every id with its facts and options."""
    lines = ["# Methods", "", "Generated from the catalogue by `make docs`.", ""]
    lines += ["| id | family | kind | needs | makes smaller | what it does | paper |", "|---|---|---|---|---|---|---|"]
    for entry in entries().values():
        row = entry.facts()
        facts = [", ".join(row[key]) or "-" for key in ("needs", "shrinks")]
        lines.append(
            f"| `{row['id']}` | {row['family']} | {row['kind']} | {facts[0]} | {facts[1]} | {row['summary']} | {row['paper']} |"
        )
    for entry in entries("method").values():
        lines += ["", f"## {entry.id}", "", "| option | default | meaning |", "|---|---|---|"]
        lines += [f"| `{o.name}` | `{o.default}` | {o.meaning} |" for o in entry.options()]
    return "\n".join(lines) + "\n"


def told(value: dict[str, Any], scale: float = 1.0, digits: int = 2) -> str:
    half = "" if value["half"] is None else f" ± {scale * value['half']:.{digits}f}"
    return f"{scale * value['mean']:.{digits}f}{half}"


def results() -> str:
    """One table over all experiments, then each with its seeds."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    chains = [one for one in found if "summary" in one]
    lines = [
        "# Results",
        "",
        "Generated from `benchmarks/results/*.json` by `make docs`; each figure was measured on the file itself.",
        "",
    ]
    lines += [
        "Metrics are accuracies in % on the test split, as mean ± 95 % interval over seeds; bytes are those of a bare file.",
        "",
    ]
    lines += [
        "| experiment | seeds | original | result | bare bytes | times smaller | MACs left | ONNX Runtime, batch 1 | batch 64 |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for one in chains:
        s = one["summary"]
        latency = [told(s[key]) + "x" if (key := f"latency, onnxruntime, batch {b}") in s else "-" for b in (1, 64)]
        lines.append(
            f"| {one['title']} | {s['result']['n']} | {told(s['original'], 100)} | {told(s['result'], 100)} | "
            f"{told(s['bare_bytes'], 1, 0)} | {told(s['times_smaller_bare'], 1, 1)}x | {told(s['macs_left'], 100, 1)} % | "
            f"{latency[0]} | {latency[1]} |"
        )
    for one in chains:
        lines += [
            "",
            f"## {one['title']}",
            "",
            f"Chain: `{json.dumps(one['asked']['chain'])}` on `{one['asked']['net']}`,",
        ]
        lines += [
            f"`{one['asked']['data']}`; commit {one['commit']}, torch {one['environment']['versions']['torch']}.",
            "",
        ]
        lines += [
            "| seed | original | result | drop, paired 95 % | bare bytes | file bytes | MACs left | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in one["rows"]:
            low, high = row["paired_interval"]
            lines.append(
                f"| {row['seed']} | {100 * row['original']:.2f} | {100 * row['result']:.2f} | {row['drop_points']:+.2f} "
                f"({low:+.2f} .. {high:+.2f}) | {row['bare_bytes']:,} | {row['bytes']:,} | {100 * row['macs_left']:.1f} % | {row['seconds']:.0f} |"
            )
    for one in found:
        if "table" in one:
            lines += ["", f"## {one['title']}", "", one.get("note", ""), "", "| " + " | ".join(one["table"][0]) + " |"]
            lines += ["|" + "---|" * len(one["table"][0])]
            lines += [
                "| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |"
                for row in one["table"]
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "methods.md").write_text(methods())
    (HERE / "results.md").write_text(results())
