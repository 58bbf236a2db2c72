"""Which criteria beat chance: `python benchmarks/criteria.py [--only NAME ...] [--ratios 0.3 0.5 0.7]`.

Every structured criterion removes 30, 50 and 70 % of the channels of every layer of the workhorse (ResNet-20 at
8-16-32 on Fashion-MNIST) at once, so that all leave a network of the same widths. It is measured as it is, then
trained on 20,000 images (SGD with Nesterov momentum, learning rate 0.01 along a cosine, seed 0) and measured again.
Nothing is chosen: the settings are the same for all. Random pruning is the control, with eight seeds; a criterion
beats chance where it is above all of them ("+" in the table, "-" below all, "=" among them). `zeros` scores no layers
that end in a residual sum; its control is random pruning of the same layers.

One row for each criterion and ratio is written as soon as it is there, and a run that was stopped goes on with the
rows that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from featherweight import FeatherweightError, outputs, provenance, sources
from featherweight.catalogue import entry
from featherweight.core.cost import cost
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.prune import prune

HERE = Path(__file__).parent
OUT = HERE / "results" / "criteria.json"
WEIGHTS = HERE / "base" / "resnet20_half_fashion_mnist.safetensors"
TITLE = "Structured criteria on the workhorse: accuracy at equal widths, before and after 20,000 images of training"
IMAGES, LR, BATCH = 20_000, 0.01, 128
RATIOS = (0.3, 0.5, 0.7)
CONTROLS = tuple(f"random, seed {seed}" for seed in range(8))
INNER = tuple(f"random inside blocks, seed {seed}" for seed in range(4))  # for what scores no residual sums
INSIDE = {"zeros"}
SCORES = (
    *("filter_norm", "filter_norm_l2", "consumer_norm", "geometric_median", "zeros", "entropy", "discrimination"),
    *("propagation", "taylor_activation", "taylor_squared", "fisher", "loss_change"),
)
SETTINGS: dict[str, dict[str, Any]] = {  # what a score's own method says that is no matter of training
    "zeros": {},
    "entropy": {"order": "forward"},
    "discrimination": {"order": "backward", "normalise": "max"},
    "taylor_activation": {"normalise": "l2"},
    "taylor_squared": {"coupled": "mean"},
    "loss_change": {"coupled": "max"},
}
RECIPES: dict[str, dict[str, Any]] = {  # methods with a flow of their own, without their training
    "thinet": {"finetune": 0, "epochs": 0},
    "lasso_channel": {"finetune": 0},
    "random_masks": {"finetune": 0, "trials": 50, "calibration_batches": 2},
}
Remove = Callable[[nn.Module, Task, float], nn.Module]


def by_score(name: str, **options: Any) -> Remove:
    """One-shot pruning by a score, the same ratio in every layer."""
    settings = {**SETTINGS.get(name, {}), **options}

    def remove(model: nn.Module, task: Task, ratio: float) -> nn.Module:
        return prune(model, task, score=name, grain="filter", scope="layer", prune_ratio=ratio, rounds=1,
                     schedule="constant", epochs=0, finetune=0, round_to=1, **settings)  # fmt: skip

    return remove


def by_recipe(name: str) -> Remove:
    known = {option.name for option in entry(name).options()}
    options = {key: value for key, value in {**RECIPES[name], "round_to": 1}.items() if key in known}
    return lambda model, task, ratio: entry(name)(model, task, prune_ratio=ratio, **options)


def removal(name: str) -> Remove:
    if name in CONTROLS:
        return by_score("random")
    if name in INNER:
        return by_score("random", where="stages.*.conv1")
    return by_recipe(name) if name in RECIPES else by_score(name)


def one(name: str, ratio: float) -> dict[str, Any]:
    """Removes, measures, trains, measures."""
    model = sources.load_weights(sources.network("resnet20_half"), WEIGHTS)
    task = sources.task("fashion_mnist", batch_size=BATCH)
    torch.manual_seed(int(name.rsplit(maxsplit=1)[-1]) if name in (*CONTROLS, *INNER) else 0)
    started = time.perf_counter()
    with recording() as ledger:
        model = removal(name)(model, task, ratio)
    seconds = time.perf_counter() - started
    before = {part: evaluate(model, task, part).value for part in ("valid", "test")}
    torch.manual_seed(0)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it so
    task.fit(model, task, epochs=IMAGES / 55_000, lr=LR, optimizer="sgd", label=f"{name} {ratio}")
    after = {part: evaluate(model, task, part).value for part in ("valid", "test")}
    costs = cost(model, task.inputs())
    return {
        "criterion": name,
        "ratio": ratio,
        **{f"{part} before": value for part, value in before.items()},
        **{f"{part} after": value for part, value in after.items()},
        "macs": costs.macs,
        "params": costs.params,
        "seconds": round(seconds, 1),
        "skipped": ledger.skipped,
    }


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each criterion: test accuracies in %, and whether it beats all random prunings of the same widths."""
    names = dict.fromkeys(row["criterion"] for row in rows if row["criterion"] not in (*CONTROLS, *INNER))
    lines = [control(rows, "random", CONTROLS), control(rows, "random inside blocks", INNER)]
    for name in names:
        line: dict[str, Any] = {"criterion": name}
        for ratio in RATIOS:
            for when in ("before", "after"):
                line[f"{ratio:.0%} {when}"] = cell(rows, name, ratio, when)
        lines.append(line)
    return lines


def of(rows: list[dict[str, Any]], name: str, ratio: float) -> dict[str, Any] | None:
    return next((row for row in rows if row["criterion"] == name and row["ratio"] == ratio), None)


def chance(rows: list[dict[str, Any]], names: tuple[str, ...], ratio: float, when: str) -> list[float]:
    found = [of(rows, name, ratio) for name in names]
    return [100 * row[f"test {when}"] for row in found if row is not None]


def cell(rows: list[dict[str, Any]], name: str, ratio: float, when: str) -> str:
    row = of(rows, name, ratio)
    if row is None:
        return "-"
    if "refused" in row:
        return "refused"
    names = INNER if name in INSIDE else CONTROLS
    value, controls = 100 * row[f"test {when}"], chance(rows, names, ratio, when)
    if not controls:
        return f"{value:.2f}"
    if any(found["macs"] != row["macs"] for found in (of(rows, c, ratio) for c in names) if found is not None):
        return f"{value:.2f} (other widths)"
    return f"{value:.2f} " + ("+" if value > max(controls) else "-" if value < min(controls) else "=")


def control(rows: list[dict[str, Any]], told: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The mean of the controls with their range."""
    line: dict[str, Any] = {"criterion": told}
    for ratio in RATIOS:
        for when in ("before", "after"):
            found = chance(rows, names, ratio, when)
            mean = sum(found) / len(found) if found else 0.0
            line[f"{ratio:.0%} {when}"] = f"{mean:.2f} ({min(found):.2f} .. {max(found):.2f})" if found else "-"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="criteria to run; all when left out")
    parser.add_argument("--ratios", nargs="*", type=float, default=RATIOS)
    asked = parser.parse_args()
    os.environ.setdefault("FEATHERWEIGHT_DATA", str(HERE.parent / "data"))
    result = json.loads(OUT.read_text()) if OUT.exists() else {"title": TITLE, "rows": []}
    names = asked.only or [CONTROLS[0], CONTROLS[1], *SCORES, *RECIPES, *CONTROLS[2:], *INNER]
    for ratio in asked.ratios:
        for name in names:
            if of(result["rows"], name, ratio) is not None:
                continue
            try:
                row = one(name, ratio)
            except FeatherweightError as error:
                row = {"criterion": name, "ratio": ratio, "refused": str(error)}
            result["rows"].append(row)
            result |= {"table": table(result["rows"]), "environment": provenance.environment()}
            outputs.write_json(OUT, result)
            print({key: value for key, value in row.items() if key != "skipped"}, flush=True)


if __name__ == "__main__":
    main()
