"""Ranges of activations: entropy against a plain implementation, and calibration data that are odd."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import Batches, small_cnn, small_task
from featherweight.core.grids import Seen
from featherweight.core.ledger import Ledger, recording
from featherweight.core.task import Task
from featherweight.errors import BadData
from featherweight.ingredients.range.entropy import divergences, entropy
from featherweight.ingredients.range.observed import minmax, mse, percentile
from featherweight.quantize import quantize
from featherweight.recipes.int8 import int8


def plain(counts: np.ndarray, kept: int, levels: int) -> float:
    """The divergence as the source words it, one bin after the other."""
    p = counts[:kept].astype(float).copy()
    p[-1] += counts[kept:].sum()
    q = np.zeros(kept)
    for level in range(levels):
        bins = [b for b in range(kept) if b * levels // kept == level]
        filled = [b for b in bins if p[b] > 0]
        for b in filled:
            q[b] = counts[bins].sum() / len(filled)
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / max(b, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0))


def test_divergences_are_those_of_the_source() -> None:
    torch.manual_seed(0)
    counts = torch.histc(torch.randn(3000).abs().double(), 96)
    found = divergences(counts, 8)
    assert list(found) == [8, 24, 40, 56, 72, 88]
    for kept, value in found.items():
        assert value == pytest.approx(plain(counts.numpy(), kept, 8), rel=1e-9)


def seen_of(values: Tensor) -> Seen:
    seen = Seen()
    seen(values)
    return seen


def test_entropy_cuts_off_a_long_tail_and_keeps_a_uniform_one_whole() -> None:
    torch.manual_seed(0)
    uniform = seen_of(torch.rand(4000))
    assert entropy(uniform, 8).scale == pytest.approx(float(minmax(uniform, 8).scale), rel=0.02)
    heavy = seen_of(torch.distributions.StudentT(2.0).sample((4000,)).clamp(-200, 200))
    cut = entropy(heavy, 8)
    assert float(cut.scale) < 0.5 * float(minmax(heavy, 8).scale)
    bulk = heavy.sample[heavy.sample.abs() < 3]
    assert (cut(bulk) - bulk).square().mean() < 0.25 * (minmax(heavy, 8)(bulk) - bulk).square().mean()


@pytest.mark.parametrize("calibrator", [entropy, minmax, percentile, mse])
def test_constant_and_empty_tensors_have_a_grid_that_holds_them(calibrator) -> None:
    for value in (0.0, 3.0, -0.5):
        grid = calibrator(seen_of(torch.full((100,), value)), 8)
        assert float(grid(torch.tensor(value))) == pytest.approx(value, abs=1e-6)
    assert calibrator(Seen(), 8).steps().scale == 1.0


def told_of(calibration: list, model: nn.Module | None = None, calibrator: str = "minmax") -> Ledger:
    task = Task(valid=small_task().valid, calibration=calibration)
    with recording() as ledger:
        int8(model or small_cnn(), task, calibrator=calibrator)
    return ledger


def test_odd_calibration_data_are_told_in_numbers() -> None:
    with pytest.raises(BadData, match="the calibration data are empty"):
        told_of([])
    with pytest.raises(BadData, match=r"shapes \[\(2, 3, 8, 8\)\]"):
        told_of([(torch.randn(2, 3, 8, 8),)])
    with pytest.raises(BadData, match="calibration batch 2 holds NaN"):
        told_of([(torch.randn(2, 1, 8, 8),), (torch.full((2, 1, 8, 8), torch.nan),)])
    constant = told_of([(torch.full((4, 1, 8, 8), 0.5),)])
    assert any("every calibration input is 0.5" in text for text in constant.notes)
    scaled = told_of([(100 * torch.randn(8, 1, 8, 8),)])
    (text,) = [text for text in scaled.notes if "prepare both alike" in text]
    deviation = float(text.split("deviation ")[1].split(",")[0])
    assert 90 < deviation < 110
    larger = told_of([(torch.randn(4, 1, 16, 16),)])
    assert any("shapes [(4, 1, 16, 16)], validation batches [(32, 1, 8, 8)]" in text for text in larger.notes)
    fine = told_of(list(small_task().valid))
    assert not [text for text in fine.notes if "calibration" in text or "outliers" in text]


def test_outliers_are_named_with_the_calibrator_that_copes() -> None:
    x, y = torch.randn(512, 1, 8, 8).clamp(-2, 2), torch.zeros(512, dtype=torch.long)
    x[0, 0, 0, 0] = 500.0
    model = small_cnn().eval()
    ledger = told_of(list(Batches(x, y)), model)
    (text,) = [note for note in ledger.notes if "outliers rule the input of 0" in note]
    assert 'calibrator="percentile" copes' in text
    assert "of 256 steps of the range [-2, 500]" in text
    assert not [note for note in told_of(list(Batches(x, y)), model, "percentile").notes if "outliers rule" in note]


def test_zero_weights_zero_activations_and_float_operators_are_listed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    with recording() as ledger:
        quantize(model, small_task(), acts="minmax", place="fused")
    assert any("weights of 2 are all zero" in text for text in ledger.notes)
    assert any("output of 2 was 0 throughout" in text for text in ledger.notes)
    assert "operators that cannot be quantized stay float: sigmoid (1x)" in ledger.notes
