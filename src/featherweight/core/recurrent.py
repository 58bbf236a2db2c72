"""Recurrent layers whose matrices are thin products with shared factors: `SharedRecurrent`."""

from __future__ import annotations

import math
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn

from featherweight.core.structures import MOST
from featherweight.errors import BadData, BadOption

Cell = Literal["LSTM", "GRU", "RNN_TANH", "RNN_RELU"]
GATES: dict[str, int] = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
State = Tensor | tuple[Tensor, Tensor]


@final
class SharedRecurrent(nn.Module):
    """`nn.LSTM`, `nn.GRU` or `nn.RNN` in which all that reads the state of a layer reads it through one matrix.

    Of layer l with directions d: `W_hh[l, d] = recurrent[l, d] P[l, d]` and, of the layer behind it,
    `W_ih[l + 1, d] = [between[l, d, e] P[l, e] for each direction e]`. P (`projection`) has `rank` rows; all gates
    share it. The matrices are made at each call, then the plain layer runs.

    Takes sequences in batches, and states as the plain layer does.
    """

    first: Tensor  # (directions, gates * hidden, inputs)
    projection: Tensor  # (layers, directions, rank, hidden)
    recurrent: Tensor  # (layers, directions, gates * hidden, rank)
    between: Tensor | None  # (layers - 1, directions, directions, gates * hidden, rank)

    def __init__(
        self,
        *,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        rank: int,
    ) -> None:
        super().__init__()
        self.cell, self.input_size, self.hidden_size, self.num_layers = cell, input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.rank, self.proj_size = rank, 0
        wide, directions = GATES[cell] * hidden_size, self.directions
        if wide * max(input_size, directions * hidden_size) > MOST or not 1 <= rank <= hidden_size:
            raise BadOption(
                f"a {cell} of {hidden_size} units and rank {rank}: the rank must be from 1 to the units, "
                f"a matrix have at most {MOST} entries"
            )
        for name, shape in self.shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        for name in {"between", "bias_ih", "bias_hh"} - self.shapes().keys():
            self.register_parameter(name, None)
        self.reset_parameters()

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters by name, and their shapes."""
        layers, ways, wide = self.num_layers, self.directions, GATES[self.cell] * self.hidden_size
        found: dict[str, tuple[int, ...]] = {
            "first": (ways, wide, self.input_size),
            "projection": (layers, ways, self.rank, self.hidden_size),
            "recurrent": (layers, ways, wide, self.rank),
        }
        found |= {"between": (layers - 1, ways, ways, wide, self.rank)} if layers > 1 else {}
        return found | (dict.fromkeys(("bias_ih", "bias_hh"), (layers, ways, wide)) if self.bias else {})

    def reset_parameters(self) -> None:
        """A random start: as torch's, P so large that products with it are as large as a plain matrix."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name, p in self.named_parameters():
            scale = math.sqrt(3 / self.rank) if name == "projection" else bound
            nn.init.uniform_(p, -scale, scale)

    def weights(self) -> list[Tensor]:
        """The plain layer's weights and biases, in its order."""
        found: list[Tensor] = []
        for layer in range(self.num_layers):
            for way in range(self.directions):
                found += [self._read(layer, way), self.recurrent[layer, way] @ self.projection[layer, way]]
                if self.bias:
                    found += [cast(Tensor, b)[layer, way] for b in (self.bias_ih, self.bias_hh)]
        return found

    def _read(self, layer: int, way: int) -> Tensor:
        """The matrix on the inputs of a layer: for the first as it is, behind it with the factors of what it reads."""
        if layer == 0:
            return self.first[way]
        thin = cast(Tensor, self.between)[layer - 1, way]
        return torch.cat([z @ p for z, p in zip(thin, self.projection[layer - 1], strict=True)], 1)

    def forward(self, x: Tensor, hx: State | None = None) -> tuple[Tensor, State]:
        """As the plain layer.

        Raises:
            BadData: the input is no batch of sequences.
        """
        if x.dim() != 3:
            raise BadData(f"an input of shape {tuple(x.shape)}: a shared recurrent layer takes batches of sequences")
        if hx is None:
            zero = x.new_zeros(
                self.num_layers * self.directions, x.shape[0 if self.batch_first else 1], self.hidden_size
            )
            hx = (zero, zero) if self.cell == "LSTM" else zero
        rest = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
        out, *states = RUN[self.cell](x, hx, self.weights(), *rest)
        return out, tuple(states) if self.cell == "LSTM" else states[0]

    def making(self) -> int:
        """Multiplications that making the matrices takes, once a call."""
        products = self.num_layers * self.directions + (self.num_layers - 1) * self.directions**2
        return products * GATES[self.cell] * self.hidden_size**2 * self.rank

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in SETTINGS)


SETTINGS = (
    *("cell", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "rank"),
)
RUN: dict[str, Any] = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}


def shared(layer: nn.RNNBase, rank: int) -> SharedRecurrent:
    """The layer of that rank which comes near to a plain one.

    P[l] has the first right singular vectors of `W_hh[l]`, `recurrent` and `between` are the matrices read through it.
    """
    args = {name: getattr(layer, name) for name in SETTINGS if name not in ("cell", "rank")}
    new = SharedRecurrent(cell=cast(Cell, layer.mode), rank=rank, **args)
    like = cast(Tensor, layer.weight_ih_l0)
    new.to(like.device, like.dtype).train(layer.training)
    suffixes = ("", "_reverse")[: new.directions]
    with torch.no_grad():
        for number in range(new.num_layers):
            for way, suffix in enumerate(suffixes):
                _set(new, layer, number, way, f"l{number}{suffix}")
    return new


def _set(new: SharedRecurrent, layer: nn.RNNBase, number: int, way: int, name: str) -> None:
    held = {kind: getattr(layer, f"{kind}_{name}").detach() for kind in ("weight_ih", "weight_hh")}
    right = torch.linalg.svd(held["weight_hh"].double(), full_matrices=False)[2][: new.rank].to(held["weight_hh"])
    new.projection[number, way] = right
    new.recurrent[number, way] = held["weight_hh"] @ right.T
    if number == 0:
        new.first[way] = held["weight_ih"]
    else:  # this layer's factors of the states before it, which are set by now
        thin = zip(held["weight_ih"].chunk(new.directions, 1), new.projection[number - 1], strict=True)
        cast(Tensor, new.between)[number - 1, way] = torch.stack([w @ p.T for w, p in thin])
    for kind in ("bias_ih", "bias_hh") if new.bias else ():
        getattr(new, kind)[number, way] = getattr(layer, f"{kind}_{name}")


def has_cell(layer: nn.Module) -> bool:
    """Whether the state of a recurrent layer is a pair, as that of an LSTM."""
    return isinstance(layer, nn.LSTM) or (isinstance(layer, SharedRecurrent) and layer.cell == "LSTM")


def dense_size(layer: nn.RNNBase | SharedRecurrent) -> int:
    """Parameters of the plain layer's matrices."""
    gates = GATES[layer.cell if isinstance(layer, SharedRecurrent) else layer.mode] * layer.hidden_size
    ways = 2 if layer.bidirectional else 1
    inputs = layer.input_size + (layer.num_layers - 1) * ways * layer.hidden_size
    return gates * ways * (inputs + layer.num_layers * layer.hidden_size)
