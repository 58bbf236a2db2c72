"""Weight pruning by ADMM: train towards the nearest sparse weights, prune when the two agree, retrain the rest."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.masks import distance, largest, masks, set_masks, settle, told
from featherweight.core.pulled import pulled
from featherweight.core.site import PerLayer, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task


@recipe(
    paper="Zhang et al., ECCV 2018, arXiv:1804.03294",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"rounds": 2, "epochs": 2, "finetune": 1},
)
def admm(
    model: nn.Module,
    task: Task,
    *,
    sparsity: PerLayer[Fraction] = 0.95,
    rho: Positive = 1e-4,
    growth: Positive = 1.0,
    rounds: Count = 30,
    epochs: Amount = 30,
    finetune: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereWeighted = None,
) -> nn.Module:
    """Splits `min loss(W)` with at most `l` weights a layer into training, a projection and a dual update, in turns.

    Tianyun Zhang, Shaokai Ye, Kaiqi Zhang, Jian Tang, Wujie Wen, Makan Fardad, Yanzhi Wang, "A Systematic DNN Weight
    Pruning Framework using Alternating Direction Method of Multipliers", ECCV 2018. In round k

        W <- argmin loss(W) + rho/2 ||W - Z + U||^2    by training,
        Z <- the l largest of W + U, zeros elsewhere,
        U <- U + W - Z.

    Then W is pruned to its l largest weights and retrained with the mask fixed.

    Departs from the paper: the number of rounds is the paper's, 30, but of an epoch each by default, where the authors
    train 5,000 steps of 50 images (about 4 epochs of MNIST); the optimizer starts anew in every round; no weight decay
    unless the optimizer brings it (theirs is 5e-5); `growth`, which is not in the paper, raises `rho` from round to
    round. What an earlier method masked stays masked.

    Args:
        sparsity: fraction of each chosen layer's weights removed; or layer patterns with a fraction each. The paper's
            for LeNet-5: {"conv1": 0.8, "conv2": 0.92, "fc1": 0.991, "fc2": 0.93}.
        rho: strength of the pull.
        growth: factor of `rho` from one round to the next, by which U shrinks; 1 is the paper's.
        rounds: how often Z and U are renewed.
        epochs: training in all rounds together.
        finetune: epochs of retraining after the weights are pruned.
        lr: learning rate of both.
        optimizer: "adam" (default), "adamw" or "sgd".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range.
        UnknownName: a pattern matches nothing.
    """
    found, goals = per_layer(model, "sparsity", sparsity, where)
    allowed = masks(found)

    def projected(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        keep = largest({path: one.abs() for path, one in values.items()}, goals, within=allowed)
        return {path: one * keep[path] for path, one in values.items()}

    W = {path: site.weight.cpu() for path, site in found.items()}
    Z, U = projected(W), {path: one * 0 for path, one in W.items()}
    primal, dual = [], []
    for turn in range(rounds):
        step = pulled(task, found, {path: Z[path] - U[path] for path in found}, rho * growth**turn)
        task.fit(model, task, epochs=epochs / rounds, lr=lr, optimizer=optimizer, decay="constant", step=step,
                 label=f"ADMM {turn + 1}/{rounds}")  # fmt: skip
        W = {path: site.weight.cpu().clone() for path, site in found.items()}
        before, Z = Z, projected({path: W[path] + U[path] for path in found})
        U = {path: (U[path] + W[path] - Z[path]) / growth for path in found}  # scaled by rho, which grows
        primal.append(distance(W, Z))
        dual.append(rho * growth**turn * distance(Z, before))
    note("||W - Z|| after every round: " + " ".join(f"{one:.3g}" for one in primal))
    note("rho ||Z' - Z|| after every round: " + " ".join(f"{one:.3g}" for one in dual))

    set_masks(model, found, largest({path: one.abs() for path, one in W.items()}, goals, within=allowed))
    settle(model, found)
    note(told(found))
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="retrain")
