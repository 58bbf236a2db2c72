"""Linear layers of product codebooks by table look-up: each codeword is multiplied once, whatever uses it.

Wu, Leng, Wang, Hu and Cheng, "Quantized Convolutional Neural Networks for Mobile Devices", CVPR 2016, arXiv:1512.06473,
eq. 6: a table of the inner products of every part of the input with the codewords of its codebook, then one look-up and
one addition for each part and output.

Departs from the paper: linear layers only. Residual codebooks (stages whose codewords are added) have a table for each
stage. Sums run in another order than in a dense product, so results differ by rounding.
"""

from __future__ import annotations

from torch import nn

from featherweight.catalogue import recipe
from featherweight.core.forms import Product, activation_form, codes_of


@recipe(paper="Wu et al., CVPR 2016, arXiv:1512.06473", family="accelerate", kind="executor")
def lut_linear(layer: nn.Module) -> nn.Module | str:
    """A Linear whose weight is a product codebook, of one stage or several."""
    from featherweight.runtime.table_layers import TableLinear

    if not isinstance(layer, nn.Linear):
        return f"a {type(layer).__name__} is no Linear"
    codes = codes_of(layer)
    if codes is None:
        return "its weight has no codes: quantize it first"
    if not isinstance(codes.rule, Product):
        return f"its weight is no product codebook but a {type(codes.rule).__name__}"
    if activation_form(layer, "input") is not None:
        return "its input carries a grid, which tables do not apply"
    return TableLinear(codes.rule.codebooks, codes.symbols, layer.bias)
