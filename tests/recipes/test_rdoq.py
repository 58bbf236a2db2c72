"""Rate-distortion optimised rounding: fewer bits for little error, and exactly the nearest integers without a rate."""

import copy

import numpy as np
import pytest
import torch

from conftest import small_cnn, small_task
from featherweight.coding.bits import entropy_bits
from featherweight.core.forms import bake, codes_of
from featherweight.core.trellis import quantized
from featherweight.errors import BadOption
from featherweight.recipes.rdoq import rdoq


def test_at_equal_bits_its_error_is_below_that_of_rounding_to_the_nearest() -> None:
    weight = np.random.default_rng(0).laplace(0, 1, (200, 300))

    def found(step: float, rate: float) -> tuple[float, float]:
        points = quantized(weight, step, 1, rate)
        bits = entropy_bits(np.unique(points, return_counts=True)[1]) / weight.size
        return bits, float(((weight - points * step) ** 2).mean())

    nearest = np.array([found(step, 0.0) for step in np.geomspace(0.6, 3, 9)])
    bits, error = found(1.2, 0.15)
    assert error < 0.97 * np.interp(bits, nearest[::-1, 0], nearest[::-1, 1])


def test_without_a_rate_every_weight_goes_to_the_nearest_integer() -> None:
    model, task = small_cnn(), small_task()
    one = bake(rdoq(copy.deepcopy(model), task, rate=0.0, calibration_batches=2))
    codes = codes_of(one[0])
    assert codes is not None
    assert torch.equal(codes.symbols.double(), (model[0].weight.detach().double() / codes.rule.scale.double()).round())


def test_a_loss_beyond_the_numbers_is_refused() -> None:
    with pytest.raises(BadOption, match="choose a larger one"):
        rdoq(small_cnn(), small_task(), loss=1e-18, calibration_batches=1)
