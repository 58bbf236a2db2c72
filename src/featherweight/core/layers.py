"""The layers that a file may name: a table, and a layer as data and back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from featherweight.core.arguments import fits
from featherweight.core.forms import foreign
from featherweight.core.recurrent import SETTINGS, SharedRecurrent
from featherweight.core.shifts import SETTINGS as SHIFT
from featherweight.core.shifts import Shift2d
from featherweight.core.structured import StructuredConv2d, StructuredEmbedding, StructuredLinear
from featherweight.core.structures import MOST as ENTRIES
from featherweight.errors import FeatherweightError, FormatError, shown

# The layers that a file may name, with the constructor arguments that their attributes hold.
CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode")
TRANSPOSED = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups", "bias")
BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats", "bias")
EMBEDDING = (
    *("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"),
    *("scale_grad_by_freq", "sparse"),
)
RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
LEAVES: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    t.__name__: (t, names)
    for kinds, names in (
        ((nn.Linear,), ("in_features", "out_features", "bias")),
        ((nn.Bilinear,), ("in1_features", "in2_features", "out_features", "bias")),
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONV),
        ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (*TRANSPOSED, "dilation")),
        ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), BATCH_NORM),
        ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), BATCH_NORM),
        ((nn.LayerNorm,), ("normalized_shape", "eps", "elementwise_affine", "bias")),
        ((nn.RMSNorm,), ("normalized_shape", "eps", "elementwise_affine")),
        ((nn.GroupNorm,), ("num_groups", "num_channels", "eps", "affine", "bias")),
        ((nn.LocalResponseNorm,), ("size", "alpha", "beta", "k")),
        ((nn.Embedding,), EMBEDDING),
        ((nn.LSTM,), (*RECURRENT, "proj_size")),
        ((nn.GRU,), RECURRENT),
        ((nn.RNN,), (*RECURRENT, "nonlinearity")),
        ((nn.Identity, nn.Sigmoid, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink), ()),
        ((nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.SELU), ("inplace",)),
        ((nn.GELU,), ("approximate",)),
        ((nn.LeakyReLU,), ("negative_slope", "inplace")),
        ((nn.ELU, nn.CELU), ("alpha", "inplace")),
        ((nn.Hardtanh,), ("min_val", "max_val", "inplace")),
        ((nn.Softplus,), ("beta", "threshold")),
        ((nn.PReLU,), ("num_parameters",)),
        ((nn.Softmax, nn.LogSoftmax, nn.GLU), ("dim",)),
        ((nn.Flatten,), ("start_dim", "end_dim")),
        ((nn.Unflatten,), ("dim", "unflattened_size")),
        ((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), ("p", "inplace")),
        ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), MAX_POOL),
        ((nn.AvgPool1d,), AVG_POOL),
        ((nn.AvgPool2d, nn.AvgPool3d), (*AVG_POOL, "divisor_override")),
        ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), ("output_size",)),
        ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), ("output_size", "return_indices")),
        ((nn.PixelShuffle,), ("upscale_factor",)),
        ((nn.PixelUnshuffle,), ("downscale_factor",)),
        ((nn.ChannelShuffle,), ("groups",)),
        ((nn.Upsample,), ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")),
        ((SharedRecurrent,), SETTINGS),
        ((Shift2d,), SHIFT),
        ((StructuredLinear,), StructuredLinear.settings),
        ((StructuredConv2d,), StructuredConv2d.settings),
        ((StructuredEmbedding,), StructuredEmbedding.settings),
        ((nn.ZeroPad1d, nn.ZeroPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad2d), ("padding",)),
    )
    for t in kinds
}
DEEPEST = 8  # Sequentials that may stand inside one another
MOST = 1 << 13  # layers that a file may describe, those of a layer that stands at several paths counted at each
STRUCTURED = tuple(kind.__name__ for kind in (StructuredLinear, StructuredConv2d, StructuredEmbedding))
MATRIX = ("in_features", "out_features", "in_channels", "out_channels", "num_embeddings", "embedding_dim")
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
TYPES: dict[type[nn.Module], str] = {t: name for name, (t, _) in LEAVES.items()}


def layer_spec(module: nn.Module) -> dict[str, Any]:
    """A module as data: its type and constructor arguments, or a Sequential of such.

    Raises:
        FormatError: a type that a file cannot name.
    """
    if reason := foreign(module):
        raise FormatError(f"a {type(module).__name__} was swapped in, which a file cannot describe: {reason}")
    base = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
    if base is nn.Sequential:
        spec = {"type": "Sequential", "layers": {n: layer_spec(m) for n, m in module._modules.items() if m is not None}}
        _refuse_more(module, nn.Sequential())
        return spec
    if base not in TYPES:
        raise FormatError(f"a {base.__name__} was swapped in, which a file cannot name: use one of {', '.join(LEAVES)}")
    name = TYPES[base]
    given = {key: _argument(module, key) for key in LEAVES[name][1] if not _left_out(module, key)}
    spec = {"type": name, "args": given}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about settings that the layer has had all the time
        _refuse_more(module, build_layer(spec))
    return spec


def _left_out(module: nn.Module, key: str) -> bool:
    """Whether an argument goes without saying: norms have a bias wherever they have a weight, unless told otherwise."""
    return key == "bias" and isinstance(module, NORMS) and (module.weight is None or module.bias is not None)


def _refuse_more(module: nn.Module, again: nn.Module) -> None:
    """Refuses a layer that has more than its constructor's arguments say: settings changed later, other tensors.

    Raises:
        FormatError: it has.
    """
    kind = type(module).__name__
    plain = (bool, int, float, str, tuple, type(None))
    for key, value in vars(again).items():
        found = getattr(module, key, value)
        if key[0] != "_" and key != "training" and isinstance(value, plain) and _unlike(found, value):
            raise FormatError(f"a {kind} has {shown(found)} as {key}, which a file cannot say of such a layer")
    if parametrize.is_parametrized(module):
        return
    wanted, held = ({**m._parameters, **m._buffers} for m in (again, module))
    for key in wanted.keys() | held.keys():
        shapes = [None if (t := tensors.get(key)) is None else tuple(t.shape) for tensors in (held, wanted)]
        if shapes[0] != shapes[1]:
            raise FormatError(f"a {kind} has {_told(shapes[0])} as {key}, where such a layer has {_told(shapes[1])}")


def _unlike(found: Any, value: Any) -> bool:
    """Whether two settings differ; a list is like a tuple, and what is neither of both is not looked at."""
    found = tuple(found) if isinstance(found, list) else found
    return isinstance(found, (bool, int, float, str, tuple, type(None))) and found != value


def _told(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"a tensor of shape {shape}"


def _argument(module: nn.Module, key: str) -> Any:
    value = getattr(module, key)
    if key == "bias" and not isinstance(value, bool):
        return value is not None
    return list(value) if isinstance(value, tuple) else value


def build_layer(spec: Any, depth: int = 0) -> nn.Module:
    """The module that `layer_spec` describes, with untrained weights.

    Raises:
        FormatError: the data describe no layer that a file may name.
    """
    kind = spec.get("type") if isinstance(spec, dict) else None
    if kind == "Sequential":
        return _build_sequential(spec.get("layers"), depth)
    if not isinstance(kind, str) or kind not in LEAVES or not isinstance(spec.get("args"), dict):
        raise FormatError(f"the file describes a layer of type {shown(kind)}, which is none of {', '.join(LEAVES)}")
    make, names = LEAVES[kind]
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["args"].items()}
    for key, value in args.items():
        if key not in names:
            raise FormatError(f"the file gives {kind} the argument {shown(key)}, which it does not have")
        if not fits(kind, key, value):
            raise FormatError(f"the file gives {kind} {shown(value)} as {key}, which no layer of this kind can have")
    try:
        return make(**args) if torch.get_default_device().type != "meta" else _blank(make, args)
    except (ArithmeticError, AssertionError, TypeError, ValueError, RuntimeError, FeatherweightError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise FormatError(f"the file describes a {kind} that cannot be built: {reason}") from None


def _blank(make: type[nn.Module], args: dict[str, Any]) -> nn.Module:
    """A layer on the meta device without torch's random start: there is nothing to fill, and it would take longest."""
    layer = make.__new__(make)
    object.__setattr__(layer, "reset_parameters", lambda: None)
    make.__init__(layer, **args)
    del layer.__dict__["reset_parameters"]
    return layer


def _build_sequential(layers: Any, depth: int) -> nn.Sequential:
    if not isinstance(layers, dict) or depth >= DEEPEST:
        raise FormatError(f"the file describes a Sequential without layers, or more than {DEEPEST} inside one another")
    built = nn.Sequential()
    for name, inner in layers.items():
        if not plain_name(name) or hasattr(built, name):
            raise FormatError(f"the file calls a layer of a Sequential {shown(name)}, which is no name for a layer")
        built.add_module(name, build_layer(inner, depth + 1))
    return built


def plain_name(name: str) -> bool:
    """Whether a file may give a module or tensor this name: what torch and we call our own parts is not among them."""
    return 0 < len(name) <= 256 and "." not in name and not name.startswith(("fw_", "_fw_", "parametrizations"))


def count_layers(spec: Any, depth: int = 0) -> int:
    """The number of layers that a spec describes, itself included; each of a recurrent network counts."""
    layers, args = (spec.get("layers"), spec.get("args")) if isinstance(spec, dict) else (None, None)
    several = args.get("num_layers") if isinstance(args, dict) else None
    if isinstance(args, dict) and isinstance(several, int):  # two matrices and two biases each, for each way
        return (8 if args.get("bidirectional") else 4) * max(1, several)
    if not isinstance(layers, dict) or depth > DEEPEST:
        return 1
    return 1 + sum(count_layers(inner, depth + 1) for inner in layers.values())


def structured_entries(spec: Any, depth: int = 0) -> int:
    """The entries of all matrices that the structures of a spec make: a few numbers of a file ask for them."""
    layers, args = (spec.get("layers"), spec.get("args")) if isinstance(spec, dict) else (None, None)
    if isinstance(layers, dict) and depth <= DEEPEST:
        return sum(structured_entries(inner, depth + 1) for inner in layers.values())
    if not isinstance(args, dict) or spec.get("type") not in STRUCTURED:
        return 0
    kernel = args.get("kernel_size")
    sizes = [args.get(key) for key in MATRIX] + (kernel[:2] if isinstance(kernel, list) else 2 * [kernel])
    groups = args.get("groups")
    most = math.prod(size for size in sizes if isinstance(size, int) and size > 0)
    return most // (groups if isinstance(groups, int) and groups > 0 else 1)


def check_entries(specs: Iterable[Any]) -> None:
    """Checks how much memory the structured layers of a file would take once they are made.

    Raises:
        FormatError: together they have more entries than one matrix may have.
    """
    if (found := sum(structured_entries(spec) for spec in specs)) > ENTRIES:
        told = f"structured layers of {found} entries, and those of a file may have 1 to {ENTRIES} together"
        raise FormatError(f"the network or file describes {told}: choose fewer layers")


def check_swaps(swaps: dict[str, Any]) -> None:
    """Checks what can be checked before anything is built: how many layers, and that none stands inside another.

    Raises:
        FormatError: there are too many, a path lies inside another one, or a layer is the same as one not described;
            or structured layers are too large together.
    """
    check_entries(spec for spec in swaps.values() if "same" not in spec)
    sizes = {path: count_layers(spec) for path, spec in swaps.items() if "same" not in spec}
    total = 0
    for path, spec in swaps.items():
        first = spec.get("same", path)
        if not isinstance(first, str) or first not in sizes:
            raise FormatError(f"the file says that {path} is the layer {shown(first)}, which it does not describe")
        steps = path.split(".")
        if any(".".join(steps[:end]) in swaps for end in range(1, len(steps))):
            raise FormatError(f"the file replaces {path}, which lies inside another layer that it replaces")
        total += sizes[first]
    if total > MOST:
        raise FormatError(f"the file describes {total} layers, more than the {MOST} that a file may")
