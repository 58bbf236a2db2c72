"""Rate-distortion optimised rounding: fewer bits for little error, and exactly the nearest integers without a rate."""

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


def test_one_state_means_one_grid_of_integers_for_weights_and_biases() -> None:
    one = bake(rdoq(small_cnn(), small_task(), loss=0.001, calibration_batches=2))
    for name in ("weight", "bias"):
        codes = codes_of(one[8], name)
        assert codes is not None
        assert torch.equal(codes.decode(), getattr(one[8], name))


def test_a_loss_beyond_the_numbers_is_refused() -> None:
    with pytest.raises(BadOption, match="choose a larger one"):
        rdoq(small_cnn(), small_task(), loss=1e-18, calibration_batches=1)
