"""The layers that a file may name: a table, and a layer as data and back."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from featherweight.core.forms import foreign
from featherweight.errors import FormatError

# The layers that a file may name, with the constructor arguments that their attributes hold.
CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode")
TRANSPOSED = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups", "bias")
BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
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
        ((nn.GroupNorm,), ("num_groups", "num_channels", "eps", "affine")),
        ((nn.LocalResponseNorm,), ("size", "alpha", "beta", "k")),
        ((nn.Embedding,), ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type")),
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
        ((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), ("p", "inplace")),
        ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), MAX_POOL),
        ((nn.AvgPool1d,), AVG_POOL),
        ((nn.AvgPool2d, nn.AvgPool3d), (*AVG_POOL, "divisor_override")),
        ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), ("output_size",)),
        ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), ("output_size",)),
        ((nn.PixelShuffle,), ("upscale_factor",)),
        ((nn.PixelUnshuffle,), ("downscale_factor",)),
        ((nn.ChannelShuffle,), ("groups",)),
        ((nn.Upsample,), ("size", "scale_factor", "mode", "align_corners")),
        ((nn.ZeroPad1d, nn.ZeroPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad2d), ("padding",)),
    )
    for t in kinds
}
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
        return {"type": "Sequential", "layers": {n: layer_spec(m) for n, m in module._modules.items() if m is not None}}
    if base not in TYPES:
        raise FormatError(f"a {base.__name__} was swapped in, which a file cannot name: use one of {', '.join(LEAVES)}")
    name = TYPES[base]
    return {"type": name, "args": {key: _argument(module, key) for key in LEAVES[name][1]}}


def _argument(module: nn.Module, key: str) -> Any:
    value = getattr(module, key)
    if key == "bias" and not isinstance(value, bool):
        return value is not None
    return list(value) if isinstance(value, tuple) else value


def build_layer(spec: dict[str, Any], depth: int = 0) -> nn.Module:
    """The module that `layer_spec` describes, with untrained weights.

    Raises:
        FormatError: the data describe no layer that a file may name.
    """
    kind = spec.get("type")
    if kind == "Sequential" and depth < 8 and isinstance(spec.get("layers"), dict):
        built = nn.Sequential()
        for name, inner in spec["layers"].items():
            built.add_module(str(name), build_layer(inner, depth + 1))
        return built
    if kind not in LEAVES or not isinstance(spec.get("args"), dict):
        raise FormatError(f"the file describes a layer of type {kind!r}, which is none of {', '.join(LEAVES)}")
    make, names = LEAVES[kind]
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["args"].items()}
    if set(args) - set(names):
        raise FormatError(
            f"the file gives {kind} the arguments {sorted(set(args) - set(names))}, which it does not have"
        )
    try:
        return make(**args)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"the file describes a {kind} that cannot be built: {error}") from None
