"""Linear, convolution and embedding layers whose weight a structure makes: its free parameters are trained and stored.

They stand where `nn.Linear`, `nn.Conv2d` and `nn.Embedding` stood, count each free parameter once, and are leaves of a
file.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from featherweight.core import displacements, functional_hash, rotations  # noqa: F401 - their structures are known from here on
from featherweight.core.structures import Structure, made, near
from featherweight.errors import BadOption

CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class StructuredLayer(nn.Module, ABC):
    """A layer whose weight, seen as a matrix (outputs, all else), is that of a structure.

    Attributes:
        structure: the structure's word and settings.
        matrix: the structure itself; its free parameters are parameters of the layer, by the structure's names.
    """

    kinds: ClassVar[dict[str, type[StructuredLayer]]] = {}
    settings: ClassVar[tuple[str, ...]]  # names of the constructor's arguments, all of them attributes
    structure: tuple[Any, ...]
    matrix: Structure
    bias: Tensor | None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        StructuredLayer.kinds.setdefault(cls.__name__, cls)

    def __init__(self, structure: Sequence[Any], rows: int, columns: int, bias: bool) -> None:
        super().__init__()
        self.structure = tuple(structure)
        self.matrix = made(self.structure, rows, columns)
        for name, shape in self.matrix.shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        biases = rows // self.matrix.outputs_a_bias
        self.register_parameter("bias", nn.Parameter(torch.empty(biases)) if bias else None)
        if not any(p.is_meta for p in self.free.values()):  # without contents there is no start
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """A random start: the entries of the weight, and the bias, have the spread that torch gives a plain layer."""
        bound = 1 / math.sqrt(self.matrix.columns)
        with torch.no_grad():
            for name, value in self.matrix.start(bound / math.sqrt(3)).items():
                self.get_parameter(name).copy_(value)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    @property
    def free(self) -> dict[str, Tensor]:
        """The free parameters of the weight, by name."""
        return {name: cast(Tensor, self._parameters[name]) for name in self.matrix.shapes()}

    def dense(self) -> Tensor:
        """The weight that the free parameters make, in the shape that the plain layer has."""
        return self.matrix.matrix(self.free).view(self.weight_shape)

    def set_dense(self, weight: Tensor, bias: Tensor | None, steps: int = 0) -> None:
        """Sets the free parameters to some near a weight (see `structures.near`), and the bias."""
        with torch.no_grad():
            for name, value in near(self.matrix, weight.detach().flatten(1), steps).items():
                self.get_parameter(name).copy_(value)
            if bias is not None and self.bias is not None:
                self.bias.copy_(bias.view(len(self.bias), -1).mean(1))

    @property
    def biases(self) -> Tensor | None:
        """What is added to each output; several in a row may have one parameter."""
        each = self.matrix.outputs_a_bias
        return self.bias if self.bias is None or each == 1 else self.bias.unsqueeze(1).expand(-1, each).reshape(-1)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments().items())

    def arguments(self) -> dict[str, Any]:
        """The arguments that would build this layer again."""
        held = {name: getattr(self, name) for name in self.settings}
        return held | ({"bias": self.bias is not None} if "bias" in held else {})

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the plain layer's weight."""

    @abstractmethod
    def through(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the plain layer computes with this weight and bias."""

    @abstractmethod
    def macs(self, given: Sequence[int], out: Sequence[int]) -> int:
        """Multiplications of a call, by the shapes of its input and output; making the weight is among them."""


@final
class StructuredLinear(StructuredLayer):
    """`y = W x + b` with a structured W; executed as its structure does it (by Fourier transforms, say).

    >>> layer = StructuredLinear(8, 8, False, ("circulant", 0))
    >>> sum(p.numel() for p in layer.parameters()), tuple(layer.dense().shape)
    (8, (8, 8))
    """

    settings = ("in_features", "out_features", "bias", "structure")

    def __init__(self, in_features: int, out_features: int, bias: bool, structure: Sequence[Any]) -> None:
        super().__init__(structure, out_features, in_features, bias)
        self.in_features, self.out_features = in_features, out_features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.matrix.rows, self.matrix.columns

    def forward(self, x: Tensor) -> Tensor:
        y = self.matrix.product(x, self.free)
        return y if self.biases is None else y + self.biases

    def through(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def macs(self, given: Sequence[int], out: Sequence[int]) -> int:
        return self.matrix.macs(math.prod(given[:-1]))


@final
class StructuredConv2d(StructuredLayer):
    """A convolution whose weight, as a matrix (outputs, inputs of a group * kernel), is structured; made, then used."""

    settings = (*CONV, "bias", "structure")
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    groups: int

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | str | tuple[int, int],
        dilation: int | tuple[int, int],
        groups: int,
        bias: bool,
        padding_mode: str,
        structure: Sequence[Any],
    ) -> None:
        with torch.device("meta"):  # says how the convolution is done; its weight is never there
            args = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode)
            plain = nn.Conv2d(*args)  # type: ignore[arg-type]
        super().__init__(structure, out_channels, math.prod(plain.weight.shape[1:]), bias)
        self.__dict__["plain"] = plain
        for name in CONV:
            setattr(self, name, getattr(plain, name))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.__dict__["plain"].weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.through(x, self.dense(), self.biases)

    def through(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, self.__dict__["plain"]._conv_forward(x, weight, bias))

    def macs(self, given: Sequence[int], out: Sequence[int]) -> int:
        return math.prod(out) * self.matrix.columns + self.matrix.making()


@final
class StructuredEmbedding(StructuredLayer):
    """Rows of a structured matrix by their numbers; only those asked for are made.

    The row `padding_idx`, as torch has it, gets no gradient from where it is asked for.
    """

    settings = ("num_embeddings", "embedding_dim", "padding_idx", "structure")

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, structure: Sequence[Any]
    ) -> None:
        super().__init__(structure, num_embeddings, embedding_dim, False)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.matrix.rows, self.matrix.columns

    def forward(self, x: Tensor) -> Tensor:
        found = self.matrix.some_rows(self.free, x)
        if self.padding_idx is None:
            return found
        return torch.where((x == self.padding_idx % self.num_embeddings).unsqueeze(-1), found.detach(), found)

    def through(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight)

    def macs(self, given: Sequence[int], out: Sequence[int]) -> int:
        return 0


def from_dense(layer: nn.Module, structure: Sequence[Any], steps: int = 0) -> StructuredLayer:
    """The structured layer that comes near to a plain one: its weight projected, its bias kept.

    Args:
        steps: of L-BFGS that bring it nearer, where the projection is not the nearest.

    Raises:
        BadOption: the layer is of another type, or no such structure can be had at its size.
    """
    weight = cast(Tensor, layer.weight)
    bias = cast("Tensor | None", getattr(layer, "bias", None))
    if isinstance(layer, nn.Linear):
        new: StructuredLayer = StructuredLinear(layer.in_features, layer.out_features, bias is not None, structure)
    elif isinstance(layer, nn.Conv2d):
        args = {name: getattr(layer, name) for name in CONV}
        new = StructuredConv2d(**args, bias=bias is not None, structure=structure)
    elif isinstance(layer, nn.Embedding):
        new = StructuredEmbedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, structure)
    else:
        wanted = "linear layers, 2-d convolutions and embeddings"
        raise BadOption(f"a {type(layer).__name__} cannot be structured: choose {wanted}")
    new = new.to(weight.device, weight.dtype).train(layer.training)
    new.set_dense(weight, bias, steps)
    return new


# --- one operator while a network is traced ---------------------------------------------------------------------------

NAME = "structured_layer"


@contextmanager
def as_operators(model: nn.Module) -> Iterator[None]:
    """A block in which each structured layer is one operator, which a graph shows whole and can run."""
    found = [m for m in model.modules() if isinstance(m, StructuredLayer) and "forward" not in vars(m)]
    for module in found:
        module.forward = partial(_call, module)
    try:
        yield
    finally:
        for module in found:
            del module.__dict__["forward"]


def _call(layer: StructuredLayer, x: Tensor) -> Tensor:
    held = {name: p for name, p in layer._parameters.items() if p is not None}
    return _layer(x, list(held.values()), json.dumps([type(layer).__name__, list(held), layer.arguments()]))


def told_layer(told: str) -> tuple[StructuredLayer, tuple[str, ...]]:
    """The layer that an operator tells of, without contents, and the names of its parameters.

    Made anew at each call: kept, it would keep its structure's tables when the network is long gone.
    """
    kind, names, args = json.loads(told)
    make: Callable[..., StructuredLayer] = StructuredLayer.kinds[kind]
    with torch.device("meta"):
        layer = make(**{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})
    return layer, tuple(names)


@torch.library.custom_op("featherweight::structured_layer", mutates_args=())
def _layer(x: Tensor, held: list[Tensor], told: str) -> Tensor:
    layer, names = told_layer(told)
    return cast(Tensor, functional_call(layer, dict(zip(names, held, strict=True)), (x,)))


@_layer.register_fake
def _(x: Tensor, held: list[Tensor], told: str) -> Tensor:
    layer, _ = told_layer(told)
    return layer.through(x, held[0].new_empty(layer.weight_shape), None)
