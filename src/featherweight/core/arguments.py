"""Which values the constructor arguments of layers may have: torch takes many that fail, or hang, only later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from featherweight.core.recurrent import GATES, SharedRecurrent
from featherweight.core.structured import StructuredConv2d, StructuredEmbedding, StructuredLayer, StructuredLinear
from featherweight.core.structures import sound

HUGE = 1e18  # epsilons and the like
LARGEST = 1 << 40  # features, channels, rows of a table
WIDEST = 1 << 20  # kernel sizes, strides, paddings, dilations
DEEPEST = 256  # layers of one recurrent network


def _integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < HUGE  # not so of NaN


def _any(value: Any) -> bool:
    return _integer(value, 0, LARGEST)


def _some(value: Any) -> bool:
    return _integer(value, 1, LARGEST)


Check = Callable[[str, Any], bool]


def _between(low: int, high: int) -> Check:
    return lambda kind, value: _integer(value, low, high)


def _one_of(*words: Any) -> Check:
    return lambda kind, value: any(value is word or (isinstance(word, str) and value == word) for word in words)


def _or_none(check: Check) -> Check:
    return lambda kind, value: value is None or check(kind, value)


def _each(one: Callable[[Any], bool], most: int = 3) -> Check:
    """A value, or one for each dimension of the layer."""

    def check(kind: str, value: Any) -> bool:
        if not isinstance(value, tuple):
            return one(value)
        dims = int(kind[-2]) if kind[-1:] == "d" and kind[-2:-1].isdigit() else None
        return (len(value) == dims if dims else 1 <= len(value) <= most) and all(map(one, value))

    return check


def _sizes(low: int) -> Check:
    return _each(lambda one: _integer(one, low, WIDEST))


def _padding(kind: str, value: Any) -> bool:
    if "Pad" in kind:  # before and after each dimension; may cut
        several = value if isinstance(value, tuple) else (value,)
        return 1 <= len(several) <= 6 and all(_integer(one, -WIDEST, WIDEST) for one in several)
    return value in ("same", "valid") if isinstance(value, str) else _sizes(0)(kind, value)


_flag = _one_of(True, False)
_real = _each(_number, 0)
COUNTS = "in_features out_features in1_features in2_features num_features num_embeddings embedding_dim"
POSITIVE = "in_channels out_channels groups num_groups num_channels num_parameters input_size hidden_size"
FLAGS = (
    "bias affine track_running_stats elementwise_affine batch_first bidirectional inplace return_indices ceil_mode "
    "count_include_pad scale_grad_by_freq sparse"
)
NUMBERS = "alpha beta k norm_type negative_slope min_val max_val threshold"
MODES = ("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear")
# By the name of the argument, whatever layer it belongs to.
ARGUMENTS: dict[str, Check] = {
    **dict.fromkeys(COUNTS.split(), _between(0, LARGEST)),
    **dict.fromkeys(POSITIVE.split(), _between(1, LARGEST)),
    **dict.fromkeys(FLAGS.split(), _flag),
    **dict.fromkeys(NUMBERS.split(), _real),
    **dict.fromkeys(("kernel_size", "stride", "dilation"), _sizes(1)),
    **dict.fromkeys(("p", "dropout"), lambda kind, value: _number(value) and 0 <= value <= 1),
    **dict.fromkeys(("upscale_factor", "downscale_factor"), _between(1, WIDEST)),
    **dict.fromkeys(("start_dim", "end_dim"), _between(-32, 32)),
    **dict.fromkeys(("eps", "momentum", "max_norm"), _or_none(_real)),
    "dim": _or_none(_between(-32, 32)),
    "proj_size": _between(0, LARGEST),
    "num_layers": _between(1, DEEPEST),
    "padding": _padding,
    "output_padding": _sizes(0),
    "padding_mode": _one_of("zeros", "reflect", "replicate", "circular"),
    "normalized_shape": _each(lambda one: _integer(one, 0, LARGEST), 16),
    "padding_idx": _or_none(_between(-LARGEST, LARGEST)),
    "divisor_override": _or_none(_between(1, LARGEST)),
    "nonlinearity": _one_of("tanh", "relu"),
    "approximate": _one_of("none", "tanh"),
    "size": _or_none(_sizes(1)),
    "splits": lambda kind, value: isinstance(value, tuple) and _each(_any, 81)("", value),
    "unflattened_size": lambda kind, value: isinstance(value, tuple) and _each(_some, 16)(kind, value),
    "output_size": _each(lambda one: one is None or _integer(one, 0, WIDEST)),
    "scale_factor": _or_none(_each(lambda one: _number(one) and one > 0)),
    "mode": _one_of(*MODES),
    "align_corners": _one_of(True, False, None),
    "recompute_scale_factor": _one_of(True, False, None),
    "cell": _one_of(*GATES),
    "rank": _between(1, LARGEST),
    "structure": lambda kind, value: sound(value),
}


def fits(kind: str, name: str, value: Any) -> bool:
    """Whether a layer of this kind can have this value as an argument; lists are given as tuples.

    >>> fits("Conv2d", "stride", (2, 2)), fits("Conv2d", "stride", (0, 2)), fits("BatchNorm2d", "eps", "a")
    (True, False, False)
    """
    return ARGUMENTS[name](kind, value)


def agrees(module: nn.Module) -> bool:  # noqa: PLR0911 - one straight table
    """Whether the sizes that a layer of torch's says it has are those of its tensors; others always do."""
    tensors = {key: tuple(t.shape) for key, t in vars(module)["_parameters"].items() if isinstance(t, Tensor)}
    weight = tensors.get("weight")
    match module:
        case nn.Linear():
            return weight == (module.out_features, module.in_features)
        case nn.Embedding():
            return weight == (module.num_embeddings, module.embedding_dim)
        case SharedRecurrent():
            return tensors == module.shapes()
        case StructuredLayer():
            biases = (module.matrix.rows // module.matrix.outputs_a_bias,)
            same = tensors.pop("bias", biases) == biases
            return same and _says_its_size(module) and tensors == module.matrix.shapes()
        case nn.modules.conv._ConvNd() if weight is not None:
            inner, outer = module.in_channels, module.out_channels
            rows, columns = (inner, outer) if module.transposed else (outer, inner)
            whole = module.groups > 0 and inner % module.groups == outer % module.groups == 0
            return whole and weight == (rows, columns // module.groups, *module.kernel_size)
        case nn.modules.batchnorm._NormBase():
            sizes = {*tensors.values(), *(tuple(b.shape) for b in module.buffers() if b.dim())}
            return sizes <= {(module.num_features,)}
        case nn.GroupNorm():
            whole = module.num_groups > 0 and module.num_channels % module.num_groups == 0
            return whole and set(tensors.values()) <= {(module.num_channels,)}
        case nn.LayerNorm() | nn.RMSNorm():
            return set(tensors.values()) <= {tuple(module.normalized_shape)}
    return True


def _says_its_size(module: StructuredLayer) -> bool:
    match module:
        case StructuredLinear():
            return module.weight_shape == (module.out_features, module.in_features)
        case StructuredEmbedding():
            return module.weight_shape == (module.num_embeddings, module.embedding_dim)
        case StructuredConv2d():
            sizes = module.out_channels, module.in_channels // max(1, module.groups), *module.kernel_size
            return module.weight_shape == sizes
    return False
