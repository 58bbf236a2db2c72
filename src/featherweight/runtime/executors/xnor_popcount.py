"""Weights and inputs of one bit: sixty-four products in one exclusive or and one count of bits.

`x . w = K - 2 popcount(x ^ w)` for vectors of K signs, an exact integer, times one scale for each output: Rastegari,
Ordonez, Redmon and Farhadi, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", ECCV 2016,
arXiv:1603.05279; Hubara et al., "Binarized Neural Networks", NIPS 2016, arXiv:1602.02830.

Departs from the paper: the paper's 58 times is against a loop that multiplies one by one; `accelerate` compares with
PyTorch's float layer. Zero padding, which signs cannot say, counts for nothing, as it does in the float layer.
"""

from __future__ import annotations

from torch import nn

from featherweight.catalogue import recipe
from featherweight.core.forms import activation_form, codes_of
from featherweight.runtime.integers import digits, levels


@recipe(paper="Rastegari et al., ECCV 2016, arXiv:1603.05279", family="accelerate", kind="executor")
def xnor_popcount(layer: nn.Module) -> nn.Module | str:
    """A Linear or Conv2d whose weight is plus or minus one number for each output, and whose input is signs."""
    from featherweight.runtime.bit_layers import packed

    weight, inputs = digits(codes_of(layer)), levels(activation_form(layer, "input"))
    if isinstance(weight, str) or isinstance(inputs, str):
        return weight if isinstance(weight, str) else str(inputs)
    if not (weight.binary and inputs.binary):
        return f"its weight has {weight.bits} bits and its input {inputs.bits}: only signs multiply by exclusive or"
    return packed(layer, weight, inputs)
