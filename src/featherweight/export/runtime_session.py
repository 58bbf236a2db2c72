"""An ONNX file as a callable with the module's own arguments, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import BadData, FormatError


class Session:
    """Runs an ONNX file: tensors in, by position or by name, tensors out; one output comes alone, several as a tuple.

    `core.task.evaluate` takes it where it takes a module.
    """

    def __init__(self, file: str | Path | bytes, threads: int = 1, *, optimize: bool = True) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        content = file if isinstance(file, bytes) else str(file)
        try:
            self.runtime = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime raises one class per cause
            where = "the exported model" if isinstance(file, bytes) else str(file)
            raise FormatError(f"{where} does not load in ONNX Runtime: {first_line(error)}") from None
        self.inputs = [i.name for i in self.runtime.get_inputs()]
        self.outputs = [o.name for o in self.runtime.get_outputs()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [a for a in args if isinstance(a, Tensor)]
        free = [name for name in self.inputs if name not in kwargs]
        feed = dict(zip(free, given, strict=False)) | {n: v for n, v in kwargs.items() if n in self.inputs}
        if set(feed) != set(self.inputs):
            raise BadData(f"the file takes the inputs {', '.join(self.inputs)}: {', '.join(feed) or 'none'} were given")
        arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in feed.items()}
        outputs = tuple(torch.from_numpy(o) for o in self.runtime.run(self.outputs, arrays))
        return outputs[0] if len(outputs) == 1 else outputs


def session(path: str | Path, threads: int = 1) -> Session:
    """Opens an ONNX file for running; the result is called like the module it came from.

    Raises:
        FormatError: ONNX Runtime cannot load the file.
    """
    return Session(path, threads)


def first_line(error: BaseException) -> str:
    """The first line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
