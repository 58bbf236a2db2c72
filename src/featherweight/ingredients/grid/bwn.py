"""Binary weight networks: a sign for each weight and one size for each filter.

Mohammad Rastegari, Vicente Ordonez, Joseph Redmon, Ali Farhadi, "XNOR-Net: ImageNet Classification Using Binary
Convolutional Neural Networks", ECCV 2016, arXiv:1603.05279, sec. 3.1. `B = sign(W)` and `alpha = mean|W|` minimise
`||W - alpha B||^2` for each filter (eq. 6), which leaves `||W||^2 - n alpha^2`. The first and the last layer stay
float. Latent float weights are trained.

Departs from the paper: training starts from the network that is given, whose batch norms stay as they are, not from
scratch. The gradient is that of `alpha(W) sign(W)` with a sign of slope 1[|W| <= 1],

    dL/dW = sign(W) <sign(W), g> / n + alpha g 1[|W| <= 1],

not `g (1/n + alpha 1[|W| <= 1])` as the paper writes, which forgets that alpha is shared by a filter. With a mask,
alpha is that of the surviving weights.

Executed as int8 weights by the ONNX file.
"""

from __future__ import annotations

from featherweight.catalogue import ingredient, method
from featherweight.core.binary import BinaryWeights
from featherweight.core.forms import Form
from featherweight.core.grids import only_bits
from featherweight.core.site import Site, channel_axis


@ingredient("grid")
def binary(site: Site, bits: int) -> Form:
    """`mean|w| sign(w)` of each output channel.

    >>> from torch import tensor
    >>> site = Site.of(tensor([[0.2, -0.4], [1.0, 3.0]]))
    >>> [[round(v, 3) for v in row] for row in binary(site, bits=1)(site.weight).tolist()]
    [[0.3, -0.3], [2.0, 2.0]]
    """
    only_bits(bits, 1, "binary")
    return BinaryWeights(channel_axis(site))


bwn = method(
    "quantize",
    weights=binary,
    weight_bits=1,
    keep_first_last=True,
    epochs=10,
    lr=1e-3,
    paper="Rastegari et al., ECCV 2016, arXiv:1603.05279",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
