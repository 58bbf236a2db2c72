"""Random scores: the control that every other criterion has to beat.

Departs from the paper: there is none. The draws come from torch's generator, which `compress` seeds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient
from featherweight.core.site import Site


@ingredient("score")
def random(site: Site) -> Tensor:
    """Uniform numbers in [0, 1), of the weight's shape; with the grain "filter" one for each output, (outputs,).

    >>> _ = torch.manual_seed(0)
    >>> random(Site.of(torch.ones(2, 3), "filter")).shape
    torch.Size([2])
    """
    return torch.rand(len(site.rows)) if site.grain == "filter" else torch.rand(site.weight.shape)
