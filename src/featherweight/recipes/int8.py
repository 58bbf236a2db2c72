"""Integers of eight bits without training: what a runtime executes with integer kernels."""

from __future__ import annotations

from typing import Literal

from torch import nn

from featherweight.allowed import Count
from featherweight.catalogue import recipe
from featherweight.core.fold import fold_batchnorm
from featherweight.core.ledger import note
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.errors import TraceError
from featherweight.quantize import quantize


@recipe(
    paper="Krishnamoorthi, 2018, arXiv:1806.08342",
    family="quantize",
    needs={"calibration"},
    shrinks={"bits"},
    small={"calibration_batches": 2},
)
def int8(
    model: nn.Module,
    task: Task,
    *,
    calibrator: Literal["minmax", "percentile", "mse", "entropy"] = "minmax",
    calibration_batches: Count = 16,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Post-training int8: batch norm folded, weights per channel, calibrated unsigned activations, biases int32.

    Raghuraman Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A whitepaper", 2018,
    sec. 3.1: weights symmetric per channel, activations affine per tensor.

    Departs from the paper: weights use -127..127 (no -128); grids also stand on the results of additions,
    concatenations and pooling, so that a runtime never leaves integers between two layers; the model's outputs stay
    float. Linear and Conv2d layers with any bias, groups, dilation, stride and padding are quantized; layers of other
    types are reported and stay float.

    Args:
        calibrator: how a range follows from what was seen: "minmax", "percentile" (all but 0.01 %),
            "mse" (least squared error) or "entropy" (least divergence, as TensorRT does).
        calibration_batches: how many batches of the calibration (or training) data to look at.
        where: which layers; all Linear and Conv2d layers when left out.
    """
    try:
        fold_batchnorm(model, task.inputs())
    except TraceError as error:
        note(f"batch norm is not folded: {error}")
    return quantize(
        model,
        task,
        weights="symmetric",
        acts=calibrator,
        place="fused",
        calibration_batches=calibration_batches,
        where=where,
    )
