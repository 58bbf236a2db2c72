"""Public architectures and networks of our own: wired, cut and compared with masking; the whole list is slow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from architectures import ARCHITECTURES
from architectures_text import TEXT
from featherweight.core.channels import channel_groups
from gate import found, passed, prunable, removal_error, widened

ALL = ARCHITECTURES | TEXT


@pytest.mark.parametrize("name", [name for name, a in ALL.items() if a.fast])
def test_removal_equals_masking(name: str) -> None:
    one = found(ALL[name])
    before = sum(p.numel() for p in one.wired.parameters())
    assert prunable(one.channels) >= 0.95
    one = widened(one)
    assert removal_error(one) < 1e-5
    assert sum(p.numel() for p in one.wired.parameters()) < 0.9 * before


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_whole_gate(name: str) -> None:
    facts = passed([name])[name]
    assert "failed" not in facts, facts["failed"]
    assert "onnx_failed" not in facts, facts["onnx_failed"]
    assert facts["prunable"] >= 0.95, facts["pins"]
    assert facts["removal_error"] <= 1e-5
    assert facts["stale"] == []
    assert facts["parameters_left"] < 0.9 * facts["parameters"]
    assert facts["moved"] <= 1e-6
    assert facts["onnx_difference"] <= 1e-3
    assert facts["loss_after"] < facts["loss_before"]


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
