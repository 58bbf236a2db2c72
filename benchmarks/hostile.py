"""Opens mutated .fw files by the hundred thousand, half of them with their checksums made right again.

    python benchmarks/hostile.py --cases 100000

Each file is opened in every way inside a worker process, under a watch of processor time and memory. It passes if it
gives a sound model or one sentence of ours, within 3 s and 500 MB. Anything else is a finding: the file is kept in
`runs/hostile/`, with its number (`--only NUMBER` opens it again). A run that was stopped goes on where it was. Figures
go to `results/hostile.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from featherweight.catalogue import entries  # noqa: E402
from hostile_seeds import Seed, seeds  # noqa: E402
from mutations import mutated, parts  # noqa: E402
from opening import opened, opened_tensor, status  # noqa: E402

PATIENCE = 60.0  # seconds of silence after which a worker is taken for lost
ROOM = 4 << 30  # bytes of address space that a worker may take beyond what it has at its start
CHUNK = 500


def case(number: int, seed: int, honest: tuple[Seed, ...]) -> tuple[Seed, str, bytes, np.random.Generator]:
    """The seed file, what is done to it and the damaged bytes; every second case has its checksums made right."""
    rng = np.random.default_rng([seed, number])
    chosen = honest[int(rng.integers(len(honest)))]
    what, data = mutated(chosen.data, rng, sign=number % 2 == 1, shapes=chosen.shapes)
    return chosen, what, data, rng


def tried(number: int, seed: int, honest: tuple[Seed, ...], path: Path, baseline: int) -> dict[str, Any]:
    """What came of one case, JSON-able."""
    chosen, what, data, rng = case(number, seed, honest)
    path.write_bytes(data)
    outcome = opened(path, chosen.fresh, baseline)
    if number % 2:
        records = parts(chosen.data)[1]
        tensor = opened_tensor(mutated(records[int(rng.integers(len(records)))], rng, sign=False)[1])
        outcome.wrong += tensor.wrong
        outcome.answers += tensor.answers
    return {
        "number": number,
        "seed": chosen.name,
        "what": what,
        "wrong": outcome.wrong,
        "answers": outcome.answers,
        "seconds": outcome.seconds,
        "grown": outcome.grown,
        "bytes": len(data),
    }


def work(pipe: Connection, seed: int, folder: Path) -> None:
    """A worker: opens the cases whose numbers it is sent."""
    torch.set_num_threads(1)
    path = folder / f"worker{os.getpid()}.fw"
    honest = seeds()
    entries()  # the rooms that define forms are imported once, not by the first file that names an unknown form
    for one in honest:
        path.write_bytes(one.data)
        outcome = opened(path, one.fresh)
        assert not outcome.wrong, (one.name, outcome.wrong)
    baseline = status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ROOM, resource.RLIM_INFINITY))
    pipe.send("ready")
    while (numbers := pipe.recv()) is not None:
        for number in range(*numbers):
            pipe.send(tried(number, seed, honest, path, baseline))
    path.unlink(missing_ok=True)
    path.with_suffix(".again").unlink(missing_ok=True)


class Workers:
    """One worker at a time; a new one when it was lost."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.process: Any = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.seed, self.folder), daemon=True)
        self.process.start()
        theirs.close()
        if not self.pipe.poll(300) or self.pipe.recv() != "ready":
            raise RuntimeError("a worker did not start")

    def run(self, start: int, stop: int) -> Any:
        """What came of each case from start to stop."""
        while start < stop:
            if self.process is None:
                self.start()
            self.pipe.send((start, stop))
            while start < stop:
                found = self._next(start)
                yield found
                start += 1
                if self.process is None:
                    break

    def stop(self) -> None:
        if self.process is not None:
            self.pipe.send(None)
            self.process.join()

    def _next(self, number: int) -> dict[str, Any]:
        try:
            if self.pipe.poll(PATIENCE):
                return self.pipe.recv()
            why = f"no answer in {PATIENCE:.0f} s"
        except EOFError:
            self.process.join()
            why = f"the process ended with {self.process.exitcode}"
        self.process.kill()
        self.process = None
        return {"number": number, "seed": "?", "what": "?", "wrong": [why], "answers": [], "seconds": 0, "grown": 0}


def fold(state: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds one case to the figures."""
    state["cases"] += 1
    state["signed"] += found["number"] % 2
    ways = dict.fromkeys(way for way, kind, _ in found["answers"] if kind == "ok")
    state["a model"] += "into" in ways or "alone" in ways
    for way, kind, _ in found["answers"]:
        state["answers"][f"{way}: {kind}"] = state["answers"].get(f"{way}: {kind}", 0) + 1
    state["mutations"][found["what"]] = state["mutations"].get(found["what"], 0) + 1
    state["slowest_seconds"] = max(state["slowest_seconds"], round(found["seconds"], 3))
    state["largest_growth_mb"] = max(state["largest_growth_mb"], found["grown"] >> 20)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--cases", type=int, default=100_000)
    options.add_argument("--start", type=int, default=0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", type=int, help="open this case alone, in this process, and say what came of it")
    options.add_argument("--out", type=Path, default=HERE / "results" / "hostile.json")
    options.add_argument("--findings", type=Path, default=HERE.parent / "runs" / "hostile")
    told = options.parse_args()
    told.findings.mkdir(parents=True, exist_ok=True)
    if told.only is not None:
        found = tried(told.only, told.seed, seeds(), told.findings / "only.fw", status("VmRSS"))
        print(json.dumps(found, indent=1, ensure_ascii=True))
        return
    os.nice(10)
    run(told)


def run(told: argparse.Namespace) -> None:
    zero = {"cases": 0, "signed": 0, "a model": 0, "findings": 0, "slowest_seconds": 0.0, "largest_growth_mb": 0}
    state: dict[str, Any] = {
        "seed": told.seed,
        "next": told.start,
        "seconds": 0.0,
        **zero,
        "answers": {},
        "mutations": {},
    }
    if told.out.exists():
        state = json.loads(told.out.read_text())
        if state["seed"] != told.seed or state["next"] < told.start:
            raise SystemExit(f"{told.out} is of another run: remove it, or pass another --out")
    workers, kinds = Workers(told.seed, told.findings), Counter()
    while state["next"] < told.start + told.cases:
        start, stop, clock = state["next"], min(state["next"] + CHUNK, told.start + told.cases), time.monotonic()
        for found in workers.run(start, stop):
            fold(state, found)
            if found["wrong"]:
                state["findings"] += 1
                kinds[found["wrong"][0]] += 1
                keep(found, told)
        state["next"], state["seconds"] = stop, round(state["seconds"] + time.monotonic() - clock, 1)
        state["files_per_second"] = round(state["cases"] / state["seconds"], 1)
        told.out.write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
        print(f"{stop} cases, {state['findings']} findings, {state['files_per_second']} files/s", flush=True)
    workers.stop()
    for kind, count in kinds.most_common():
        print(f"{count:6} {kind}")


def keep(found: dict[str, Any], told: argparse.Namespace) -> None:
    """A finding's file and what is known of it."""
    data = case(found["number"], told.seed, seeds())[2]
    (told.findings / f"{found['number']}.fw").write_bytes(data)
    (told.findings / f"{found['number']}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
