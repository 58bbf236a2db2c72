"""Writes the generated pages: `methods.md` from the catalogue, `results.md` from the results of the benchmarks.

The tables in `pruning.md` and `quantization.md` come from the catalogue, results and a file of facts each.

Also the keys and the example in `recipes.md`, and the JSON schema of recipes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from featherweight import allowed, recipe_model
from featherweight.catalogue import Option, entries

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]


def told_of(option: Option) -> str:
    """What an option may be, in words."""
    return allowed.told(allowed.schema(option.hint))


def recipes(page: str) -> str:
    """The page about recipes with its keys and its example as they are now."""
    rows = []
    for key, field in recipe_model.Recipe.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        rows.append([f"`{key}`", default, field.description])
    example = (HERE.parent / "examples" / "lenet5.yaml").read_text()
    parts = {"keys": "\n".join(table(["key", "default", "meaning"], rows)), "example": f"```yaml\n{example}```"}
    for name, text in parts.items():
        before, rest = page.split(f"<!-- {name} -->")
        page = f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->" + rest.split(f"<!-- /{name} -->")[1]
    return page


def methods() -> str:
    """Every id with its facts and options."""
    lines = ["# Methods", "", "Generated from the catalogue by `make docs`.", ""]
    rows = []
    for row in (entry.facts() for entry in entries().values()):
        needs, shrinks = (", ".join(row[key]) or "-" for key in ("needs", "shrinks"))
        rows.append([f"`{row['id']}`", row["family"], row["kind"], needs, shrinks, row["summary"], row["paper"]])
    lines += table(["id", "family", "kind", "needs", "makes smaller", "what it does", "paper"], rows)
    for entry in entries("method").values():
        options = [[f"`{o.name}`", f"`{o.default}`", told_of(o), o.meaning] for o in entry.options()]
        lines += ["", f"## {entry.id}", "", *table(["option", "default", "allowed", "meaning"], options)]
    return "\n".join(lines) + "\n"


def told(value: dict[str, Any], scale: float = 1.0, digits: int = 2) -> str:
    """A mean with half the width of its 95 % interval."""
    half = "" if value["half"] is None else f" ± {scale * value['half']:.{digits}f}"
    return f"{scale * value['mean']:.{digits}f}{half}"


def overview(one: dict[str, Any]) -> list[Any]:
    """The row of one experiment."""
    s = one["summary"]
    latency = [told(s[key]) + "x" if (key := f"latency, onnxruntime, batch {b}") in s else "-" for b in (1, 64)]
    accuracies = [told(s[key], 100) for key in ("original", "result")]
    sizes = [told(s["bare_bytes"], 1, 0), told(s["times_smaller_bare"], 1, 1) + "x"]
    return [one["title"], s["result"]["n"], *accuracies, *sizes, told(s["macs_left"], 100, 1) + " %", *latency]


def seed_row(row: dict[str, Any]) -> list[Any]:
    """The row of one seed."""
    low, high = row["paired_interval"]
    drop = f"{row['drop_points']:+.2f} ({low:+.2f} .. {high:+.2f})"
    accuracies = [f"{100 * row[key]:.2f}" for key in ("original", "result")]
    sizes = [f"{row[key]:,}" for key in ("bare_bytes", "bytes")]
    return [row["seed"], *accuracies, drop, *sizes, f"{100 * row['macs_left']:.1f} %", f"{row['seconds']:.0f}"]


def results() -> str:
    """One table over all experiments, then each with its seeds, then the comparisons."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    chains = [one for one in found if "asked" in one]
    lines = ["# Results", "", "Generated from `benchmarks/results/*.json` by `make docs`."]
    lines += [
        "Accuracies are in % on the test split, as mean ± 95 % interval over seeds; bytes are those of a bare file"
    ]
    lines += ["that was read back and evaluated; latencies are ratios to the original in one interleaved run.", ""]
    head = ["experiment", "seeds", "original", "result", "bare bytes", "times smaller", "MACs left"]
    lines += table([*head, "ONNX Runtime, batch 1", "batch 64"], [overview(one) for one in chains])
    for one in chains:
        versions = f"commit {one['commit']}, torch {one['environment']['versions']['torch']}"
        lines += ["", f"## {one['title']}", "", f"`{json.dumps(one['asked']['chain'])}`", ""]
        lines += [f"On `{one['asked']['net']}`, `{one['asked']['data']}`; {versions}.", ""]
        head = ["seed", "original", "result", "drop in points, paired 95 %", "bare bytes", "file bytes", "MACs left"]
        lines += table([*head, "seconds"], [seed_row(row) for row in one["rows"]])
    for one in found:
        if "table" in one:
            rows = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in one["table"]]
            lines += ["", f"## {one['title']}", "", *table(list(one["table"][0]), rows)]
    return "\n".join(lines) + "\n"


def pruning(page: str) -> str:
    """The page about pruning with its table of ids as they are now."""
    facts = json.loads((HERE / "pruning_facts.json").read_text())
    rows = []
    for entry in entries(family="prune").values():
        if entry.kind != "verb":
            needs, shrinks = (", ".join(sorted(found)) or "-" for found in (entry.needs, entry.shrinks))
            rows.append([f"`{entry.id}`", *facts[entry.id], needs, shrinks, measured(entry.id), entry.doc])
    text = "\n".join(table(["id", "grain", "when", "needs", "makes smaller", "measured", "what it does"], rows))
    before, rest = page.split("<!-- table -->")
    return f"{before}<!-- table -->\n{text}\n<!-- /table -->" + rest.split("<!-- /table -->")[1]


def filled(page: str, parts: dict[str, list[str]]) -> str:
    """A page with what stands between its marks put in anew."""
    for name, lines in parts.items():
        before, rest = page.split(f"<!-- {name} -->")
        text = "\n".join(lines)
        page = f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->" + rest.split(f"<!-- /{name} -->")[1]
    return page


def formats() -> list[str]:
    """Every number format with its bits and errors on random weights, and what executes it."""
    facts = json.loads((HERE / "quantization_facts.json").read_text())
    found = json.loads((RESULTS / "rate_distortion.json").read_text())["formats"]
    rows = []
    for normal, other in zip(found[::2], found[1::2], strict=True):
        what, runs = facts[normal["format"].partition(", ")[0]]
        figures = [f"{one[key]:.3g}" for one in (normal, other) for key in ("coded bits", "error", "above")]
        rows.append([normal["format"], what, f"{normal['fixed bits']:.2f}", *figures, runs])
    head = [
        "format, bits",
        "what it is",
        "fixed",
        "coded, normal",
        "error",
        "above",
        "coded, Laplacian",
        "error",
        "above",
    ]
    return table([*head, "what executes it"], rows)


def executors() -> list[str]:
    """What `accelerate` puts in."""
    rows = [[f"`{one.id}`", one.doc, one.paper] for one in entries("executor").values()]
    return table(["executor", "takes", "paper"], rows)


def speed() -> list[str]:
    """Layers of signs: the columns that matter."""
    keys = ["layer", "threads", "ms, float", "ms, packed", "float / packed", "float / packed, processor's time"]
    keys += ["float / packed, fastest rounds", "naive loop, one thread / packed", "of the popcount limit"]
    rows = json.loads((RESULTS / "xnor_speed.json").read_text())["table"]
    return table(keys, [[f"{row[k]:.3g}" if isinstance(row[k], float) else row[k] for k in keys] for row in rows])


def quantization(page: str) -> str:
    """The page about quantization with its tables as they are now."""
    rows = []
    for entry in (*entries(family="quantize").values(), *entries(family="share").values()):
        if entry.kind != "verb":
            needs, shrinks = (", ".join(sorted(found)) or "-" for found in (entry.needs, entry.shrinks))
            rows.append([f"`{entry.id}`", entry.family, entry.kind, needs, shrinks, measured(entry.id), entry.doc])
    head = ["id", "family", "kind", "needs", "makes smaller", "measured", "what it does"]
    parts = {"formats": formats(), "executors": executors(), "speed": speed(), "table": table(head, rows)}
    return filled(page, parts)


def measured(name: str) -> str:
    """What experiments that start with this method came to."""
    told_of_all = []
    for path in sorted(RESULTS.glob("*.json")):
        one = json.loads(path.read_text())
        if "asked" in one and one["asked"]["chain"][0][0] == name:
            s = one["summary"]
            kept = sum(row["nonzeros_left"] for row in one["rows"]) / len(one["rows"])
            macs = s["macs_left"]["mean"]
            left = f"{macs:.0%} of the MACs" if macs < 1 else f"{kept:.1%} of the weights"
            before, after = (f"{100 * s[key]['mean']:.2f}" for key in ("original", "result"))
            seeds = s["result"]["n"]
            told_of_all.append(
                f"{one['asked']['net']}: {before} -> {after} % with {left} ({seeds} seed{'s' * (seeds > 1)})"
            )
    return "; ".join(told_of_all) or "-"


if __name__ == "__main__":
    (HERE / "pruning.md").write_text(pruning((HERE / "pruning.md").read_text()))
    (HERE / "quantization.md").write_text(quantization((HERE / "quantization.md").read_text()))
    (HERE / "methods.md").write_text(methods())
    (HERE / "results.md").write_text(results())
    (HERE / "recipes.md").write_text(recipes((HERE / "recipes.md").read_text()))
    (HERE / "recipe.schema.json").write_text(json.dumps(recipe_model.schema(), indent=1) + "\n")
