"""Structured convolution matrices: one map of types serves all, because two permutations commute."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import featherweight as fw
from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.forms import bake, codes_of
from featherweight.core.ledger import recording
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.ibm_structured_conv import (
    Crossbar,
    commuting,
    fitted,
    held,
    nearest_types,
    type_map,
    type_maps,
)

CYCLE, SWAP = (1, 2, 3, 0), (1, 0, 2, 3)


def partitions(size: int) -> set[tuple[int, ...]]:
    """How the places of a kernel can be parted into types, whatever the types are called."""
    found = set()
    for v, h in commuting():
        for one in type_map(v, h, size, size).flatten(1).tolist():
            names = {t: i for i, t in enumerate(dict.fromkeys(one))}
            found.add(tuple(names[t] for t in one))
    return found


def matrix(kernel: torch.Tensor, size: int) -> torch.Tensor:
    """The matrix of a convolution on maps of a size: (out * places, in * size * size)."""
    eye = torch.eye(kernel.shape[1] * size * size).view(-1, kernel.shape[1], size, size)
    return F.conv2d(eye, kernel).flatten(1).T


def fits_a_crossbar(whole: torch.Tensor, types: torch.Tensor) -> bool:
    """Whether each neuron (row) has one strength for each type of its inputs, where it is connected at all."""
    return all(len(row[(types == t) & (row != 0)].unique()) <= 1 for row in whole for t in range(4))


def types_of_inputs(v, h, first, size: int) -> torch.Tensor:
    return type_map(v, h, size, size)[torch.tensor(first)].flatten()


def test_as_many_pairs_commute_as_the_paper_says_and_part_a_kernel_in_as_many_ways():
    assert len(commuting()) == 120
    assert [len(partitions(size)) for size in (3, 4, 5)] == [13, 15, 15]
    assert len(type_maps(3, 3)) <= 120


@pytest.mark.parametrize("pair", [(CYCLE, CYCLE), (CYCLE, (2, 3, 0, 1)), ((1, 0, 3, 2), (2, 3, 0, 1))])
def test_types_that_follow_commuting_steps_serve_the_whole_matrix(pair):
    """Every filter at every place has four strengths by the types of its inputs: those of one map for all."""
    assert pair in commuting()
    first = (0, 2, 3)
    local = type_map(*pair, 3, 3)[torch.tensor(first)]
    strengths = torch.randint(1, 100, (5, 4)).float()
    kernel = strengths[:, local] * (torch.rand(5, 3, 3, 3) < 0.6)
    assert fits_a_crossbar(matrix(kernel, 6), types_of_inputs(*pair, first, 6))


def some_map_fits(whole: torch.Tensor) -> bool:
    """Whether any map of types does, where each neuron has four different strengths, so that they name its types.

    Inputs of one strength are then of one type, and so are all that this joins; none of another strength may be.
    """
    part = list(range(whole.shape[1]))
    rows = [[(i, v) for i, v in enumerate(row) if v != 0] for row in whole.tolist()]
    assert all(len({v for _, v in row}) == 4 for row in rows)
    for row in rows:
        for (i, a), (j, b) in itertools.combinations(row, 2):
            if a == b:
                part = [part[i] if p == part[j] else p for p in part]
    return not any(part[i] == part[j] and a != b for row in rows for (i, a), (j, b) in itertools.combinations(row, 2))


@pytest.mark.parametrize(("pair", "fits"), [((CYCLE, CYCLE), True), ((CYCLE, SWAP), False), ((SWAP, CYCLE), False)])
def test_types_that_follow_steps_that_do_not_commute_serve_no_matrix(pair, fits):
    assert (pair in commuting()) == fits
    kernel = torch.tensor([[1.0, 2.0, 3.0, 4.0]])[:, type_map(*pair, 3, 3)[torch.tensor([1])]]
    whole = matrix(kernel, 5)
    assert fits_a_crossbar(whole, types_of_inputs(*pair, (1,), 5)) == fits
    assert some_map_fits(whole) == fits


def test_crossings_and_strengths_are_the_best_there_are():
    """Against all subsets of a filter's six weights in two types."""
    weight, types = torch.randn(3, 1, 2, 3), torch.tensor([[[0, 1, 0], [1, 1, 0]]])
    chosen, strengths = fitted(weight, types)
    near = torch.where(chosen, strengths[:, types], 0.0)
    for filter_, found in zip(weight.flatten(1), near.flatten(1), strict=True):
        best = 0.0
        for t in (0, 1):
            own = filter_[types.flatten() == t]
            subsets = [own[list(s)] for k in (1, 2, 3) for s in itertools.combinations(range(3), k)]
            best += max(float(s.sum() ** 2 / len(s)) for s in subsets)
        assert float((filter_ - found).square().sum()) == pytest.approx(float(filter_.square().sum()) - best, abs=1e-5)
    assert float(held(weight, types)) == pytest.approx(float(near.square().sum()), rel=1e-5)


def test_planted_types_are_found():
    v, h = CYCLE, (2, 3, 0, 1)
    first = torch.tensor([0, 3, 1])
    types = type_map(v, h, 3, 3)[first]
    strengths = torch.randn(16, 4)
    weight = strengths[:, types] * (torch.rand(16, 3, 3, 3) < 0.7)
    found = nearest_types(weight)
    assert float(held(weight, found)) == pytest.approx(float(weight.square().sum()), rel=1e-5)


def test_what_it_holds_is_on_the_grid_and_learns():
    layer = nn.Conv2d(3, 4, 3)
    types = nearest_types(layer.weight.detach())
    chosen, strengths = fitted(layer.weight.detach(), types)
    form = Crossbar(types, 7, torch.where(chosen, 1.0, -1.0), strengths)
    free = [value.clone().requires_grad_() for value in form.free(layer.weight)]
    weight = form(*free)
    assert all(len(filter_.unique()) <= 5 for filter_ in weight)
    whole = weight.flatten(1) / (strengths.abs().amax(1, keepdim=True) / 7)
    torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
    delta = torch.randn_like(weight)
    weight.backward(delta)
    value = form.table(strengths).detach()[:, types.long()]
    soft = torch.sigmoid(free[0].detach())
    torch.testing.assert_close(free[0].grad, delta * value * soft * (1 - soft))
    sums = torch.stack([(delta * chosen * (types == t)).sum((1, 2, 3)) for t in range(4)], 1)
    torch.testing.assert_close(free[1].grad, sums)


def test_a_network_is_coded_by_types_and_still_right(tmp_path):
    torch.manual_seed(0)
    model, task = small_cnn(), small_task()
    fw.fit(model, task, epochs=6, lr=1e-2)
    result = fw.compress(model, task, "ibm_structured_conv", epochs=6, lr=1e-2, out=tmp_path, measure=False)
    layer = result.model[3]
    codes = codes_of(layer)
    assert codes.rule.values.shape == (16, 5)
    assert torch.equal(codes.decode(), layer.weight)
    symbols = codes.symbols.view(16, 8, 3, 3)
    for c, r, s in itertools.product(range(8), range(3), range(3)):  # all filters agree in the type of an input
        assert len(set(symbols[:, c, r, s].tolist()) - {0}) <= 1
    assert torch.equal(
        fw.load(tmp_path / "model.fw")(next(iter(task.valid))[0]), result.model(next(iter(task.valid))[0])
    )
    assert result.report["result"]["metric"] > 0.9


def test_strengths_have_as_many_bits_as_asked():
    model = small_cnn()
    entry("ibm_structured_conv")(model, small_task(), strength_bits=2, epochs=0)
    bake(model)
    assert all(len(filter_.abs().unique()) <= 2 for filter_ in model[3].weight)


def test_grouped_and_zero_convolutions_stay():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 4)
    )
    nn.init.zeros_(model[2].weight)
    with recording() as ledger:
        entry("ibm_structured_conv")(model, small_task(), epochs=0)
    assert "grouped" in ledger.skipped["1"]
    assert "zero" in ledger.skipped["2"]
    with pytest.raises(CompressionError, match="choose other layers"):
        entry("ibm_structured_conv")(model, small_task(), where="1", epochs=0)
    with pytest.raises(BadOption, match="choose another method"):
        fw.compress(small_mlp(), small_task(), "ibm_structured_conv")
