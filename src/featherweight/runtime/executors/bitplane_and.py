"""Weights and inputs of a few bits: one `and` and one count of bits for sixty-four products of two bit planes.

`sum x w = sum_ij 2^(i+j) popcount(plane_i(x) & plane_j(w))` for unsigned integers, an exact integer; zero points are
put right by sums over the inputs and the weights: Zhou et al., "DoReFa-Net", 2016, arXiv:1606.06160, eq. 3.

Departs from the paper: nothing known. The cost is the product of the two numbers of bits: with four bits each, integers
of eight bits are as fast on machines that multiply them.
"""

from __future__ import annotations

from torch import nn

from featherweight.catalogue import recipe
from featherweight.core.forms import activation_form, codes_of
from featherweight.runtime.integers import digits, levels

MOST_PRODUCTS = 16  # pairs of planes: beyond, no float layer is slower


@recipe(paper="Zhou et al., 2016, arXiv:1606.06160", family="accelerate", kind="executor")
def bitplane_and(layer: nn.Module) -> nn.Module | str:
    """A Linear or Conv2d with a weight and an input of a few bits, such as 1 and 2 or ternary and 2."""
    from featherweight.runtime.bit_layers import packed

    weight, inputs = digits(codes_of(layer)), levels(activation_form(layer, "input"))
    if isinstance(weight, str) or isinstance(inputs, str):
        return weight if isinstance(weight, str) else str(inputs)
    if weight.binary and inputs.binary:
        return "weight and input are signs: xnor_popcount needs one operation less"
    if weight.bits * inputs.bits > MOST_PRODUCTS:
        return (
            f"{weight.bits} times {inputs.bits} bit planes are more than {MOST_PRODUCTS}, beyond which nothing is won"
        )
    return packed(layer, weight, inputs)
