"""The operators that a network without its class may call: a table, beyond which nothing is looked up by name."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from featherweight.errors import BadData, FormatError

# Tensor operators by their name in torch.ops.aten; every overload of them. None reads or writes anything but tensors.
NAMES = """
    abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d add addbmm addcdiv addcmul addmm addmv affine_grid_generator alias all alpha_dropout amax amin
    any arange argmax argmin argsort asin asinh atan atan2 atanh avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm
    bilinear bitwise_and bitwise_not bitwise_or bitwise_xor bmm broadcast_tensors broadcast_to bucketize
    cartesian_prod cat cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min clone col2im concat concatenate
    constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d copy cos cosh
    cosine_similarity count_nonzero cross cummax cumprod cumsum deg2rad detach diag diag_embed diagonal diff div
    divide dot dropout einsum elu embedding empty_like eq erf erfc exp exp2 expand expand_as expm1 eye
    feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_irfft fft_irfft2
    fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill flatten flip fliplr flipud float_power floor floor_divide fmod frac
    full full_like gather ge gelu glu greater greater_equal grid_sampler group_norm gru gt hardshrink hardsigmoid
    hardswish hardtanh hsplit hstack im2col imag index index_add index_copy index_fill index_put index_select inner
    instance_norm isfinite isinf isnan kron layer_norm le leaky_relu lerp less less_equal lift_fresh_copy
    linalg_matrix_norm linalg_norm linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax
    logaddexp logical_and logical_not logical_or logical_xor logit logsumexp lstm lt masked_fill masked_scatter matmul
    matrix_H max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices maximum mean median
    meshgrid mH min minimum mish mm mode moveaxis movedim mT mul multiply mv nan_to_num narrow ne neg negative
    new_empty new_full new_ones new_zeros norm not_equal numpy_T one_hot ones ones_like outer pad pairwise_distance
    permute pixel_shuffle pixel_unshuffle polar pow prelu prod rad2deg ravel real reciprocal reflection_pad1d
    reflection_pad2d reflection_pad3d relu relu6 remainder repeat repeat_interleave replication_pad1d
    replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg rms_norm rnn_relu rnn_tanh roll
    rot90 round rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce
    searchsorted select select_scatter selu sgn sigmoid sign signbit silu sin sinc sinh slice slice_scatter softmax
    softplus softshrink sort split split_with_sizes sqrt square squeeze stack std std_mean sub subtract sum swapaxes
    swapdims t take take_along_dim tan tanh tanhshrink tensor_split tensordot threshold tile to topk transpose tril
    tril_indices triu triu_indices true_divide trunc type_as unbind unflatten unfold unsafe_chunk unsafe_split
    unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_trilinear3d var var_mean vdot vector_norm view view_as view_as_complex view_as_real
    vsplit vstack where xlogy zeros zeros_like zero _adaptive_avg_pool2d _assert_async _log_softmax _softmax _to_copy
    _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
    _weight_norm_interface _weight_norm __and__ __or__ __xor__ bernoulli empty rand_like randn_like empty_permuted
    max_unpool2d masked_select nonzero_static scaled_dot_product_flash_attention_for_cpu add_ sub_ mul_ div_ relu_
    relu6_ silu_ hardswish_ hardsigmoid_ hardtanh_ leaky_relu_ elu_ celu_ selu_ sigmoid_ tanh_ clamp_ clamp_min_
    clamp_max_ masked_fill_ fill_ zero_ copy_ index_put_ index_fill_ index_add_ index_copy_ scatter_ scatter_add_
    dropout_ alpha_dropout_ feature_dropout_ exp_ neg_ pow_ sqrt_ rsqrt_ square_ abs_ unsqueeze_ squeeze_ transpose_
    triu_ tril_ mish_ gelu_ threshold_ bitwise_and_ bitwise_or_ logical_and_ logical_or_ logical_not_ floor_ ceil_
    round_ lerp_ addcmul_ addcdiv_ cumsum_ sin_ cos_ log_ remainder_ floor_divide_ detach_ fill_diagonal_ t_ swapaxes_
"""
ATEN = frozenset(NAMES.split())

# Arithmetic on sizes as it stands: on numbers of any size, on arrays.
PLAIN: dict[str, Callable[..., Any]] = {
    "size": lambda tensor, dim: tensor.size(dim),
    "item": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "pow": lambda base, exponent: base**exponent if abs(exponent) <= 64 else math.inf,
    "neg": operator.neg,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "max": lambda *values: max(values),
    "min": lambda *values: min(values),
    "and": lambda *values: all(values),
    "or": lambda *values: any(values),
    "not": operator.not_,
    "ceil": math.ceil,
    "floor": math.floor,
    "trunc": math.trunc,
    "float": float,
    "ite": lambda condition, yes, no: yes if condition else no,
}
UNARY = frozenset(["neg", "not", "ceil", "floor", "trunc", "float"])
ANY = frozenset(["max", "min", "and", "or"])  # of one argument or more
WIDEST = 1 << 63


def arity(name: str) -> tuple[int, int]:
    """The fewest and the most arguments that arithmetic on sizes takes."""
    if name in ANY:
        return 1, 8
    count = 1 if name in UNARY else 3 if name == "ite" else 2
    return count, count


def _number(name: str, value: Any) -> Any:
    """A number that sizes may be computed with; symbolic ones while a network is traced.

    Raises:
        BadData: it is none, or beyond 63 bits.
    """
    if isinstance(value, (int, float)):
        if abs(value) < WIDEST or value in (math.inf, -math.inf):
            return value
        raise BadData(f"size.{name} of a number beyond 63 bits: the network does not hold for inputs of these sizes")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    raise BadData(f"size.{name} of a {type(value).__name__}: the network computes sizes with numbers alone")


def _bounded(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Arithmetic that takes and gives numbers below 2**63 alone, so that a file cannot make it endless."""

    def run(*values: Any) -> Any:
        given = [_number(name, value) for value in values]
        try:
            return _number(name, plain(*given))
        except ArithmeticError:
            raise BadData(f"size.{name} of {given} has no value: use inputs of other sizes") from None

    return run


# Arithmetic on sizes, which are Python numbers while a network runs.
SIZES: dict[str, Callable[..., Any]] = {
    name: plain if name in ("size", "item") else _bounded(name, plain) for name, plain in PLAIN.items()
}
# How torch names the same functions in a traced graph.
TRACED: dict[str, str] = {
    "sym_size": "size",
    "getitem": "item",
    "sym_max": "max",
    "sym_min": "min",
    "sym_not": "not",
    "sym_float": "float",
    "sym_ite": "ite",
    "and_": "and",
    "or_": "or",
}
# Operators that only check: they are left out of a file.
CHECKS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)


@cache
def function(target: str) -> Callable[..., Any]:
    """The function behind a name such as `aten.view.default` or `size.floordiv`.

    Raises:
        FormatError: the name is none of the tables'.
    """
    kind, _, name = target.partition(".")
    packet, _, overload = name.partition(".")
    if kind == "size" and name in SIZES:
        return SIZES[name]
    if kind == "aten" and packet in ATEN and overload.isidentifier():
        found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if isinstance(found, torch._ops.OpOverload) and makes_tensors(found):
            return found
    raise FormatError(f"the network calls {target[:80]!r}, which no file may call")


def makes_tensors(found: torch._ops.OpOverload) -> bool:
    """Whether an overload gives back new tensors: those on plain numbers can end the process (a remainder by zero)."""
    schema = found._schema
    return any("Tensor" in str(a.type) for a in schema.returns) and not any(a.is_out for a in schema.arguments)


def target_name(target: Any) -> str | None:
    """The name under which a file calls an operator of a traced graph; None for one that it may not call."""
    if isinstance(target, torch._ops.OpOverload):
        space, _, packet = target._schema.name.partition("::")
        if packet in TRACED:
            return f"size.{TRACED[packet]}"
        known = space == "aten" and packet in ATEN and makes_tensors(target)
        return f"aten.{packet}.{target._overloadname}" if known else None
    name = getattr(target, "__name__", "")
    name = TRACED.get(name, name)
    return f"size.{name}" if name in SIZES else None


def schema_types(target: str) -> list[tuple[str, str, bool]] | None:
    """Name, type and whether it may be left out, for each argument of a tensor operator; None for arithmetic."""
    found = function(target)
    if not isinstance(found, torch._ops.OpOverload):
        return None
    return [(a.name, str(a.real_type), a.has_default_value()) for a in found._schema.arguments]
