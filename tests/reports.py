"""Reports for the tests of the page: made up but of the real shape, and what a figure on the page should be."""

from __future__ import annotations

import math
import random
from typing import Any


def synthetic(layers: int = 4, steps: int = 3, names: str = "stage{0}.block{1}.conv") -> dict[str, Any]:
    """A report as `compress` writes it, with so many layers and steps; the last step was rolled back."""
    dice = random.Random(layers)
    rows = [_layer(index, names.format(index // 8, index % 8), dice) for index in range(layers)]
    before = sum(row["original"]["params"] for row in rows)
    stages = [_stage(index, before, steps) for index in range(steps)]
    score = {"name": "accuracy", "n": 1000, "higher_is_better": True, "k": 900, "low": 0.88, "high": 0.92}
    return {
        "featherweight": "0.1.0",
        "source": {"sha256": "ab" * 32, "model": "Synthetic"},
        "chain": [[stage["method"], stage["options"]] for stage in stages],
        "seed": 7,
        "budget": {
            "until": ["size<=0.5x"],
            "guard": ["drop<=1pt"],
            "strict": False,
            "reached": True,
            "binds": [],
            "limits": [
                {
                    "text": "size<=0.5x",
                    "quantity": "size",
                    "guard": False,
                    "allowed": 2.0 * before,
                    "reached": before,
                    "holds": True,
                }
            ],
        },
        "accepted": steps - 2,
        "coder": None,
        "stages": stages,
        "split": "test",
        "valid": 0.9,
        "base": {"metric": 0.91, "metric_detail": score, "size": 4 * before, "params": before, "macs": 10 * before},
        "original": {
            "metric": 0.9,
            "metric_detail": score,
            "bytes": 4 * before,
            "params": before,
            "macs": 9,
            "nonzeros": 8,
        },
        "result": {
            "metric": 0.895,
            "metric_detail": score,
            "bytes": before,
            "params": before - 5,
            "macs": 7,
            "nonzeros": 3,
            "size": {
                "fp32": 4 * before,
                "packed": 2 * before,
                "entropy": before,
                "coded": before,
                "weights": 9,
                "structure": 2,
            },
        },
        "drop": {"points": 0.5, "paired_interval": [-0.2, 1.2], "paired_test": None},
        "onnx": {"written": False, "why": "not asked for"},
        "layers": rows,
        "layers_gone": [],
        "profile": {
            "result": {"how": "hooks", "threads": 1, "batch": 1, "runs": 9, "milliseconds": 3.5, "elsewhere": 0.1}
        },
        "sensitivity": {"how": "drop alone", "why": "", "tried": layers},
        "latency": [
            {
                "name": name,
                "runtime": "torch",
                "batch": 1,
                "threads": 1,
                "runs": 30,
                "median": ms,
                "p99": 2 * ms,
                "ratio": ms / 4,
            }
            for name, ms in (("original", 4.0), ("result", 3.0))
        ],
        "environment": {"python": "3.11", "cpus": 2, "versions": {"torch": "2.13.0"}},
        "seconds": 12.5,
        "remarks": ["a buffer is not kept"],
        "file": {"class_free": True, "largest_difference": 1e-7},
        "reproduce": {"recipe": {"model": "lenet5", "chain": [{"method": "int8"}]}, "needs": [], "why": ""},
    }


def _layer(index: int, path: str, dice: random.Random) -> dict[str, Any]:
    params = dice.randint(1_000, 2_000_000)
    kept = int(params * dice.random())
    lobe = [int(1e5 * math.exp(-(((i - 20) / 8) ** 2)) * dice.random()) for i in range(40)]
    shape = {"low": -0.3, "high": 0.3, "zeros": 0, "count": params}
    return {
        "path": path,
        "type": "Conv2d",
        "params": params,
        "nonzeros": kept,
        "macs": 50 * params,
        "fp32_bytes": 4 * params,
        "packed_bytes": params,
        "entropy_bytes": kept // 2,
        "coded_bytes": kept // 2 + 9,
        "original": {
            "params": params,
            "nonzeros": params,
            "macs": 50 * params,
            "fp32_bytes": 4 * params,
            "type": "Conv2d",
            "latency_share": 0.9 * dice.random(),
            "histogram": {**shape, "bins": lobe, "distinct": params},
        },
        "left_alone": None,
        "latency_share": dice.random(),
        "histogram": {**shape, "bins": [i % 3 * b for i, b in enumerate(lobe)], "zeros": params - kept, "distinct": 16},
        "sensitivity": dice.uniform(-0.5, 3),
    }


def _stage(index: int, params: int, steps: int) -> dict[str, Any]:
    undone = index == steps - 1
    return {
        "method": f"method_{index}",
        "options": {"rate": 0.5, "epochs": index},
        "seconds": 3.25,
        "metric": 0.9 - 0.01 * index,
        "metric_told": "",
        "metric_detail": {"name": "accuracy", "low": 0.88 - 0.01 * index, "high": 0.92 - 0.01 * index},
        "paired_interval": [-0.5, 1.5 + index],
        "drop": 0.25 + index,
        "size": int(4 * params / (index + 2)),
        "params": params,
        "nonzeros": params // (index + 1),
        "macs": 50 * params,
        "skipped": {f"stage{n}.norm": "a batch norm: this method works on convolutions" for n in range(9)},
        "notes": [f"note {n}" for n in range(15)],
        "rolled_back": undone,
        "tables": {"gradient_shares": [_shares(f"training {n} of step {index}") for n in range(2)]},
        **({"why": "drop is 2.25 pt, drop<=1pt was asked"} if undone else {}),
    }


def _shares(training: str) -> dict[str, Any]:
    points = [{"progress": n / 9, "shares": [0.9 - n / 15, 0.1 + n / 15, None if n < 3 else 0.0]} for n in range(9)]
    return {
        "training": training,
        "at": "head.weight",
        "terms": ["labels", "softened", "maps_of_the_last"],
        "points": points,
    }


def figure(report: Any, expression: str) -> float | None:
    """The value of a figure's source over a report: `PATH`, `PATH / PATH` or `1 - PATH / PATH`; None where absent."""
    if expression.startswith("1 - "):
        part = figure(report, expression[4:])
        return None if part is None else 1 - part
    above, _, below = expression.partition(" / ")
    values = [_at(report, path) for path in ([above, below] if below else [above])]
    if any(v is None or isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v) for v in values):
        return None
    if not below:
        return values[0]
    return values[0] / values[1] if values[1] else None


def _at(report: Any, path: str) -> Any:
    for key in path.split("."):
        try:
            report = report[int(key)] if isinstance(report, list) else report[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return report
