"""Huang and Wang 2017: the distribution of channels, not their order or number; what a kernel cannot see."""

import pytest
import torch

from featherweight.ingredients.match.nst_mmd import mmd2, patterns, second_moment, selectivity
from matches import loss


@pytest.mark.parametrize("kernel", ["linear", "polynomial", "gaussian"])
def test_zero_for_equal_permuted_and_duplicated_channels(kernel):
    f = torch.randn(3, 6, 3, 4, dtype=torch.float64)
    for same in (f, f[:, torch.randperm(6)], torch.cat([f, f], 1), 5 * f):
        assert abs(float(loss(selectivity, same, f, kernel=kernel))) < 1e-12
    assert float(loss(selectivity, torch.randn_like(f), f, kernel=kernel)) > 1e-3


def test_polynomial_kernel_is_blind_to_signs_and_the_linear_one_is_not():
    f = torch.randn(3, 6, 3, 4, dtype=torch.float64)
    assert abs(float(loss(selectivity, -f, f))) < 1e-12
    assert float(loss(selectivity, -f, f, kernel="linear")) > 0.1


def test_polynomial_kernel_is_the_distance_of_second_moments():
    a, b = (patterns(torch.randn(2, c, 3, 3, dtype=torch.float64)) for c in (5, 7))
    gaps = (second_moment(a) - second_moment(b)).square().sum((1, 2))
    torch.testing.assert_close(mmd2(a, b), gaps, rtol=1e-10, atol=1e-14)
    many = [patterns(torch.randn(2, c, 2, 2, dtype=torch.float64)) for c in (9, 11)]  # fewer positions than channels
    kernels = [(x @ y.mT).square().mean((1, 2)) for x, y in ((many[0],) * 2, (many[1],) * 2, (many[0], many[1]))]
    torch.testing.assert_close(mmd2(*many), kernels[0] + kernels[1] - 2 * kernels[2], rtol=1e-10, atol=1e-14)
