"""Deep Compression (Han, Mao and Dally, ICLR 2016): prune, share trained values, code by Huffman."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from torch import nn

from featherweight.allowed import Amount, Bits, Count, Fraction, Positive
from featherweight.catalogue import Slot, recipe
from featherweight.core.fit import Optimizers
from featherweight.core.site import PerLayer
from featherweight.core.surgery import WEIGHTED, WhereWeighted, targets
from featherweight.core.task import Task
from featherweight.prune import Schedule, Scope, prune, ranks_apart
from featherweight.share import share


@recipe(
    paper="Han et al., ICLR 2016, arXiv:1510.00149",
    family="share",
    needs={"labels", "train"},
    shrinks={"weights", "bits"},
    coder="huffman",
    aliases=("deep_compression_prune",),
    rules=(ranks_apart,),
    small={"rounds": 2, "epochs": 1, "finetune": 0, "share_epochs": 1, "sparsity": 0.8},
)
def deep_compression(
    model: nn.Module,
    task: Task,
    *,
    sparsity: PerLayer[Fraction] = 0.92,
    scope: Scope = "std",
    schedule: Annotated[str, Slot("schedule")] | Schedule = "cubic",
    rounds: Count = 6,
    epochs: Amount = 12,
    finetune: Amount = 8,
    lr: Positive = 0.02,
    optimizer: Optimizers = "sgd",
    conv_bits: Bits = 8,
    fc_bits: Bits = 5,
    share_epochs: Amount = 4,
    share_lr: Positive = 1e-4,
    where: WhereWeighted = None,
) -> nn.Module:
    """The three stages of Deep Compression; the third, Huffman coding of values and positions, is the file's coder.

    Song Han, Huizi Mao, William J. Dally, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
    Quantization and Huffman Coding", ICLR 2016, arXiv:1510.00149.

    Departs from the paper: the sparsity is given and one quality parameter for all layers follows from it (the paper
    chooses one a layer by hand; pass a mapping for that); the learning rate falls to zero after the last round, and the
    shared values are trained with Adam; how positions are stored is the container's choice, not fixed at 8 and 5 bits.

    Args:
        sparsity: fraction of the weights removed, of all chosen layers together; or layer patterns with a fraction
            each. The paper's: {"fc1": 0.92, "fc2": 0.91, "fc3": 0.74} for LeNet-300-100, {"conv1": 0.34,
            "conv2": 0.88, "fc1": 0.92, "fc2": 0.81} for LeNet-5.
        scope: "std" (one threshold in deviations of every layer's survivors), "layer" or "global".
        schedule: how the sparsity grows over the rounds: "cubic", "linear", "constant".
        rounds: how often weights are removed.
        epochs: retraining in total between the rounds.
        finetune: epochs after the last round, the learning rate falling to zero.
        lr: learning rate of the retraining.
        optimizer: "sgd" (default), "adam" or "adamw", for the retraining.
        conv_bits: bits of a weight's index in convolutions (256 values).
        fc_bits: bits of a weight's index in linear layers (32 values).
        share_epochs: training of the shared values.
        share_lr: learning rate of that training.
        where: which layers; all linear and convolution layers when left out.
    """
    layers = targets(model, list(sparsity) if isinstance(sparsity, Mapping) else where, WEIGHTED)
    # 1. Learn which connections matter: remove the smallest, retrain the rest, in rounds.
    prune(model, task, score="magnitude", sparsity=sparsity, scope=scope, schedule=schedule, rounds=rounds,
          epochs=epochs, finetune=finetune, lr=lr, optimizer=optimizer, where=where)  # fmt: skip
    # 2. Let the survivors of a layer share few values, then train the values.
    per_path = {path: fc_bits if isinstance(layer, nn.Linear) else conv_bits for path, layer in layers.items()}
    share(model, task, cluster="lloyd", start="linear_span", weight_bits=per_path, epochs=share_epochs, lr=share_lr)
    # 3. Huffman coding is lossless: the file does it (`coder="huffman"`).
    return model
