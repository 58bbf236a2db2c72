"""Feature mimicking of detectors: a small detector learns a large one's features in regions, then its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.features import matched
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.surgery import Layer
from featherweight.core.task import Task, first
from featherweight.core.taught import teacher_of
from featherweight.distill import Adapter, Term, learn
from featherweight.errors import BadData
from featherweight.ingredients.adapter.one_by_one_match import one_by_one_match
from featherweight.ingredients.match.region_features import Regions, region_features, region_outputs


@recipe(
    paper="Li, Jin and Yan, CVPR 2017",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1, "output_epochs": 1},
)
def mimic_detection(
    model: nn.Module,
    task: Task,
    *,
    regions: Regions | None = None,
    guided: Annotated[str, Layer("student")] | None = None,
    hint: Annotated[str, Layer("teacher")] | None = None,
    proposals: Count = 256,
    weight: Amount = 1.0,
    output_weight: Amount = 1.0,
    epochs: Amount = 10,
    output_epochs: Amount = 5,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Stage 1 trains on `L_gt + lambda L_m`, L_m of features in regions; stage 2 on the outputs there, too.

    L_gt is the task's loss, of classes and boxes. Regions are proposals of the student itself, or the boxes of the
    labels. The teacher may see a larger image (`task.teacher_split`): the student's crops are interpolated.
    Source: Mimicking Very Efficient Network for Object Detection.

    Departs from the paper: only secondary sources were available. Regions are drawn from the whole batch; layers that
    are not named are the last maps of both networks; a 1x1 convolution without bias joins their channels. The paper's
    second stage is a network of its own on pooled regions (Fast R-CNN): here the one network goes on, and its output
    maps are compared in the regions: the first tensor that it puts out, which is also what `regions` is given.
    Networks of classes count as detectors of one place, their whole image. Adam.

    Args:
        regions: (student's output, batch) -> boxes of each image, (boxes, 4): left, top, right, bottom as fractions of
            the image; when left out what the labels have under "boxes", or else the whole image.
        guided: the student's layer.
        hint: the teacher's layer.
        proposals: N, how many regions of a batch.
        weight: lambda, of the features.
        output_weight: of the outputs in stage 2.
        epochs: passes of stage 1.
        output_epochs: passes of stage 2.
        lr: learning rate of each stage.
        optimizer: as in `fit`.

    Raises:
        BadData: the labels' boxes are no fractions of the image; or regions are no boxes.
        BadOption: the networks have no maps, or put out unequally many channels.
    """
    teacher = teacher_of(model, task)
    batch = first(task.train or (), "training")
    if guided is None or hint is None:
        ours, theirs = matched(model, teacher, task, batch, "top")[0]
        guided, hint = guided or ours, hint or theirs
    found, adapter = regions or labelled(task, batch), lasting()
    note(f"the student's layer {guided} mimics the teacher's layer {hint} in {told(regions, found)}")
    terms = {"regions": Term(partial(region_features, regions=found, count=proposals), weight, [(guided, hint)])}
    learn(model, task, terms, adapter=adapter, epochs=epochs, lr=lr, optimizer=optimizer)
    if output_epochs:
        terms["outputs"] = Term(partial(region_outputs, regions=found, count=proposals), output_weight)
        learn(model, task, terms, adapter=adapter, epochs=output_epochs, lr=lr, optimizer=optimizer)
    return model


def lasting() -> Adapter:
    """One 1x1 convolution for both stages: the second goes on with the one that the first has trained."""
    made: list[nn.Module] = []

    def adapter(ours: Tensor, theirs: Tensor) -> nn.Module:
        made.extend([] if made else [one_by_one_match(ours, theirs)])
        return made[0]

    return adapter


def labelled(task: Task, batch: Any) -> Regions | None:
    """Takes the boxes of the labels, a mapping or one for each image; None where they have none.

    Raises:
        BadData: they are pixels, when it is asked.
    """

    def boxes(output: Tensor, batch: Any) -> Any:
        target = task.split(batch)[2]
        found = target["boxes"] if isinstance(target, Mapping) else [one["boxes"] for one in target]
        far = max((float(one.max()) for one in found if one.numel()), default=0.0)
        if far > 2:  # what augmentation pushes over the edge stays below
            raise BadData(
                f"the labels' boxes reach {far:.4g}, expected left, top, right, bottom as fractions of the image: "
                "pass regions=, which divides pixels by its sides"
            )
        return found

    target = task.split(batch)[2]
    several = target if isinstance(target, (list, tuple)) else [target]
    return boxes if several and all(isinstance(t, Mapping) and "boxes" in t for t in several) else None


def told(given: Regions | None, found: Regions | None) -> str:
    """Where the regions come from, in words."""
    if given is not None:
        return "proposals"
    return "the boxes of the labels" if found else "the whole image: the labels have no boxes"
