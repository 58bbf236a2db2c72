"""Layers as one operator while a network is traced, where torch would look inside and fix sizes by that.

Of recurrent layers torch writes out every step of the sequence; grids on activations have operators without shapes of
their own. Only shapes flow through what stands here; the layers themselves are called when the network runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.core.forms import activation_forms
from featherweight.core.recurrent import SharedRecurrent, has_cell

KINDS: tuple[type[nn.Module], ...] = (nn.LSTM, nn.GRU, nn.RNN, SharedRecurrent)
Recurrent = nn.RNNBase | SharedRecurrent
NAME = "recurrent_layer"


@torch.library.custom_op("featherweight::recurrent_layer", mutates_args=())
def _layer(x: Tensor, states: list[Tensor], sizes: list[int], batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    raise RuntimeError("this operator stands for a recurrent layer while it is traced, and is never run")


@_layer.register_fake
def _(x: Tensor, states: list[Tensor], sizes: list[int], batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    layers, hidden, width, directions = sizes
    batch = x.shape[0] if batch_first else x.shape[1]
    out = x.new_empty((x.shape[0], x.shape[1], width * directions))
    return out, x.new_empty((layers, batch, width)), x.new_empty((layers, batch, hidden))


@contextmanager
def opaque_layers(model: nn.Module) -> Iterator[None]:
    """A block in which recurrent layers (of sequences in batches) and forms on activations are one operator each."""
    every = [m for m in model.modules() if isinstance(m, (nn.RNNBase, SharedRecurrent))]
    found = [m for m in every if type(m) in KINDS and "forward" not in vars(m)]
    held = [form for forms in activation_forms(model).values() for at, form in forms.items() if at != "grad"]
    forms = list(dict.fromkeys(held))  # one grid may stand at several places
    for module in found:
        module.forward = _standing_in(module)  # type: ignore[method-assign]
    for form in forms:
        form.forward = torch.ops.aten.alias.default  # type: ignore[method-assign]
    try:
        yield
    finally:
        for patched in (*found, *forms):
            del patched.__dict__["forward"]


def _standing_in(module: Recurrent) -> Callable[..., Any]:
    directions = 2 if module.bidirectional else 1
    sizes = [module.num_layers * directions, module.hidden_size, module.proj_size or module.hidden_size, directions]
    own = module.forward

    def forward(x: Any, hx: Any = None) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 3:
            return own(x, hx)
        states = [] if hx is None else list(hx) if isinstance(hx, (tuple, list)) else [hx]
        out, h, c = _layer(x, states, sizes, module.batch_first)
        return out, ((h, c) if has_cell(module) else h)

    return forward
