"""KD-SVD: correlations between the singular vectors of the teacher's layers are a second task beside the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.task import Task
from featherweight.distill import Term, learn
from featherweight.ingredients.match.singular_vectors import singular_vectors


@recipe(
    paper="Lee, Kim and Song, ECCV 2018, arXiv:1807.06819",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
def kd_svd(
    model: nn.Module,
    task: Task,
    *,
    vectors: Count = 1,
    pairs: Sequence[tuple[str, str]] | None = None,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains on the labels and the teacher's singular vectors, whose gradient is at most as large as the labels'.

    The bound holds parameter by parameter, and its share rises as `1 / (1 + e^-epoch)`.
    Source: Self-supervised Knowledge Distillation Using Singular Value Decomposition.

    Departs from the paper: singular vectors are eigenvectors of F^T F, whose gradient leaves out pairs of eigenvalues
    that nearly agree, where the authors set what is not finite to 0; layers of unequal widths are joined by a 1x1
    convolution; fewer epochs, and Adam.

    Args:
        vectors: singular vectors of each layer.
        pairs: (student's layer, teacher's layer) in order; the first layer and the last one with maps of each size when
            left out.
        epochs: passes over the training data.
        lr: learning rate.
        optimizer: as in `fit`.
    """

    def gate(progress: float) -> float:
        return 1 / (1 + math.exp(-int(progress * epochs)))

    match = partial(singular_vectors, vectors=vectors)
    terms = {"singular vectors": Term(match, gate, pairs, limited=True)}
    return learn(model, task, terms, epochs=epochs, lr=lr, optimizer=optimizer)
