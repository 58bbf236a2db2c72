"""Runs the gate of every architecture, each in a process of its own, and writes `architectures.md` from what was found.

`python docs/generate_architectures.py` goes on where it stopped; names as arguments run these anew; `--page` only writes
the page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
RESULTS = HERE.parent / "benchmarks" / "results" / "architectures.json"
SECONDS = 900  # that one architecture may take

sys.path.insert(0, str(TESTS))
from architectures import OWN, VISION
from architectures_text import TEXT
from generate import table
from real_sizes import REAL


def measured(name: str) -> dict[str, Any]:
    """What the gate finds for one architecture."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        script = [sys.executable, str(TESTS / "gate.py"), name, str(found)]
        try:
            done = subprocess.run(
                script, capture_output=True, text=True, check=False, env=os.environ, timeout=SECONDS, cwd=HERE.parent
            )
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        except subprocess.TimeoutExpired:
            said = f"not done after {SECONDS} s"
        facts = json.loads(found.read_text()) if found.exists() else {"failed": said}
    return {**facts, "seconds": time.perf_counter() - start}
