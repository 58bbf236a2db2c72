"""Public architectures and networks of our own: wired, cut and compared with masking; the whole list is slow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from architectures import ARCHITECTURES
from architectures_text import TEXT
from featherweight.core.channels import channel_groups
from gate import found, prunable, removal_error, widened

ALL = ARCHITECTURES | TEXT
SLOW = [pytest.param(name, marks=() if a.fast else pytest.mark.slow) for name, a in ALL.items()]


@pytest.mark.parametrize("name", SLOW)
def test_removal_equals_masking(name: str) -> None:
    one = found(ALL[name])
    before = sum(p.numel() for p in one.wired.parameters())
    assert prunable(one.channels) >= 0.95
    one = widened(one)
    assert removal_error(one) < 1e-5
    assert sum(p.numel() for p in one.wired.parameters()) < 0.9 * before


@pytest.mark.parametrize("name", ["positions computed on the way", "branches, instance norm"])
def test_removal_again_equals_masking(name: str) -> None:
    one = widened(found(ARCHITECTURES[name]))
    assert removal_error(one) < 1e-5
    count = one.channels.count
    again = replace(one, channels=channel_groups(one.wired, one.inputs))
    assert again.channels.count == count - int(0.3 * count)
    assert prunable(again.channels) == 1.0
    before = sum(p.numel() for p in one.wired.parameters())
    assert removal_error(again) < 1e-5
    assert sum(p.numel() for p in one.wired.parameters()) < before
