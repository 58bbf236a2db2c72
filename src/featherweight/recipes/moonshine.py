"""Moonshine: the teacher's own architecture with cheap convolutions learns where the teacher attends."""

from __future__ import annotations

from functools import partial

from torch import nn

from featherweight.allowed import Amount, Positive, Whole
from featherweight.catalogue import recipe
from featherweight.core.blocks import Between, Start
from featherweight.core.features import outputs, stages
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.restart import reinitialise
from featherweight.core.surgery import WhereConv2d
from featherweight.core.task import Task, first
from featherweight.core.taught import teacher_of
from featherweight.distill import Term, learn
from featherweight.errors import BadOption, unknown
from featherweight.ingredients.block.moonshine_blocks import BlockName, moonshine_blocks
from featherweight.ingredients.match.attention_transfer import attention_maps
from featherweight.ingredients.match.softened import softened
from featherweight.rewrite import exchange


@recipe(
    paper="Crowley, Gray and Storkey, NeurIPS 2018, arXiv:1711.02613",
    family="distill",
    needs={"labels", "train", "teacher"},
    shrinks={"factors"},
    small={"epochs": 1},
)
def moonshine(
    model: nn.Module,
    task: Task,
    *,
    block: BlockName = "G(N)",
    start: Start = "factors",
    between: Between = "norm",
    refit: Whole = 8,
    keep_first: bool = True,
    beta: Amount = 1000.0,
    soft: Amount = 0.0,
    temperature: Positive = 4.0,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereConv2d = None,
) -> nn.Module:
    """Replaces convolutions by cheap blocks, trains on labels and `3 beta / taps` times the attention maps' distance.

    The student has the teacher's layers at the teacher's paths, so the layers that are compared (the last one with maps
    of each size) belong together one to one.

    Departs from the paper: everything starts from the teacher (blocks from a factorization of its convolutions, then
    fitted by least squares), where the paper draws all weights anew: that is start="random"; the distance is the 1/2 of
    `attention_transfer`; Adam and fewer steps in place of 200 epochs of SGD; a convolution stays where the block would
    not be cheaper.

    Args:
        block: S, G(N), G(g), B(b), BG(b,g) or Conv2x2 with numbers for the letters (see `moonshine_blocks`).
        start: "factors" of the model's convolutions; "random" draws every weight of the network anew.
        between: "norm" for a batch norm and a rectifier between the parts of a block; "linear" for nothing.
        refit: calibration batches on which the last part of each block that starts from factors is fitted to what the
            layer put out; 0 leaves it out.
        keep_first: leaves the first convolution alone unless `where` chooses it.
        beta: weight of attention transfer, for three taps; as many taps as there are share it.
        soft: weight of the teacher's softened probabilities.
        temperature: of these.
        epochs: passes over the training data.
        lr: learning rate.
        optimizer: as in `fit`.
        where: which convolutions.

    Raises:
        BadOption: the model has no convolution, or the teacher no maps.
        UnknownName: the student lacks a layer at which the teacher is tapped.
        CompressionError: no convolution was replaced.
    """
    teacher = teacher_of(model, task)
    batch = first(task.calibrating(), "training")
    make = partial(moonshine_blocks, block=block, start=start, between=between)
    taps = stages(outputs(teacher, task, batch), "ends") if beta else []
    if beta and not taps:
        raise BadOption(
            f"beta={beta}: the teacher has no maps whose attention could be compared; pass beta=0 and soft="
        )
    exchange(model, task, make, where, keep_first=keep_first, refit=refit if start == "factors" else 0)
    for path in taps:
        if path not in (known := [p for p, _ in model.named_modules() if p]):
            raise unknown("layer of the student, at which the teacher is tapped,", path, known)
    if start == "random":
        reinitialise(model)
    note(f"attention is compared behind {', '.join(taps) or 'no layer'}")
    terms = {"attention": Term(attention_maps, 3 * beta / len(taps), [(p, p) for p in taps])} if taps else {}
    if soft:
        terms["softened"] = Term(partial(softened, temperature=temperature), soft, ())
    return learn(model, task, terms, epochs=epochs, lr=lr, optimizer=optimizer)
