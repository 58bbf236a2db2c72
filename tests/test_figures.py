"""The test of a difference: what was lost and won has the same meaning for accuracies and for errors."""

from dataclasses import replace

import pytest
import torch

from featherweight.core.task import Metric, score
from featherweight.figures import paired_test

BEFORE, AFTER = torch.tensor([1.0, 1, 1, 1, 0, 0]), torch.tensor([1.0, 0, 0, 0, 1, 0])


@pytest.mark.parametrize("higher", [True, False])
def test_lost_is_what_only_the_first_had_right(higher):
    metric = Metric("m", per_sample=lambda o, t: o, higher_is_better=higher)
    before, after = (score(metric, [(v if higher else 1 - v, torch.arange(6))]) for v in (BEFORE, AFTER))
    found = paired_test(before, after)
    assert (found["lost"], found["won"]) == (3, 1)
    assert found["p"] == pytest.approx(0.625)


def test_other_samples_are_not_compared():
    metric = Metric("m", per_sample=lambda o, t: o)
    before, after = (score(metric, [(v, t)]) for v, t in ((BEFORE, torch.arange(6)), (AFTER, torch.arange(6).flip(0))))
    assert paired_test(before, after) is None
    assert paired_test(before, replace(before, per_sample=BEFORE[:3])) is None
