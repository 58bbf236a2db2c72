"""Compact recurrent networks (Lu et al., ICASSP 2016): a layer's state is read through one thin matrix."""

from __future__ import annotations

from typing import Annotated, cast

from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.exchange import example_inputs
from featherweight.core.fit import Optimizers
from featherweight.core.forms import ACTIVATIONS, activation_form, form_names, owners
from featherweight.core.ledger import note, recording, skip
from featherweight.core.recurrent import dense_size, shared
from featherweight.core.surgery import Layers, Where, swap, targets
from featherweight.core.task import Task
from featherweight.errors import CompressionError
from featherweight.factorize import Part

KINDS = (nn.LSTM, nn.GRU, nn.RNN)


@recipe(
    paper="Lu et al., ICASSP 2016, arXiv:1604.02594",
    family="share",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
def compact_rnn_sharing(
    model: nn.Module,
    task: Task,
    *,
    rank: Count | Part = 0.25,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: Annotated[Where, Layers(KINDS)] = None,
) -> nn.Module:
    """Factorizes the matrices on a recurrent layer's state with one factor for all of them, then trains the network.

    Zhiyun Lu, Vikas Sindhwani, Tara N. Sainath, "Learning compact recurrent neural networks", ICASSP 2016,
    arXiv:1604.02594. `W_h[l] = Z_h[l] P[l]` and `W_x[l + 1] = Z_x[l + 1] P[l]`: P, of r rows, is shared by all gates,
    by the recurrence and by the layer behind. It starts at the first r right singular vectors of W_h[l], the other
    factors at the least squares that follow, `W P^T`. The matrices are made at each call and the plain layer runs: the
    states stay whole, the bytes get fewer, the multiplications do not.

    Departs from the paper: the network given is trained already (the paper trains from random weights); the matrix on
    the inputs of the first layer stays; the paper's other sharing, Toeplitz-like matrices in the lower layers, is not
    here.

    Args:
        rank: r, or a fraction of the hidden units; never more than they are.
        epochs: training after the replacement.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw", "sgd" or "momentum".
        where: which LSTM, GRU and RNN layers; all of them when left out.

    Raises:
        BadOption: the network has no recurrent layer.
        CompressionError: none would get smaller.
    """
    with recording():  # that linear layers are not recurrent is no remark
        layers = cast("dict[str, nn.RNNBase]", targets(model, where, KINDS))
    inputs = example_inputs(model, task, list(layers))
    reasons = {path: _shared(model, path, layer, inputs.get(path), rank) for path, layer in layers.items()}
    for path, reason in reasons.items():
        if reason:
            skip(path, reason)
    if all(reasons.values()):
        why = "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
        raise CompressionError(f"no recurrent layer was shared ({why}): pass a lower rank= or other layers")
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train shared factors")


def _shared(model: nn.Module, path: str, layer: nn.RNNBase, seen: Tensor | None, rank: float) -> str:
    """Replaces one layer; why not, where it stays."""
    if reason := _stays(model, layer, seen):
        return reason
    wanted = rank if isinstance(rank, int) else round(rank * layer.hidden_size)
    new = shared(layer, max(1, min(wanted, layer.hidden_size)))
    before, after = dense_size(layer), sum(p.numel() for name, p in new.named_parameters() if "bias" not in name)
    if after >= before:
        return f"rank {new.rank} would need {after:,} parameters, it has {before:,}"
    note(f"{path}: rank {new.rank} of {layer.hidden_size}, {after:,} of {before:,} parameters beside the biases")
    swap(model, path, new)
    return ""


def _stays(model: nn.Module, layer: nn.RNNBase, seen: Tensor | None) -> str:
    """Why a recurrent layer cannot be exchanged; empty if it can."""
    if type(layer) not in KINDS or "forward" in vars(layer):
        return f"a {type(layer).__name__} that computes something else than {', '.join(k.__name__ for k in KINDS)}"
    if layer.proj_size:
        return "it has projections already"
    if seen is None or seen.dim() != 3:
        return "the model does not call it on a batch of sequences"
    if form_names(layer) or any(activation_form(layer, at) is not None for at in ACTIVATIONS):
        return "forms stand on its weights or activations: share before that"
    if any(len(owners(model, layer, name)) > 1 for name in layer._parameters):
        return "its weights are shared with another layer"
    return ""
