"""The divergence of mutual learning from teachers that are trained already.

Source: Chou, thesis, 2019, with Chou, Chiu and Liao, APSIPA Transactions 10, 2021, e18; the divergence is that of Zhang
et al., Deep Mutual Learning, CVPR 2018.
Departs from the paper: only its abstract was available; that the temperature is 1 and the weight 1 is inferred. It is
`kd` at temperature 1 with equal weights.
"""

from __future__ import annotations

from featherweight.catalogue import method
from featherweight.ingredients.match.softened import softened

offline_kl = method(
    "distill",
    match=softened,
    settings={"temperature": 1.0},
    labels=1.0,
    weight=1.0,
    paper="Chou, Chiu and Liao, APSIPA Transactions on Signal and Information Processing, 2021, e18",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
