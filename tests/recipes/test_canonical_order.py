"""Units that are alike beside each other: the same outputs, a short path, fewer bytes; a trellis keeps its order."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import small_cnn, small_task
from featherweight.core.forms import Affine, Codes, bake, codes_of, declare_codes
from featherweight.core.ledger import recording
from featherweight.core.task import Task
from featherweight.errors import CompressionError
from featherweight.recipes.canonical_order import canonical_order, shortest
from featherweight.recipes.trellis import trellis


def length(distance: np.ndarray, path: np.ndarray) -> float:
    return float(distance[path[:-1], path[1:]].sum())


def apart(points: np.ndarray) -> np.ndarray:
    return np.abs(points[:, None] - points[None]).sum(-1)


@pytest.mark.parametrize("seed", range(8))
def test_paths_of_seven_points_are_the_shortest_or_nearly(seed: int) -> None:
    distance = apart(np.random.default_rng(seed).normal(size=(7, 3)))
    path = shortest(distance, 0)
    assert sorted(path.tolist()) == list(range(7))
    best = min(length(distance, np.array(order)) for order in itertools.permutations(range(7)))
    assert length(distance, path) <= 1.06 * best


def test_points_on_a_line_are_visited_from_one_end_to_the_other() -> None:
    points = np.random.default_rng(0).permutation(40)[:, None].astype(float)
    path = shortest(apart(points), 5)
    assert points[path, 0].tolist() in (list(range(40)), list(range(39, -1, -1)))
    assert shortest(np.zeros((1, 1)), 0).tolist() == [0]
    assert sorted(shortest(np.zeros((5, 5)), 2).tolist()) == [0, 1, 2, 3, 4]


def kinds_of_units(seed: int = 0) -> nn.Sequential:
    """Two hidden layers whose units are of four kinds each, in no order, with errors; weights on a grid."""
    rng = np.random.default_rng(seed)
    layers: list[nn.Module] = []
    for before, width in ((40, 48), (48, 48), (48, 4)):
        kinds = rng.laplace(0, 1.5, (4, before))[rng.integers(4, size=width)] + rng.normal(0, 0.4, (width, before))
        symbols = torch.from_numpy(np.round(kinds)).to(torch.int8)
        layer, codes = (
            nn.Linear(before, width),
            Codes(symbols, Affine(torch.tensor(0.1), torch.tensor(0)), symbols.shape),
        )
        layer.weight.data.copy_(codes.decode())
        declare_codes(layer, "weight", codes)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_outputs_are_the_same_and_the_file_is_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = kinds_of_units().eval(), torch.randn(16, 40)
    with recording() as ledger:
        found = canonical_order(copy.deepcopy(model), Task(valid=[(x, torch.zeros(16).long())]))
    with torch.no_grad():
        before = model.double()(x.double())
        assert (copy.deepcopy(found).double()(x.double()) - before).abs().max() < 1e-12 * before.abs().max()
    model.float()
    sizes = []
    for name, one in (("before", model), ("after", found)):
        fw.save(one, tmp_path / name, coder="context_mixing", bare=True)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[1] < 0.9 * sizes[0]
    old, new = (int(word) for word in ledger.notes[0].split() if word.isdigit())
    assert new - old == pytest.approx(sizes[1] - sizes[0], rel=0.2)  # in a bare file tensors learn from one another
    assert all(codes_of(found[i]) is not None for i in (0, 2, 4))


def test_a_network_that_a_trellis_laid_keeps_its_order() -> None:
    """The path of a trellis follows the weights in their order: in another one its points cost more."""
    model, task = small_cnn().eval(), small_task()
    laid = bake(trellis(model, task, loss=0.001, calibration_batches=2))
    with pytest.raises(CompressionError, match="run canonical_order before quantization"):
        canonical_order(laid, task)


def test_before_a_trellis_it_says_that_nothing_is_on_a_grid_yet() -> None:
    model, task = small_cnn().eval(), small_task()
    with recording() as ledger:
        found = canonical_order(copy.deepcopy(model), task)
    assert ledger.notes == ["no weight is on a grid yet: what quantizes them gains"]
    x = task.inputs()[0][0]
    assert torch.allclose(found(x), model(x), atol=1e-6)
