"""Two stages: the teacher's features first, then its outputs and the labels from there.

Source: Chou, thesis, 2019, with Chou, Chiu and Liao, APSIPA Transactions 10, 2021, e18.
Departs from the paper: only its abstract was available, which has two stages "to release this constraint"; what each
holds is inferred: the first the features alone, for the layers up to them, as FSP does; the second the outputs and the
labels, with a new optimizer. A network between teacher and student, the other reading, is not offered.
"""

from __future__ import annotations

from collections.abc import Sequence

from featherweight.catalogue import ingredient
from featherweight.core.plan import Stage


@ingredient("plan", paper="Chou, Chiu and Liao, APSIPA Transactions on Signal and Information Processing, 2021, e18",
            family="distill")  # fmt: skip
def two_stage_kd() -> Sequence[Stage]:
    """Features alone, then outputs and labels.

    >>> [stage.labels for stage in two_stage_kd()]
    [False, True]
    """
    return [Stage(features=True, outputs=False, labels=False), Stage(features=False, outputs=True, labels=True)]
