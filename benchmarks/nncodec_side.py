"""The other side of `nncodec_beside.py`: NNCodec in a Python of its own.

`PYTHON nncodec_side.py PARAMETERS.safetensors FOLDER SETTINGS` codes the parameters with each of a list of settings
(JSON) and writes, in a folder for each, `stream.nnc`, `decoded.safetensors` and `coded.npz`: the integers of every
tensor that it coded, and how many bytes they took alone.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

ABSENT = ("torchvision", "timm", "flwr", "wandb", "transformers", "datasets", "torchmetrics")


class Absent(types.ModuleType):
    """Stands in for packages that NNCodec imports for its examples alone."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = Absent(f"{self.__name__}.{name}")
        found.__spec__ = importlib.machinery.ModuleSpec(found.__name__, None)
        sys.modules[found.__name__] = found
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)


class Finder:
    """Finds an `Absent` for each of these packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> Absent:
        module = Absent(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        """Nothing is in it."""


def compress(parameters: Path, folder: Path, settings: list[dict[str, Any]]) -> None:
    """Codes, decodes, and keeps what was coded, with each of the settings."""
    import numpy as np
    from nncodec import nnc
    from nncodec.extensions import deepCABAC
    from nncodec.nnc_core.coder import baseline
    from safetensors.numpy import load_file, save_file

    coded: dict[str, Any] = {}
    whole = baseline.encode

    def encode(encoder: Any, data: Any, base: Any, name: str, *rest: Any) -> Any:
        if isinstance(data["parameters"][name], np.ndarray):
            alone = deepCABAC.Encoder()
            whole(alone, data, base, name, *rest)
            coded[f"{name}|integers"] = np.array(data["parameters"][name])
            coded[f"{name}|bytes"] = np.array(len(alone.finish().tobytes()))
        return whole(encoder, data, base, name, *rest)

    baseline.encode = encode
    given = {name: np.ascontiguousarray(value) for name, value in load_file(str(parameters)).items() if value.ndim}
    given = {name: value.astype(np.int32 if value.dtype.kind == "i" else np.float32) for name, value in given.items()}
    for number, options in enumerate(settings):
        coded.clear()
        own = folder / str(number)
        own.mkdir(parents=True, exist_ok=True)
        stream = str(own / "stream.nnc")
        nnc.compress(dict(given), bitstream_path=stream, verbose=False, **options)
        found = nnc.decompress(stream, verbose=False)
        found = {name: np.ascontiguousarray(found[name], dtype=np.float32) for name in given}
        save_file(found, own / "decoded.safetensors")
        np.savez(own / "coded.npz", **coded)


if __name__ == "__main__":
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
    compress(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
