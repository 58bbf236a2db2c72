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
import featherweight.recipes.canonical_order as ordering
from conftest import small_cnn, small_task
from featherweight.core.channels import channel_groups
from featherweight.core.forms import Affine, Codes, bake, codes_of, declare_codes
from featherweight.core.ledger import recording
from featherweight.core.reorder import exchanges
from featherweight.core.task import Task
from featherweight.errors import CompressionError
from featherweight.recipes.canonical_order import canonical_order, changed, climb, shortest
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


def kinds_of_units(seed: int = 0, widths: tuple[int, ...] = (40, 32, 32, 4)) -> nn.Sequential:
    """Two hidden layers whose units are of four kinds each, in no order, with errors; weights on a grid."""
    rng = np.random.default_rng(seed)
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise(widths):
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


def inversions(model: nn.Module) -> int:
    """How many pairs of the first layer's units stand in the wrong order, by their biases."""
    biases = model[0].bias.tolist()  # type: ignore[index]
    return sum(a > b for a, b in itertools.combinations(biases, 2))


def test_further_orders_are_kept_only_where_the_file_gets_no_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = kinds_of_units(1, (8, 6, 12, 3)).eval(), torch.randn(16, 8)
    before, channels = copy.deepcopy(model), channel_groups(model, x)
    found = exchanges(model, channels)
    torch.manual_seed(0)
    sizes = iter(range(100))
    monkeypatch.setattr(ordering, "bare_bytes", lambda model: next(sizes))
    assert climb(model, channels, found, 20) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    monkeypatch.setattr(ordering, "bare_bytes", inversions)
    assert climb(model, channels, found, 150) == (inversions(before), 0)
    assert model[0].bias.tolist() == sorted(before[0].bias.tolist())
    assert torch.allclose(model(x), before(x), atol=1e-4)


def test_what_is_tried_is_the_bare_file(tmp_path: Path) -> None:
    model, x = kinds_of_units(1, (8, 12, 12, 3)).eval(), torch.randn(16, 8)
    with recording() as ledger:
        found = canonical_order(copy.deepcopy(model), Task(valid=[(x, torch.zeros(16).long())]), tries=5)
    size = fw.save(found, tmp_path / "a.fw", coder="context_mixing", bare=True).bytes
    assert f"-> {size} bytes as a bare file" in ledger.notes[-1]


@pytest.mark.parametrize("count", [2, 7])
def test_a_changed_order_is_another_order(count: int) -> None:
    torch.manual_seed(0)
    orders = {tuple(changed(count).tolist()) for _ in range(200)}
    assert tuple(range(count)) not in orders
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len(orders) == 1 if count == 2 else 45 < len(orders) <= 61  # 21 exchanges, 30 moves, 10 more parts turned


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
