"""The sign of every weight, times one number for the layer: one bit a weight, no training.

Yunchao Gong, Liu Liu, Ming Yang, Lubomir Bourdev, "Compressing Deep Convolutional Networks using Vector Quantization",
2014, arXiv:1412.6115, section 3.2: `w = 1 if w >= 0 else -1`, the aggressive end of what vector quantization can do.

Departs from the paper: the sign is multiplied by the layer's mean size, `argmin_a |W - a sign(W)|^2 = mean|W|`, without
which the outputs of a trained network have another scale; zeros keep a value of their own; convolutions become signs
too (where="Linear" is the paper's choice).
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient, method


@ingredient("cluster")
def signs(values: Tensor, centroids: Tensor) -> Tensor:
    """Two centroids, minus and plus the mean size of the values, float64, whatever number is given.

    >>> signs(torch.tensor([1.0, -2.0, 3.0]), torch.zeros(2)).tolist()
    [-2.0, 2.0]
    """
    size = values.detach().double().cpu().abs().mean()
    return torch.stack([-size, size])


gong_binary = method(
    "share",
    cluster=signs,
    weight_bits=1,
    epochs=0,
    paper="Gong et al., 2014, arXiv:1412.6115, section 3.2",
    shrinks={"bits"},
    small={"epochs": 0},
)
