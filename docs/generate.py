"""Writes the generated pages: `methods.md` from the catalogue, `results.md` from the results of the benchmarks.

The tables in `pruning.md` and `quantization.md` come from the catalogue, results and a file of facts each, those in
`distillation.md` and `coding.md` from results.

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


def beside_nncodec() -> list[str]:
    """Our files beside NNCodec's at equal divergence; its integers with our coder."""
    found = json.loads((RESULTS / "nncodec_beside.json").read_text())
    rows = [
        [
            one["network"],
            f"{one['KL']:.4f}",
            f"{100 * one['accuracy']:.2f}",
            f"{one['bytes']:,}",
            "-" if one["ratio"] is None else f"{one['NNCodec at this KL']:,}",
            "-" if one["ratio"] is None else f"{one['ratio']:.3f}",
        ]
        for one in found["compared"]
    ]
    lines = table(["network", "mean KL", "accuracy, %", "our file", "NNCodec at this KL", "ours / its"], rows)
    names = list(dict.fromkeys(one["network"] for one in found["rows"]))
    other = [one for one in found["rows"] if one["who"] != "ours"]
    integers = [
        [one["integers, ours"] / one["integers, NNCodec"] for one in other if one["network"] == name] for name in names
    ]
    told = [[name, f"{min(each):.3f} .. {max(each):.3f}"] for name, each in zip(names, integers, strict=True) if each]
    lines += ["", *table(["network", "the integers that NNCodec coded: our bytes / its, over all settings"], told)]
    return lines


def coding(page: str) -> str:
    """The page about coding with its tables as they are now."""
    rows = json.loads((RESULTS / "smallest.json").read_text())["table"]
    return filled(
        page, {"nncodec": beside_nncodec(), "smallest": table(list(rows[0]), [list(row.values()) for row in rows])}
    )


def quantization(page: str) -> str:
    """The page about quantization with its tables as they are now."""
    rows = []
    for entry in (*entries(family="quantize").values(), *entries(family="share").values()):
        if entry.kind != "verb":
            needs, shrinks = (", ".join(sorted(found)) or "-" for found in (entry.needs, entry.shrinks))
            rows.append([f"`{entry.id}`", entry.family, entry.kind, needs, shrinks, measured(entry.id), entry.doc])
    head = ["id", "family", "kind", "needs", "makes smaller", "measured", "what it does"]
    parts = {
        "formats": formats(),
        "executors": executors(),
        "speed": speed(),
        "table": table(head, rows),
    }
    return filled(page, parts)


def told_gain(value: dict[str, Any] | None) -> str:
    """A paired difference in points with its 95 % interval, bold where that leaves 0 out."""
    if value is None:
        return "-"
    if value["half"] is None:
        return f"{value['mean']:+.2f}"
    text = f"{value['mean']:+.2f} ± {value['half']:.2f}"
    return f"**{text}**" if abs(value["mean"]) > value["half"] else text


def told_arm(arm: dict[str, Any]) -> str:
    """What an arm trains with."""
    options = {key: round(v, 9) if isinstance(v, float) else v for key, v in arm["options"].items()}
    text = f"`{arm['method']}`" if arm["method"] else "labels alone"
    text += f" `{json.dumps(options)}`" if options else ""
    for key, words in (("teachers", "{} teachers"), ("smoothing", "smoothed by {}"), ("times", "{} times the epochs")):
        plain = {"teachers": 1, "smoothing": 0.0, "times": 1.0}[key]
        text += "" if arm[key] == plain else ", " + words.format(arm[key])
    return text


def arms(found: dict[str, Any], against: list[str]) -> list[str]:
    """The arms of an experiment: what they came to, and what they brought over others, seed by seed."""
    rows = []
    for name, arm in found["experiment"]["arms"].items():
        one = found["summary"].get(name)
        failed = [row for row in found["rows"] if row["arm"] == name and "failed" in row]
        if one is not None:
            gains = [told_gain(one["over"].get(other)) for other in against]
            seconds = f"{one['processor_seconds']['mean']:.0f}"
            rows.append([name, told_arm(arm), one["result"]["n"], told(one["result"]), *gains, seconds])
        else:
            rows.append(
                [name, told_arm(arm), f"failed: {len(failed)}" if failed else "not run", *["-"] * (len(against) + 2)]
            )
    head = ["arm", "trained by", "seeds", f"{found['experiment']['told']}, %", *(f"over {one}" for one in against)]
    return table([*head, "processor's seconds a run"], rows)


def verdicts(found: dict[str, Any], baseline: str, names: list[str]) -> list[str]:
    """What the intervals say of the sign of each gain."""
    lines = []
    for name in names:
        gain = found["summary"].get(name, {}).get("over", {}).get(baseline)
        if gain is not None and gain["half"] is not None:
            low, high = gain["mean"] - gain["half"], gain["mean"] + gain["half"]
            said = "better, the sign is confirmed" if low > 0 else "worse" if high < 0 else "no effect shown"
            lines.append(
                f"- {name} over {baseline}: {gain['mean']:+.2f} points ({low:+.2f} to {high:+.2f}, "
                f"{gain['n']} seeds): {said}."
            )
    return lines


def sweep(found: dict[str, Any]) -> list[str]:
    """Temperature by weight, with and without t^2; the trained-alone student beside them."""
    results = {name: f"{one['result']['mean']:.2f}" for name, one in found["summary"].items()}
    columns = [(alpha, factor) for factor in ("t^2", "1") for alpha in (0.5, 0.9)]
    rows = []
    for t in (1, 2, 4, 20):
        cells = [results.get(f"t={t}, alpha={a}, {'t^2' if t == 1 else factor}", "-") for a, factor in columns]
        rows.append([t, *cells])
    head = [f"alpha {a}, {'with' if factor == 't^2' else 'without'} t^2" for a, factor in columns]
    return [*table(["t", *head], rows), "", f"The student alone: {results.get('alone', '-')}."]


def ratios(found: dict[str, Any]) -> list[str]:
    """Teacher and student side by side."""
    big, small = (found["networks"][key] for key in ("teacher", "student"))
    rows = [
        [name, f"{big[key]:,}", f"{small[key]:,}", f"{big[key] / small[key]:.2f}x", paper]
        for name, key, paper in (
            ("parameters", "params", "6.11x"),
            ("MACs of an image", "macs", "5.27x"),
            ("bytes of the bare file", "bytes", "-"),
        )
    ]
    for row in found["latency"]:
        if row["name"] == "result":
            rows.append([f"latency, {row['runtime']}, batch {row['batch']}", "-", "-", f"{1 / row['ratio']:.2f}x", "-"])
    accuracies = ", ".join(f"{100 * one['test']:.2f}" for one in big["accuracy"])
    lines = table(["", "teacher", "student", "ratio", "the thesis's"], rows)
    return [*lines, "", f"The three teachers have {accuracies} % on test, and saw all 55,000 labels."]


def told_size(count: int) -> str:
    """Bytes in a unit that leaves few digits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def bridges(found: dict[str, Any]) -> list[str]:
    """Weights of what joins two layers."""
    rows = []
    for one in found["rows"]:
        for name in ("fully connected", "1x1", "locality"):
            size = one["bytes"][name]
            rows.append([one["layers"], name, f"{one['weights'][name]:,}", told_size(size), f"{one['macs'][name]:.2e}"])
    return table(["layers", "joined by", "weights", "fp32", f"MACs of a batch of {found['batch']}"], rows)


def crossover(found: dict[str, Any]) -> list[str]:
    """Milliseconds of locality and of the fully connected hint."""
    widths = sorted({row["width"] for row in found["rows"]})
    rows = []
    for m in sorted({row["samples"] for row in found["rows"]}):
        here = {row["width"]: row for row in found["rows"] if row["samples"] == m}
        rows.append([m, *(f"{here[d]['locality']:.1f} / {here[d]['hint']:.1f}" for d in widths)])
    return table(["samples", *(f"width {d}" for d in widths)], rows)


def collapse(found: dict[str, Any]) -> list[str]:
    """Spread and rank of the features at the start of every epoch and at the end."""
    rows = []
    for row in found["rows"]:
        told_of_all = [f"{one['log10_variance']:.2f} / {one['effective_rank']:.1f}" for one in row["features"]]
        rows.append([row["arm"], *told_of_all, f"{100 * row['valid']:.1f}"])
    count = max(len(row["features"]) for row in found["rows"])
    return table(["trained on", *(f"after {epoch}" for epoch in range(count)), "valid, %"], rows)


def made_of(found: dict[str, dict[str, Any]]) -> list[str]:
    """The commits and versions behind the figures."""
    rows = [
        [name, f"`{one['commit']}`", one["environment"]["versions"]["torch"], f"`distillation_{name}.json`"]
        for name, one in found.items()
    ]
    return table(["experiment", "commit", "torch", "results"], rows)


def distillation(page: str) -> str:
    """The page about distillation with its tables as the results are now."""
    names = ("costs", "temperature", "trials", "thesis", "memory", "crossover", "graphs", "collapse")
    paths = {name: RESULTS / f"distillation_{name}.json" for name in names}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    makers = {
        "costs": ratios,
        "temperature": sweep,
        "trials": lambda one: arms(one, ["alone"]),
        "thesis": lambda one: arms(one, ["student alone", "label smoothing", "kd"]),
        "memory": bridges,
        "crossover": crossover,
        "graphs": lambda one: arms(one, ["student alone", "random", "kd"]),
        "collapse": collapse,
    }
    parts = {name: make(found[name]) if name in found else ["Not run."] for name, make in makers.items()}
    if "thesis" in found:
        methods_there = [name for name in found["thesis"]["experiment"]["arms"] if name != "student alone"]
        parts["verdicts"] = verdicts(found["thesis"], "student alone", methods_there)
        parts["verdicts"] += verdicts(
            found["thesis"], "kd", ["cross_layer_matrix, 0.1", "chou_full", "label smoothing"]
        )
    if "graphs" in found:
        graph = "teacher's neighbours"
        parts["neighbours"] = [
            *verdicts(found["graphs"], "student alone", [graph]),
            *(
                line
                for other in ("same label", "random", "student's own")
                for line in verdicts(found["graphs"], other, [graph])
            ),
            *verdicts(found["graphs"], "kd", [f"{graph} + kd"]),
        ]
    parts["versions"] = made_of(found)
    return filled(page, {name: parts.get(name, ["Not run."]) for name in MARKS})


def text(page: str) -> str:
    """The page about distillation with its section on text as the results are now."""
    path = RESULTS / "text_distillation.json"
    if not path.exists():
        return filled(page, {"text": ["Not run."]})
    found = json.loads(path.read_text())
    rows = []
    for student, way in dict.fromkeys((row["student"], row["learns from"]) for row in found["table"]):
        mine = [row for row in found["table"] if (row["student"], row["learns from"]) == (student, way)]
        values = [100 * row["test"] for row in mine]
        span = "-" if len(mine) > 1 else f"{100 * mine[0]['low']:.1f} to {100 * mine[0]['high']:.1f}"
        seconds = sum(row["seconds of the processor"] for row in mine) / len(mine)
        rows.append([student, way, len(mine), f"{sum(values) / len(values):.1f}", span, f"{seconds:.0f}"])
    head = ["student", "learns from", "seeds", "test, %", "95 % interval of one seed", "processor's seconds a run"]
    told_counts = ", ".join(f"{count:,} for {name}" for name, count in found["counts"].items())
    teacher = f"The teacher ({found['how']['teacher']}): {100 * found['teacher']['test']:.1f} %."
    lines = [f"Sentences: {told_counts}. {teacher}"]
    lines += ["", *table(head, rows)]
    if "sizes" in found:
        sizes = [
            [name, f"{count:,}", f"{time:.2f}", f"{ratio:.2f}x"]
            for name, count, time, ratio in (one.values() for one in found["sizes"])
        ]
        lines += ["", *table(["network", "parameters", "ms a sentence, batch 1", "of the teacher's"], sizes)]
    versions = f"commit `{found['commit']}`, torch {found['environment']['versions']['torch']}"
    return filled(page, {"text": [*lines, "", f"Made by {versions}: `text_distillation.json`."]})


MARKS = (
    "costs",
    "verdicts",
    "thesis",
    "temperature",
    "trials",
    "memory",
    "crossover",
    "neighbours",
    "graphs",
    "collapse",
    "versions",
)


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
    (HERE / "coding.md").write_text(coding((HERE / "coding.md").read_text()))
    (HERE / "quantization.md").write_text(quantization((HERE / "quantization.md").read_text()))
    (HERE / "distillation.md").write_text(text(distillation((HERE / "distillation.md").read_text())))
    (HERE / "methods.md").write_text(methods())
    (HERE / "results.md").write_text(results())
    (HERE / "recipes.md").write_text(recipes((HERE / "recipes.md").read_text()))
    (HERE / "recipe.schema.json").write_text(json.dumps(recipe_model.schema(), indent=1) + "\n")
