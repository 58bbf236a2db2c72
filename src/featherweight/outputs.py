"""The files of a result: a folder that can be written, whole files only, and never those of two runs together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from featherweight.errors import BadData

FRESH = ".tmp-new"  # where the files of a result stand until all of them are whole


def prepare(out: Path) -> Path:
    """Makes the output folder, finds out now whether it can be written, and returns it.

    Raises:
        BadData: it cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(".tmp-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        probe = out / ".tmp-probe"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
        return out
    except OSError as error:
        raise BadData(f"the output folder {out} cannot be written ({error.strerror}): choose another") from None


def write_json(path: Path, data: Any) -> None:
    """Writes JSON through a temporary file, so that a reader never sees half of it."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_text(json.dumps(data, indent=1, default=float) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise BadData(
            f"{path} cannot be written ({error.strerror}): free some space or choose another folder"
        ) from None


def take_over(fresh: Path, folder: Path) -> None:
    """Puts the whole files of a result in the place of an earlier one's; the report, which names them, comes last."""
    for name in ("model.fw", "model.onnx", "report.html", "report.json"):
        if (fresh / name).exists():
            (fresh / name).replace(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    fresh.rmdir()
