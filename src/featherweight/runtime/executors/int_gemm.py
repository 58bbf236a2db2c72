"""Linear layers with weights and inputs of up to eight bits, by PyTorch's product of 8-bit integers.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
arXiv:1712.05877, eq. 7: `sum (u - z) v` in 32 bits, exactly, then one float scale for each output.

Departs from the paper: the result is scaled in float, not by a fixed-point multiplier, and leaves the layer as floats.
Convolutions stay: PyTorch multiplies bytes only as matrices; export them to ONNX Runtime or OpenVINO.
"""

from __future__ import annotations

from torch import nn

from featherweight.catalogue import recipe
from featherweight.core.forms import activation_form, codes_of
from featherweight.runtime.integers import digits, levels


@recipe(paper="Jacob et al., CVPR 2018, arXiv:1712.05877", family="accelerate", kind="executor")
def int_gemm(layer: nn.Module) -> nn.Module | str:
    """A Linear whose weight and input lie on grids of at most eight bits."""
    from featherweight.runtime import gemm_layers

    if not isinstance(layer, nn.Linear):
        return f"a {type(layer).__name__} is no Linear: export the model to run its integers in another runtime"
    weight, inputs = digits(codes_of(layer)), levels(activation_form(layer, "input"))
    if isinstance(weight, str) or isinstance(inputs, str):
        return weight if isinstance(weight, str) else str(inputs)
    if inputs.z % 2:
        return "the zero point of its input lies between two integers"
    whole = not bool((weight.z % 2).any())  # else count in half steps, which takes a bit more
    v = (2 * weight.q - weight.z[:, None]) // (2 if whole else 1)
    if v.numel() == 0 or int(v.min()) < -128 or int(v.max()) > 127:
        return "its weight around its zero points does not fit signed bytes"
    if layer.in_features > gemm_layers.MOST_TERMS:
        return f"sums of {layer.in_features} products of bytes can exceed 32 bits"
    return gemm_layers.refused() or gemm_layers.ByteLinear(v, weight.half * (2 if whole else 1), inputs, layer.bias)
