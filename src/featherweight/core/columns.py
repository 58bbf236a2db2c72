"""A convolution as a matrix product, without the rows of the matrix of patches that no filter reads.

Zeros at the same places in all filters of a layer (shapes, strided kernels) make both matrices smaller, exactly.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def live_columns(weight: Tensor) -> Tensor:
    """Which places `(input, y, x)` any filter reads, flat: a column of the weight's matrix, a row of the patches'.

    >>> from torch import tensor
    >>> live_columns(tensor([[[[1.0, 0.0]]], [[[2.0, 0.0]]]])).tolist()
    [True, False]
    """
    return (weight != 0).flatten(1).any(0)


def reduced_product(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What the convolution puts out, from the live columns alone: `W[:, live] @ patches[live] + b`, of its shape.

    The layer has one group and pads with zeros.
    """
    live = live_columns(layer.weight)
    padding = layer._reversed_padding_repeated_twice
    patches = F.unfold(F.pad(x, padding), layer.kernel_size, layer.dilation, 0, layer.stride)
    product = layer.weight.flatten(1)[:, live] @ patches[:, live]
    product = product if layer.bias is None else product + layer.bias[:, None]
    size = [
        (n + before + behind - d * (k - 1) - 1) // s + 1
        for n, before, behind, d, k, s in zip(
            x.shape[2:], padding[2::-2], padding[3::-2], layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    return product.unflatten(2, size)
