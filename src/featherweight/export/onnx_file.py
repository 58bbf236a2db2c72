"""ONNX: float weights as they are, declared int8 grids as quantize/dequantize pairs, and a gate that compares."""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from onnxscript import optimizer
from onnxscript.rewriter import onnx_fusions
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.core.forms import ACTIVATIONS, activation_form, bake
from featherweight.core.task import as_call, eval_mode, to_device
from featherweight.core.trace import by_name
from featherweight.core.wired import Wired
from featherweight.errors import BadOption, ExportError, FormatError, TraceError
from featherweight.export.graph import (
    constants_to_initializers,
    explicit_zero_points,
    four_bits,
    integer_biases,
    name_batch,
    tidy,
    transposed_weights,
    without_idle_relus,
)
from featherweight.export.lower import FREE, lower, translations
from featherweight.export.runtime_session import Session, first_line

OPSET = 20
BLOCKS = 21  # the first operator set with a scale for each block of stored integers, and with four bits
KEPT = (".symbols", ".half_precision")  # buffers of weights that are computed from what is stored
FLOAT_TOLERANCE = 1e-4  # of the largest output; float kernels sum in another order
GRID_TOLERANCE = 0.02  # the same on grids, where a value next to a rounding edge lands a step away now and then
RUNTIME_TOLERANCE = 0.05  # ONNX Runtime multiplies int8 matrices with inputs that it rounds to int8 by itself


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from the module.

    Attributes:
        kind: "float", "weights" (int8 weights, float arithmetic) or "qdq" (int8 weights and activations).
        int8_weights: how many layers store their weights as int8.
        blocked: how many store them as integers with a scale for each block, of four bits where they fit.
        shifted: how many store them as integers around a zero point, or with scales for blocks, executed in float.
        looked_up: how many store them as bytes that point into a table of values or vectors, executed in float.
        halves: how many store them in half precision, exactly, executed in float.
        moved: the largest change of a weight or bias by the export, relative to the largest of its tensor; weights
            never move, biases that become int32 by half a step at most.
        difference: the largest difference to the module on the example inputs, relative to its largest output; None
            when unchecked. `optimized` is the same with the runtime's own rewriting of the graph switched on.
        notes: what a reader should know: weights on grids that int8 cannot hold, and the like.
    """

    path: str
    bytes: int
    opset: int
    inputs: list[str]
    outputs: list[str]
    dynamic_batch: bool
    kind: str
    int8_weights: int
    blocked: int
    shifted: int
    looked_up: int
    halves: int
    moved: float
    difference: float | None
    optimized: float | None
    notes: list[str]

    def facts(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return asdict(self)


def onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Any,
    opset: int = OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    check: bool = True,
) -> ExportReport:
    """Writes a model as ONNX, whole or not at all; the same model gives the same bytes. The model is not changed.

    The first dimension of the inputs is dynamic. Weights with declared int8 codes become int8 initializers, those with
    a scale a block integers of four or eight bits, those on other grids integers of one or two bytes, those with tables
    of at most 256 values or vectors bytes and a table, those that float16 or bfloat16 holds exactly such; grids on
    activations become QuantizeLinear and DequantizeLinear, biases between the two int32; everything else is float and
    exact.

    Args:
        example_inputs: a tensor, tuple or dictionary of inputs, as the model takes them.
        opset: the version of the ONNX operator set.
        input_names: "input" for a single tensor, else the names of the arguments.
        output_names: "output" for a single tensor, else the names of the fields, or output_0, output_1, ...
        check: compare the file with the module in ONNX Runtime, at two batch sizes, and refuse a file that disagrees or
            gives the same output for different inputs.

    Raises:
        TraceError: the model cannot be traced, or uses an operator that ONNX does not have.
        ExportError: the file disagrees with the module.
    """
    call = _two_samples(_in_order(model, to_device(as_call(example_inputs), torch.device("cpu"))))
    copy = bake(deepcopy(model)).cpu().eval()
    with eval_mode(copy):
        expected = copy(*call[0], **call[1])
    names = _input_names(copy, call, input_names), _output_names(expected, output_names)
    lowered = lower(deepcopy(copy))
    opset = max(opset, BLOCKS) if lowered.blocked else opset
    proto, dynamic = _traced(lowered.model, call, names, opset)
    constants_to_initializers(proto)
    without_idle_relus(proto)
    transposed_weights(proto)
    explicit_zero_points(proto)
    four_bits(proto)
    moved = integer_biases(proto)
    name_batch(proto, dynamic)
    content = tidy(proto)
    _check_format(content)
    kind = "qdq" if lowered.grids else "weights" if lowered.weights or lowered.blocked else "float"
    difference, optimized = _gate(copy, content, call, dynamic, kind) if check else (None, None)
    _write(Path(path), content)
    return ExportReport(
        path=str(path),
        bytes=len(content),
        opset=opset,
        inputs=names[0],
        outputs=names[1],
        dynamic_batch=dynamic,
        kind=kind,
        int8_weights=lowered.weights,
        blocked=lowered.blocked,
        shifted=lowered.shifted,
        looked_up=lowered.looked_up,
        halves=lowered.halves,
        moved=moved,
        difference=difference,
        optimized=optimized,
        notes=lowered.notes + ([] if dynamic else ["the batch size is fixed: the model does not trace with another"]),
    )


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _in_order(model: nn.Module, call: Call) -> Call:
    """The call with arguments by name in the order of a wired network's own."""
    args, kwargs = call
    order = model.wiring.names if isinstance(model, Wired) else ()
    return args, {name: kwargs[name] for name in sorted(kwargs, key=lambda n: (*order, n).index(n))}


def _batch(call: Call) -> int | None:
    """The size of the first dimension of the first input that has one."""
    return next((t.shape[0] for t in _tensors(call) if t.dim() > 0), None)


def _map_batched(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """The call with every tensor changed whose first dimension is the batch."""
    batch = _batch(call)
    result: Call = pytree.tree_map(
        lambda v: change(v) if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == batch else v, call
    )
    return result


def _two_samples(call: Call) -> Call:
    """A batch of one is doubled: torch.export takes a one for a constant."""
    return _map_batched(call, lambda t: torch.cat([t, t])) if _batch(call) == 1 else call


def _input_names(model: nn.Module, call: Call, given: Sequence[str] | None) -> list[str]:
    args, kwargs = call
    count = len(_tensors(call))
    if given is not None:
        if len(given) != count:
            raise BadOption(f"input_names has {len(given)} names: the model takes {count} tensors")
        return list(given)
    if not kwargs and count == 1:
        return ["input"]
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    flat = [*zip(bound.arguments, args, strict=False), *kwargs.items()]
    names = [name for key, value in flat for name in _leaf_names(key, value)]
    return names if len(names) == count else [f"input_{i}" for i in range(count)]


def _output_names(output: Any, given: Sequence[str] | None) -> list[str]:
    found = (
        ["output"] if isinstance(output, Tensor) else _leaf_names("" if hasattr(output, "keys") else "output", output)
    )
    if given is None:
        return found
    if len(given) != len(found):
        raise BadOption(f"output_names has {len(given)} names: the model returns {len(found)} tensors")
    return list(given)


def _leaf_names(prefix: str, value: Any) -> list[str]:
    """Names of the tensors in a nested value: its keys and positions behind a prefix."""
    leaves = pytree.tree_flatten_with_path(value)[0]
    named = [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
    keys = ["_".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in named]
    return ["_".join(part for part in (prefix, key) if part) for key in keys]


def _traced(model: nn.Module, call: Call, names: tuple[list[str], list[str]], opset: int) -> tuple[ModelProto, bool]:
    """The graph, and whether its batch is dynamic."""
    try:
        return _to_onnx(_program(model, call, dynamic=True), names, opset), True
    except TraceError:  # a model may write its batch size into the graph; with a fixed one it still runs
        return _to_onnx(_program(model, call, dynamic=False), names, opset), False


def _program(model: nn.Module, call: Call, *, dynamic: bool) -> Any:
    # torch.export loses the sizes of arguments by name where a signature does not list the names
    args, kwargs = model.positional(*call) if isinstance(model, Wired) else call
    # torch marks tensors that it traces with symbolic sizes: each trace gets tensors of its own
    args, kwargs = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (args, kwargs))
    batch = _batch(call)

    def free(value: Any) -> Any:
        varies = dynamic and isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
        return {0: torch.export.Dim.DYNAMIC} if varies else None

    shapes = by_name(model, *pytree.tree_map(free, (args, kwargs))) if dynamic else None
    try:
        with _quiet():
            return copying(torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False))
    except Exception as error:  # torch.export raises many kinds
        raise TraceError(
            f"{type(model).__name__} cannot be traced ({first_line(error)}): write the forward pass without that, "
            "or keep the module itself (model.fw with load(into=...) needs no graph)"
        ) from error


def copying(program: Any) -> Any:
    """The same program in which what was moved is copied before it takes another shape.

    Where attention's own layout makes that copy needless torch leaves it out, and then takes attention apart into steps
    with another layout, in which it is missing. A copy is nothing in ONNX.
    """
    aten = torch.ops.aten
    shaped = (aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten._unsafe_view.default)
    moved = (aten.transpose.int, aten.permute.default, aten.contiguous.default)
    for node in [n for n in program.graph.nodes if n.target in shaped and n.args[0].target in moved]:
        with program.graph.inserting_before(node):
            made = program.graph.call_function(aten.clone.default, node.args[:1])
        made.kwargs, made.meta = {"memory_format": torch.contiguous_format}, dict(node.args[0].meta)
        node.args = (made, *node.args[1:])
    return program


def _to_onnx(program: Any, names: tuple[list[str], list[str]], opset: int) -> ModelProto:
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=names[0],
                output_names=names[1],
                opset_version=opset,
                custom_translation_table=translations(),
                optimize=False,
            )
            if exported is not None:
                optimizer.optimize_ir(exported.model, should_fold=_may_fold)
                onnx_fusions.fuse(exported.model)
    except Exception as error:
        raise ExportError(
            f"the model cannot be written as ONNX ({_unsupported(error)}): keep the module itself "
            "(model.fw with load(into=...) needs no graph)"
        ) from error
    if exported is None:
        raise ExportError("the model cannot be written as ONNX: torch.onnx returned nothing")
    proto: ModelProto = exported.model_proto
    return proto


def _may_fold(node: Any) -> bool | None:
    """Keeps weights as they are stored, where the optimizer would compute short ones; None leaves the choice to it."""
    names = [value.name or "" for value in node.inputs if value is not None]
    kept = any((".parametrizations." in name and name.endswith(KEPT)) or FREE in name for name in names)
    return False if kept else None


def _unsupported(error: BaseException) -> str:
    """The operator that ONNX lacks, from the chain of torch's errors."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 8:
        causes.append(cause)
    named = next((first_line(c) for c in causes if str(c).startswith("No ONNX function found")), None)
    return named or first_line(causes[-1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what torch's exporter says about its own parts (deprecations, packages that are not there)."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_format(content: bytes) -> None:
    from onnx import checker

    try:
        checker.check_model(content, full_check=True)
    except Exception as error:  # the checker's errors share no base that says so
        raise ExportError(f"the exported graph is not valid ONNX: {first_line(error)}") from error


def _gate(model: nn.Module, content: bytes, call: Call, dynamic: bool, kind: str) -> tuple[float, float]:
    """The largest relative difference to the module, as written and as the runtime rewrites it.

    Raises:
        ExportError: it is too large, or the output does not depend on the input.
    """
    try:
        exact, fast = Session(content, optimize=False), Session(content)
    except FormatError as error:
        raise ExportError(str(error)) from error
    calls = [call, _altered(call, grow=dynamic)]
    wanted, found, rewritten = ([run(c) for c in calls] for run in (_runner(model), _by_leaf(exact), _by_leaf(fast)))
    if _same(found[0], found[1]) and not _same(_tensors(calls[0]), _tensors(calls[1])):
        raise ExportError("the model gives the same output for different inputs: it has collapsed, nothing was written")
    written, optimized = (max(map(_difference, got, wanted)) for got in (found, rewritten))
    if kind == "qdq":
        # What the grids themselves change tells how far one step here and there may carry through the layers.
        smooth = [_runner(_without_grids(deepcopy(model)))(c) for c in calls]
        limits = (max(GRID_TOLERANCE, *(2 * _difference(*pair) for pair in zip(wanted, smooth, strict=True))),) * 2
    else:
        exactly = max([FLOAT_TOLERANCE, *(8 * torch.finfo(t.dtype).eps for t in wanted[0] if t.is_floating_point())])
        limits = (exactly, RUNTIME_TOLERANCE if kind == "weights" else exactly)
    for difference, allowed in zip((written, optimized), limits, strict=True):
        if not difference <= allowed:
            raise ExportError(
                f"the exported model differs from the module by {difference:.2g} of its largest output (at most "
                f"{allowed:.2g} is expected): pass check=False to write it anyway"
            )
    return written, optimized


def _without_grids(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for at in ACTIVATIONS:
            if activation_form(module, at) is not None:
                module._modules[f"fw_{at}"] = nn.Identity()
    return model


def _runner(model: nn.Module) -> Callable[[Call], list[Tensor]]:
    def run(call: Call) -> list[Tensor]:
        with eval_mode(model):
            return _tensors(model(*call[0], **call[1]))

    return run


def _by_leaf(session: Session) -> Callable[[Call], list[Tensor]]:
    return lambda call: _tensors(session(*_tensors(call)))


def _altered(call: Call, *, grow: bool) -> Call:
    """Other inputs of the same kind: noise on numbers, the same integers in another order; one sample more."""
    generator = torch.Generator().manual_seed(0)

    def change(value: Tensor) -> Tensor:
        more = torch.cat([value, value[:1]]) if grow else value
        if more.is_floating_point():
            spread = float(more.float().std()) if more.numel() > 1 else 0.0
            return more + (torch.randn(more.shape, generator=generator) * (spread or 1.0)).to(more.dtype)
        return more.flatten()[torch.randperm(more.numel(), generator=generator)].view(more.shape)

    return _map_batched(call, change)


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x[:1], y[:1]) for x, y in zip(a, b, strict=True))


def _difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference of any output, relative to the largest value of that output; infinite if not finite."""
    gaps = [0.0]
    for g, w in zip(got, wanted, strict=True):
        gap = (g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1e-12) if w.numel() else 0.0
        gaps.append(float(gap) if g.shape == w.shape and bool(torch.isfinite(g.double()).all()) else float("inf"))
    return max(gaps)


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
