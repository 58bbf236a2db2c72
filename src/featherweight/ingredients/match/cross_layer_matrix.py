"""Gram matrices between all pairs of layers of the teacher, not only consecutive ones.

Source: Chou, thesis, 2019, with Chou, Chiu and Liao, Cross-layer knowledge distillation with KL divergence and offline
ensemble for compressing deep neural network, APSIPA Transactions 10, 2021, e18.
Departs from the paper: only its abstract was available; which layers are paired (all: the first one with maps and the
last one with maps of each size), the pooling of the larger map (max, as in FSP), the weight of a matrix (one over its
size) and that labels are learned beside it are inferred. The thesis's stages are those of `chou_full`.
"""

from __future__ import annotations

from featherweight.catalogue import method
from featherweight.ingredients.match.gram_matrices import gram_matrices

cross_layer_matrix = method(
    "distill",
    match=gram_matrices,
    settings={"between": "all", "scale": "mean"},
    labels=1.0,
    weight=1.0,
    paper="Chou, Chiu and Liao, APSIPA Transactions on Signal and Information Processing, 2021, e18",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
