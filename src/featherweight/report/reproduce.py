"""How to get a result again: the recipe, the command or the call that a report stands for."""

from __future__ import annotations

import shlex
from typing import Any

from featherweight import recipe_text
from featherweight.report.source import Source

FOLDER = "runs/again"


def recipe(source: Source) -> str:
    """The recipe of the run as YAML; empty where there is none."""
    held = source.mapping("reproduce.recipe")
    return recipe_text.dump(held) if held else ""


def start(source: Source) -> str:
    """What carries the recipe out: a command, or a call where the recipe leaves Python objects to the reader."""
    needs = [str(name) for name in source.items("reproduce.needs")]
    if not needs:
        return f"featherweight run recipe.yaml --out {FOLDER}"
    given = "".join(f", {name}={name}" for name in needs)
    return f'import featherweight as fw\n\nfw.run("recipe.yaml"{given}, out="{FOLDER}")'


def command(source: Source) -> str:
    """The shell command of an earlier version's run that was started from the command line; empty for any other."""
    asked = source.mapping("command")
    if not asked:
        return ""
    parts = [f"featherweight compress {_quoted(asked.get('network'))} --data {_quoted(asked.get('data'))}"]
    for option in ("weights", "student", "batch_size", "train"):
        if asked.get(option) is not None:
            parts.append(f"--{option.replace('_', '-')} {_quoted(asked[option])}")
    parts += [f"--method {_quoted(_method(name, options))}" for name, options in steps(source)]
    for option in ("until", "guard"):
        texts = source.items(f"budget.{option}")
        if texts:
            parts.append(f"--{option} {_quoted(', '.join(map(str, texts)))}")
    if source.at("budget.strict") is True:
        parts.append("--strict")
    parts.append(f"--seed {_quoted(source.at('seed'))} --out {FOLDER}")
    return " \\\n    ".join(parts)


def call(source: Source) -> str:
    """The call in Python, with the model and the task left to the reader."""
    lines = [f"    ({name!r}, {dict(options)!r})," for name, options in steps(source)]
    text = ["fw.compress(", "    model, task,", "    [", *(f"    {line}" for line in lines), "    ],"]
    for option in ("until", "guard"):
        texts = source.items(f"budget.{option}")
        if texts:
            text.append(f"    {option}={', '.join(map(str, texts))!r},")
    if source.at("budget.strict") is True:
        text.append("    strict=True,")
    return "\n".join([*text, f"    seed={source.at('seed')!r},", f"    out={FOLDER!r},", ")"])


def steps(source: Source) -> list[tuple[str, dict[str, Any]]]:
    """The chain as it was asked for: ids and options."""
    found = []
    for path in source.rows("chain"):
        name, options = source.text(f"{path}.0"), source.mapping(f"{path}.1")
        found.append((name, {str(key): value for key, value in options.items()}))
    return found


def _method(name: str, options: dict[str, Any]) -> str:
    return f"{name}:{told(options, ',')}" if options else name


def told(options: Any, between: str = " ") -> str:
    """Options as `name=value`.

    >>> told({"sparsity": 0.9, "epochs": 3})
    'sparsity=0.9 epochs=3'
    """
    return between.join(f"{key}={value}" for key, value in options.items())


def _quoted(value: Any) -> str:
    return shlex.quote(str(value))
