"""Factorized embeddings (ALBERT; Lan et al., ICLR 2020): tokens have short vectors, one matrix widens them all."""

from __future__ import annotations

from typing import Annotated, cast

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.exchange import example_inputs, unexchangeable
from featherweight.core.fit import Optimizers
from featherweight.core.forms import mask_of
from featherweight.core.ledger import note, skip
from featherweight.core.surgery import Layers, Where, swap, targets
from featherweight.core.task import Task, device_of, eval_mode, to_device
from featherweight.errors import CompressionError


@recipe(
    paper="Lan et al., ICLR 2020, arXiv:1909.11942, section 3.1",
    family="share",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"width": 4, "epochs": 1},
)
def albert_embedding(
    model: nn.Module,
    task: Task,
    *,
    width: Count = 128,
    epochs: Amount = 5,
    lr: Positive = 1e-4,
    optimizer: Optimizers = None,
    where: Annotated[Where, Layers((nn.Embedding,))] = None,
) -> nn.Module:
    """Replaces an embedding of V tokens in H dimensions by one in E dimensions and a matrix from E to H, then trains.

    Zhenzhong Lan, Mingda Chen, Sebastian Goodman, Kevin Gimpel, Piyush Sharma, Radu Soricut, "ALBERT: A Lite BERT for
    Self-supervised Learning of Language Representations", ICLR 2020, arXiv:1909.11942, section 3.1: V H parameters
    become V E + E H. An output layer that is tied to the embedding becomes a matrix from H to E and the short embedding
    itself, as in the paper's head, H E parameters more. The start is the singular value decomposition of the
    embedding, cut after E values: no product of these shapes is nearer to it.

    Departs from the paper: the network given is trained already, so both factors start at that decomposition and not
    at random; the head's matrix has no bias, activation and norm behind it, which would change what is computed. A
    lookup has no multiplications, the product with the matrix has E H a token: the file gets smaller, not the work
    (unless a tied output layer does).

    Args:
        width: E, the dimensions of the short embedding.
        epochs: training after the replacement.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw", "sgd" or "momentum".
        where: which embeddings; all of them when left out.

    Raises:
        BadOption: the network has no embedding.
        CompressionError: no embedding would get smaller.
    """
    layers = targets(model, where, (nn.Embedding,))
    inputs = example_inputs(model, task, list(layers))
    reasons = {path: _factorized(model, task, path, layer, inputs.get(path), width) for path, layer in layers.items()}
    for path, reason in reasons.items():
        if reason:
            skip(path, reason)
    if all(reasons.values()):
        why = "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
        raise CompressionError(f"no embedding was factorized ({why}): pass a smaller width= or other embeddings")
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train embeddings")


def _factorized(model: nn.Module, task: Task, path: str, layer: nn.Module, seen: Tensor | None, width: int) -> str:
    """Replaces one embedding, and the output layers that are tied to it; why not, where it stays."""
    layer = cast(nn.Embedding, layer)
    heads = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight is layer.weight}
    if reason := unexchangeable(model, layer, seen, tied=heads.values()):
        return reason
    tokens, wide = layer.weight.shape
    after = tokens * width + width * wide * (1 + bool(heads))
    if after >= tokens * wide:
        return f"{width} dimensions would need {after:,} parameters, it has {tokens * wide:,}"
    if mask_of(layer) is not None:
        note(f"the factors of {path} are dense: its pruned weights are zeros no more")
    short, widen = factors(layer.weight.detach(), width)
    embedding = nn.Embedding(tokens, width, layer.padding_idx, _weight=short)
    found: dict[str, nn.Module] = {path: nn.Sequential(embedding, _linear(widen.T))}
    for name, head in heads.items():
        out = nn.Linear(width, tokens, head.bias is not None, dtype=short.dtype)
        out.weight, out.bias = embedding.weight, head.bias
        found[name] = nn.Sequential(_linear(widen), out)
    return _swapped(model, task, path, found) or _told(path, layer.weight, short @ widen, after)


def factors(weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The product of shapes (V, E) and (E, H) that is nearest to a matrix (V, H), by its singular values."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :width] * s[:width]).to(weight.dtype).contiguous(), vh[:width].to(weight.dtype).contiguous()


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


def _swapped(model: nn.Module, task: Task, path: str, found: dict[str, nn.Module]) -> str:
    """Puts layers in their places, unless the model then no longer runs: its code reads the weight beside calling."""
    before = {name: model.get_submodule(name) for name in found}
    for name, new in found.items():
        swap(model, name, new)
    args, kwargs = to_device(task.inputs(), device_of(model))
    try:
        with eval_mode(model):
            model(*args, **kwargs)
    except AttributeError as error:
        for name, old in before.items():
            marked = getattr(old, "_fw_swapped", False)
            swap(model, name, old)
            old._fw_swapped = marked  # type: ignore[assignment]
        return f"the model's own code reads it beside calling it ({error})"
    return ""


def _told(path: str, weight: Tensor, product: Tensor, after: int) -> str:
    lost = float((weight.detach() - product).norm() / weight.detach().norm().clamp(min=1e-30))
    note(f"{path}: {after:,} of {weight.numel():,} parameters, {lost:.0%} of the embedding off before training")
    return ""
