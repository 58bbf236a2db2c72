"""SNIP: prune a network before it is trained, by how much the loss depends on each connection."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.curvature import mean_gradients
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.masks import free, largest, masks, set_masks, settle, told
from featherweight.core.restart import reinitialise as drawn_anew
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Batch, Task
from featherweight.errors import BadData


@recipe(
    paper="Lee et al., ICLR 2019, arXiv:1810.02340",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"epochs": 2, "lr": 0.05},
)
def snip(
    model: nn.Module,
    task: Task,
    *,
    sparsity: Fraction = 0.9,
    reinitialise: bool = True,
    initial: Literal["own", "variance_scaling"] = "own",
    samples: Count = 128,
    epochs: Amount = 20,
    lr: Positive = 0.1,
    optimizer: Optimizers = "sgd",
    where: WhereWeighted = None,
) -> nn.Module:
    """Keeps the connections with the largest `|w dL/dw|` on one batch at initialisation, then trains with the mask.

    Namhoon Lee, Thalaiyasingam Ajanthan, Philip H. S. Torr, "SNIP: Single-shot Network Pruning based on Connection
    Sensitivity", ICLR 2019. With a gate `c = 1` on every connection, `dL(c*w)/dc = w dL/dw` (eq. 4); the scores
    `|g| / sum |g|` (eq. 5) are ranked over all layers together.

    Pruning is before training: since what is compressed usually comes trained, its weights are drawn anew first, from
    each module's own `reset_parameters`. With `reinitialise=False` the weights that come are scored, and trained on:
    for a network that was just initialised with care. Scoring trained weights is another method than the paper's.

    Departs from the paper: weights alone are ranked, not biases; initial weights are the network's own unless asked
    otherwise (PyTorch's are uniform, of a third of the variance); what is left is trained from the weights that were
    scored, where the authors' code draws them once more; every layer keeps a weight; 20 epochs with Nesterov momentum
    and the learning rate falling along a cosine. What an earlier method masked stays masked.

    Args:
        sparsity: fraction of the weights removed, of all chosen layers together.
        reinitialise: draw the initial weights anew before scoring.
        initial: the weights that are drawn anew: the network's "own", or from a normal distribution that is cut at two
            deviations, of the variance one over the number of inputs ("variance_scaling", the paper's).
        samples: how many are scored on, in whole batches, the first of the training data: 100 for MNIST and 128 for
            CIFAR in the paper.
        epochs: training with the mask.
        lr: learning rate of the training.
        optimizer: "sgd" (default), "adam" or "adamw".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: `reinitialise` with a model that cannot draw new weights.
        BadData: no weight has an influence on the loss.
    """
    found = sites(model, where)
    allowed = masks(found)
    if reinitialise:
        drawn_anew(model)
        if initial == "variance_scaling":
            scale_variance(found)
    scores = sensitivity(model, task, found, batch_of(task, samples))
    keep = largest(scores, dict.fromkeys(found, sparsity), within=allowed, together=True)
    set_masks(model, found, keep)
    settle(model, found)
    note(told(found))
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train")


def scale_variance(found: dict[str, Site]) -> None:
    """Draws weights, in place, of the variance 1 / inputs, normally distributed and cut at two deviations."""
    for site in found.values():
        if (weight := free(site)) is not None:
            deviation = site.rows.shape[1] ** -0.5 / 0.8796256610342398  # of a normal distribution before it is cut
            nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def sensitivity(model: nn.Module, task: Task, found: dict[str, Site], batches: list[Batch]) -> dict[str, Tensor]:
    """`|w dL/dw|`, of all sites together one in sum, batch norms as in training.

    Raises:
        BadData: all of it is zero.
    """
    grads = mean_gradients(model, task, found, batches, training=True)
    scores = {path: (site.weight.cpu().double() * grads[path]).abs() for path, site in found.items()}
    whole = sum(float(one.sum()) for one in scores.values())
    if whole == 0:
        raise BadData("no weight has an influence on the loss: the gradients are zero, check the data and the weights")
    return {path: one / whole for path, one in scores.items()}


def batch_of(task: Task, samples: int) -> list[Batch]:
    """The first training batches, until they hold as many samples as that."""
    found, count = [], 0
    for batch in task.train or ():
        found.append(batch)
        args, kwargs = task.split(batch)[:2]
        count += len(next(iter((*args, *kwargs.values()))))
        if count >= samples:
            break
    return found
