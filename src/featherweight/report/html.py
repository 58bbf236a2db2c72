"""Reports as pages: one file with its style and script inside, that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import BadData
from featherweight.report import beside, chain, drawing, facts, layers
from featherweight.report.source import Source

if TYPE_CHECKING:
    from jinja2 import Environment

SHOWN = 24  # histograms, and trainings with their gradient shares, that are shown before the rest is folded away


def page(report: Mapping[str, Any]) -> str:
    """The page of one run, as HTML.

    Args:
        report: `Result.report`, or a report.json that was read; entries that it lacks are told as not measured.
    """
    return _environment().get_template("page.html").render(run=_run(Source(report)))


def comparison(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str] = ("A", "B")) -> str:
    """A page that shows two runs side by side, as HTML.

    Args:
        names: what the runs are called, such as their folders.
    """
    sources = Source(first, "a."), Source(second, "b.")
    return (
        _environment()
        .get_template("comparison.html")
        .render(
            runs=[_run(source) for source in sources],
            names=names,
            quantities=beside.quantities(Source({"a": first, "b": second}), sources),
            layers=beside.joined(sources),
            columns=beside.SHARED,
            differences=beside.differences(sources),
        )
    )


def _run(source: Source) -> dict[str, Any]:
    """Everything that the templates say about one run."""
    stages = chain.ledger(source)
    return {
        "version": source.text("featherweight"),
        "verdict": chain.verdict(source),
        "stages": stages,
        "charts": chain.charts(source, stages),
        "layers": layers.layers(source),
        "columns": layers.COLUMNS,
        "gone": layers.gone(source),
        "histograms": layers.weights(source),
        "scans": layers.scans(source),
        "learned": layers.learned(source),
        "reasons": layers.reasons(source),
        "profile": facts.profile(source),
        "sensitivity": (source.text("sensitivity.how"), source.text("sensitivity.why")),
        "sizes": facts.sizes(source),
        "timings": facts.timings(source),
        "onnx": facts.onnx(source),
        "file": facts.file(source),
        "remarks": [str(remark) for remark in source.items("remarks")],
        "again": facts.again(source),
        "missing": facts.missing(source),
    }


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    held = files("featherweight.report") / "templates"
    style, script = (held.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    made = Environment(
        loader=PackageLoader("featherweight.report"),
        autoescape=True,  # names, notes and options come from a run: they are text and nothing else
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals |= {
        "style": Markup(style),
        "script": Markup(script),
        "script_digest": digest,  # the page runs this script and no other
        "chart": drawing,
        "shown": SHOWN,
    }
    return made


def write(text: str, path: str | os.PathLike[str]) -> Path:
    """Writes a page through a temporary file and returns its path.

    Raises:
        BadData: it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise BadData(f"{path} cannot be written ({error.strerror}): choose another place") from None
    return path
