"""HashedNets (Chen et al., ICML 2015): a hash says which weights of a layer are one, so that no table is stored."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt, Interval
from torch import nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.exchange import impose
from featherweight.core.fit import Optimizers
from featherweight.core.surgery import WhereLinearConv2dOrEmbedding
from featherweight.core.task import Task

Compression = Annotated[float, Gt(1)]
Seed = Annotated[int, Interval(ge=0, le=1 << 32)]
KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)


@recipe(
    paper="Chen et al., ICML 2015, arXiv:1504.04788",
    family="share",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
def hashed_net(
    model: nn.Module,
    task: Task,
    *,
    compression: Compression = 8.0,
    seed: Seed = 0,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereLinearConv2dOrEmbedding = None,
) -> nn.Module:
    """Lets all weights of a layer that a hash puts into one bucket be one weight, up to a sign, then trains.

    Wenlin Chen, James T. Wilson, Stephen Tyree, Kilian Q. Weinberger, Yixin Chen, "Compressing neural networks with the
    hashing trick", ICML 2015, arXiv:1504.04788. `V[i, j] = xi(i, j) w[h(i, j)]` (eq. 7), h a hash to K buckets and xi
    one to signs; the gradient of w[k] is the sum of `xi(i, j) dL/dV[i, j]` over its bucket (eq. 12). A layer of m * n
    weights has K = max(1, round(m n / compression)) parameters; the hashes follow from a seed, and no index is stored.
    Execution is that of the plain layer with the weight gathered: no faster, and the gathering comes on top.

    Departs from the paper: the network given is trained already, so a bucket starts at the mean of its weights, signs
    taken off (the least-squares projection), and not at random; the hash is the finalizer of splitmix64 instead of
    xxHash; biases are no part of the hashed matrix; convolutions and embeddings are hashed entry by entry too (pass
    where="Linear" for the paper's fully connected layers); layers are not widened for what they save.

    Args:
        compression: weights for each parameter (the paper: 8 and 64).
        seed: of the hashes; each layer has its own, from this one on.
        epochs: training after the sharing.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw", "sgd" or "momentum".
        where: which layers; all linear, 2-d convolution and embedding layers when left out.

    Raises:
        CompressionError: no layer would get smaller.
    """

    def buckets(rows: int, columns: int) -> int:
        return max(1, round(rows * columns / compression))

    impose(model, task, where, lambda number, *size: ("hashed", buckets(*size), seed + number), KINDS)
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train hashed weights")
