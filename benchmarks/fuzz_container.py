"""Fuzzes what opens .fw files, guided by the branches that each file reaches, with kernels interpreted.

    pip install atheris
    NUMBA_DISABLE_JIT=1 python benchmarks/fuzz_container.py --seconds 3600

Every file that reaches new branches of `featherweight.coding` and `featherweight.core` is kept in `runs/fuzz/corpus`
and mutated again, by structure and by bytes, its checksums made right. A file passes if it gives a sound model or one
sentence of ours. Anything else is a finding, kept in `runs/fuzz/findings`. Figures go to
`results/fuzz_container.json`. The fuzzer works in rounds, each a process of its own that starts from the corpus; one
that does not end by itself is a finding too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import atheris

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402 - not instrumented

with atheris.instrument_imports(include=["featherweight.coding", "featherweight.core"]):
    from featherweight.catalogue import entries
    from featherweight.coding import unpacking
    from featherweight.coding.container import assemble, save
    from featherweight.coding.manifest import unpack_manifest
    from hostile_seeds import seeds
    from mutations import mutated, parts
    from opening import opened

EVERY = 50  # files between two writings of the figures
ROUND = 600  # seconds of one process
FREE, PER_BYTE = 1 << 18, 16  # bytes that a file may describe here: interpreted loops are a hundred times slower
PATIENCE = 30.0  # seconds of the processor that an interpreted decoder may take: 15 times what a compiled one may


class Figures:
    """What the run has seen so far, written down now and then: the fuzzer ends the process by itself."""

    def __init__(self, out: Path, findings: Path) -> None:
        self.out, self.findings = out, findings
        self.start, self.files, self.slowest = time.monotonic(), 0, 0.0
        self.answers: Counter[str] = Counter()
        self.wrong: dict[str, str] = {}

    def add(self, data: bytes, outcome: Any) -> None:
        self.files += 1
        self.slowest = max(self.slowest, outcome.seconds)
        self.answers.update(f"{way}: {kind}" for way, kind, _ in outcome.answers)
        wrong = [w for w in outcome.wrong if not w.startswith("took")]
        if outcome.seconds > PATIENCE:
            wrong.append(f"took {outcome.seconds:.0f} s")
        for what in wrong:
            if what not in self.wrong:
                name = hashlib.sha256(data).hexdigest()[:16]
                (self.findings / f"{name}.fw").write_bytes(data)
                self.wrong[what] = name
        if self.files % EVERY == 0:
            self.write()

    def write(self) -> None:
        told = {
            "seconds": round(time.monotonic() - self.start, 1),
            "files": self.files,
            "slowest_seconds_interpreted": round(self.slowest, 2),
            "answers": dict(sorted(self.answers.items())),
            "findings": self.wrong,
        }
        self.out.write_text(json.dumps(told, indent=1) + "\n")


def graphs(folder: Path) -> list[bytes]:
    """Files that hold a network's graph, with context-adaptive code among their tensors."""
    from test_wired import Functional, Net, Recurrent

    words = torch.randint(0, 9, (2, 5))
    networks = [(Net(), torch.randn(2, 1, 12, 12)), (Functional(), torch.randn(3, 4))]
    networks += [(Recurrent(torch.nn.LSTM, batch_first=True), words)]
    made = []
    for number, (network, inputs) in enumerate(networks):
        path = folder / f"graph{number}.fw"
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_((parameter * 8).round() / 8)
        save(network.eval(), path, example_inputs=inputs, coder=None if number else "deepcabac")
        made.append(path.read_bytes())
        path.unlink()
    return made


def outline(data: bytes) -> str:
    """What tells to which network a file belongs: the first name in it, or how many records it has."""
    try:
        manifest, records, bare = parts(data)
        return str(len(records)) if bare else str(unpack_manifest(manifest)["names"][0])
    except Exception:  # too damaged: it fits any
        return ""


def signed_anew(data: bytes) -> bytes:
    """The file with checksums that hold, if its lengths still make sense."""
    try:
        manifest, records, bare = parts(data)
        return assemble(manifest, list(records), bare)
    except Exception:  # it can no longer be taken apart: then its checksums are wrong too
        return data


def rounds(told: argparse.Namespace) -> None:
    """Runs one process after the other until the time is over, and adds up what they saw."""
    total: dict[str, Any] = {"asked_seconds": told.seconds, "seconds": 0.0, "rounds": 0, "files": 0, "corpus": 0}
    total |= {"slowest_seconds_interpreted": 0.0, "answers": {}, "findings": {}}
    start = time.monotonic()
    while (left := told.seconds - (time.monotonic() - start)) > 5:
        out = told.folder / f"round{total['rounds']}.json"
        command = [sys.executable, __file__, "--round", "--seconds", str(int(min(left, ROUND))), "--out", str(out)]
        command += ["--seed", str(told.seed + total["rounds"]), "--folder", str(told.folder)]
        with (told.folder / f"round{total['rounds']}.log").open("w") as log:
            ended = subprocess.run(command, stdout=log, stderr=log, cwd=told.folder, check=False).returncode
        seen = json.loads(out.read_text()) if out.exists() else {"files": 0, "answers": {}, "findings": {}}
        if ended:
            total["findings"][f"round {total['rounds']} ended with {ended}"] = out.with_suffix(".log").name
        for key, count in seen["answers"].items():
            total["answers"][key] = total["answers"].get(key, 0) + count
        total["findings"] |= seen["findings"]
        total["files"] += seen["files"]
        slowest = max(total["slowest_seconds_interpreted"], seen.get("slowest_seconds_interpreted", 0.0))
        corpus = len(list((told.folder / "corpus").iterdir()))
        total |= {"slowest_seconds_interpreted": slowest, "corpus": corpus, "rounds": total["rounds"] + 1}
        total["seconds"] = round(time.monotonic() - start, 1)
        told.out.write_text(json.dumps(total, indent=1) + "\n")
        print(f"{total['seconds']} s, {total['files']} files, {len(total['findings'])} findings", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seconds", type=int, default=3600)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "fuzz")
    options.add_argument("--out", type=Path, default=HERE / "results" / "fuzz_container.json")
    options.add_argument("--round", action="store_true", help="one round, in this process")
    told = options.parse_args()
    told.folder, told.out = told.folder.absolute(), told.out.absolute()
    for folder in (told.folder / "corpus", told.folder / "findings"):
        folder.mkdir(parents=True, exist_ok=True)
    if told.round:
        fuzz(told)
    else:
        rounds(told)


def fuzz(told: argparse.Namespace) -> None:
    """One round. The fuzzer ends the process."""
    corpus, findings = told.folder / "corpus", told.folder / "findings"
    unpacking.FREE, unpacking.PER_BYTE = FREE, PER_BYTE
    honest = seeds()
    for data in [one.data for one in honest] + graphs(told.folder):
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    entries()
    figures = Figures(told.out, findings)
    path = told.folder / f"now{os.getpid()}.fw"
    makers = [one.fresh for one in honest]
    fitting = {outline(one.data): one.fresh for one in honest}

    def open_it(data: bytes) -> None:
        path.write_bytes(data)
        figures.add(data, opened(path, fitting.get(outline(data), makers[len(data) % len(makers)])))

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        found = data
        if rng.integers(2):
            try:
                found = mutated(data, rng, sign=True)[1]
            except Exception:  # this file is too damaged to be taken apart: bytes it is
                found = data
        if found == data:
            found = signed_anew(atheris.Mutate(data, most))
        return found[:most]

    flags = [f"-max_total_time={told.seconds}", f"-seed={told.seed}", "-max_len=65536", "-timeout=300"]
    atheris.Setup(
        [sys.argv[0], *flags, "-rss_limit_mb=3000", "-print_final_stats=1", str(corpus)], open_it, custom_mutator=mutate
    )
    os.nice(5)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
