"""Fisher pruning: channels go whose removal is expected to raise the loss least, to second order.

Lucas Theis, Iryna Korshunova, Alykhan Tejani, Ferenc Huszar, "Faster gaze prediction with dense networks and Fisher
pruning", 2018, arXiv:1801.05787: at an optimum the gradient vanishes and the Hessian is the Fisher
information, so that closing the gate of channel k costs `Delta_k = 1/(2N) sum_n g_nk^2`, where
`g_nk = sum over positions of activation times gradient` of sample n's own loss. With a price, `Delta_k - beta cost_k`
decides: `flops` here.

Departs from the paper: several channels go in every round, not one; scores come from calibration batches at evaluation;
`flops` stays as it is set, where the paper adapts beta, and is 0 unless it is; channels that a residual sum couples go
together by the sum of their scores, without the products between them; kept channels are rounded up to whole vectors.
"""

from __future__ import annotations

from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.site import Site


@ingredient("score", grain="filter")
def fisher(site: Site) -> Tensor:
    """Half the mean of the squared per-sample gradient by a gate on each output, (outputs,)."""
    gates = site.data.gates().get(site.path)
    return site.stays() if gates is None else gates.double().square().mean(0) / 2


fisher_prune = method(
    "prune",
    score=fisher,
    grain="filter",
    scope="global",
    prune_ratio=0.5,
    schedule="linear",
    rounds=16,
    epochs=8,
    finetune=8,
    lr=1e-3,
    optimizer="sgd",
    paper="Theis et al., 2018, arXiv:1801.05787",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"rounds": 2, "epochs": 1, "finetune": 1, "round_to": 1},
)
