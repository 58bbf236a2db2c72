"""The verb `rewrite`: convolutions become cheaper blocks, which start from them where the block can, then train."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive, Share, Whole, checked
from featherweight.catalogue import Slot, fill
from featherweight.core.capture import layer_io
from featherweight.core.exchange import example_inputs, unexchangeable
from featherweight.core.fit import Optimizers
from featherweight.core.forms import mask_of
from featherweight.core.ledger import note, skip
from featherweight.core.norms import undo_norms
from featherweight.core.reconstruct import Moments, augmented, gather, put, refusal
from featherweight.core.settings import plain, with_settings
from featherweight.core.structured import StructuredLayer
from featherweight.core.surgery import Where, WhereConv2d, swap, targets
from featherweight.core.task import Task, check_needs, eval_mode
from featherweight.core.taught import taught
from featherweight.errors import CompressionError

RIDGE = 1e-4
POSITIONS = 32  # of each sample's map that count for a fit
Block = Callable[..., nn.Module | str]
"""`(convolution, **settings) -> module` with its inputs and outputs, or why it cannot stand there.

An ingredient may declare `first`, that a network begins with it, and `around`, `(model, example inputs, **settings) ->
finish`, called before the exchange: `finish(replaced)` then changes what stands around the new layers.
"""


@checked()
def rewrite(
    model: nn.Module,
    task: Task,
    *,
    block: Annotated[str, Slot("block")] | Block = "moonshine_blocks",
    settings: Mapping[str, Any] | None = None,
    refit: Whole = 0,
    keep_first: bool = True,
    teacher_share: Share = 0.0,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereConv2d = None,
) -> nn.Module:
    """Exchanges convolutions for blocks, all at once, then trains the whole network.

    A layer stays as it is, and is reported, where the block cannot stand, or would need as many parameters or more
    multiplications.

    Args:
        block: what takes the place of a convolution (slot `block`).
        settings: options of the block, such as {"block": "B(2)"}.
        refit: calibration batches on which the last convolution of each block is fitted, by least squares, to what the
            layer put out; 0 leaves it out.
        keep_first: leaves the first convolution alone, unless `where` chooses it or the block begins with it.
        teacher_share: share of the teacher's softened probabilities in the loss; the labels have the rest.
        epochs: of training; 0 needs no training data.
        lr: learning rate.
        optimizer: as in `fit`.
        where: which convolutions.

    Raises:
        BadOption: the model has no convolution, or a setting that the block does not take.
        MissingNeed: training without labelled training data.
        CompressionError: no layer was replaced.
    """
    make = with_settings(fill("block", block), settings or {})
    if epochs:
        check_needs({"labels", "train"}, task, "training")
    exchange(model, task, make, where, keep_first=keep_first, refit=refit)
    step = taught(task, model, teacher_share)
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step) if epochs else model


def exchange(
    model: nn.Module, task: Task, make: Block, where: Where = None, *, keep_first: bool = True, refit: int = 0
) -> dict[str, nn.Module]:
    """Exchanges convolutions for blocks, in place, and returns these by path; what stays is reported.

    Batch norms inside of blocks hand on what they are given, so that only rectifiers tell a block from its start.

    Raises:
        BadOption: the model has no convolution.
        CompressionError: no layer was replaced.
    """
    layers = targets(model, where, (nn.Conv2d,))
    called = example_inputs(model, task, [p for p, m in model.named_modules() if isinstance(m, nn.Conv2d)])
    facts: dict[str, Any] = getattr(plain(make), "__ingredient__", ("", {}))[1]
    first = next(iter(called), "") if keep_first and where is None and not facts.get("first") else ""
    set_so = make.keywords if isinstance(make, partial) else {}
    finish = facts["around"](model, task.inputs(), **set_so) if "around" in facts else None
    original = copy.deepcopy(model) if refit else model
    reasons: dict[str, str] = {}
    replaced: dict[str, nn.Module] = {}
    for path, layer in layers.items():
        new = fitting(model, path, layer, make, called.get(path), first)
        if isinstance(new, str):
            reasons[path] = new
            skip(path, new)
            continue
        if mask_of(layer) is not None:
            note(f"the block in the place of {path} is dense: its pruned weights are zeros no more")
        replaced[path] = swap(model, path, new)
    if not replaced:
        why = "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:3])
        raise CompressionError(f"no convolution was rewritten ({why}): choose another block or other layers")
    note(f"{len(replaced)} of {len(layers)} convolutions rewritten")
    if finish is not None:
        finish(replaced)
    norms = [m for new in replaced.values() for m in new.modules() if isinstance(m, nn.BatchNorm2d)]
    if task.train is not None or task.calibration is not None:
        undo_norms(model, task, norms)
    for path in (path for path in called if path in replaced and refit):
        refitted(model, original, task, path, refit)
    return replaced


def refitted(model: nn.Module, original: nn.Module, task: Task, path: str, batches: int) -> None:
    """Fits the last convolution of a block, behind the blocks before it, to what the original layer put out.

    Raises:
        MissingNeed: the task has neither calibration nor training data.
        BadData: the data are empty.
    """
    name, last = list(model.get_submodule(path).named_modules(prefix=path))[-1]
    if reason := refusal(last):
        note(f"{path} is not fitted: {reason}")
        return

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        data, generator = list(islice(task.calibrating(), batches)), torch.Generator().manual_seed(0)
        pairs = zip(layer_io(model, name, task, data), layer_io(original, path, task, data), strict=True)
        for (seen, _), (_, wanted) in pairs:
            yield from gather(last, seen, wanted, POSITIONS, generator)

    moments, weight = Moments.of(rows()), augmented(last)
    free = torch.ones(weight.shape[1], dtype=torch.bool)
    free[-1] = getattr(last, "bias", None) is not None
    new = moments.refit(weight, free, RIDGE)
    put(last, new.to("cpu"))
    told = [float((moments.error(w).sum() / moments.energy.sum().clamp_min(1e-30)).sqrt()) for w in (weight, new)]
    note(f"{path}: {told[0]:.0%} off what it put out, {told[1]:.0%} when fitted")


def fitting(
    model: nn.Module, path: str, layer: nn.Module, make: Block, seen: Tensor | None, first: str
) -> nn.Module | str:
    """The block in the place of a layer, or why the layer stays."""
    if path == first:
        return "the first convolution, which sees the data: choose it by where="
    if (reason := unexchangeable(model, layer, seen)) or seen is None:
        return reason
    new = make(layer)
    return new if isinstance(new, str) else dearer(layer, new, seen) or new


def dearer(old: nn.Module, new: nn.Module, example: Tensor) -> str:
    """Why a block is not cheaper than a layer; empty if it is."""
    (params, macs), (params_of_new, macs_of_new) = (spent(m, example) for m in (old, new))
    if params_of_new < params and macs_of_new <= macs:
        return ""
    return f"the block would need {params_of_new:,} parameters and {macs_of_new:,} MACs, it has {params:,} and {macs:,}"


def spent(module: nn.Module, example: Tensor) -> tuple[int, int]:
    """Parameters, and multiply-accumulates on one sample in linear, convolution and structured layers."""
    macs = 0

    def count(layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(layer, StructuredLayer):
            macs += layer.macs(args[0].shape, output.shape) // len(example)
        else:
            macs += output.numel() // len(layer.weight) * layer.weight.numel() // len(example)

    leaves = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d, StructuredLayer))]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    try:
        with torch.no_grad(), eval_mode(module):
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return sum(p.numel() for p in module.parameters()), macs
