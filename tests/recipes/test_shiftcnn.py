"""Codebooks of the right size, the paper's largest errors, and a convolution of shifts that is exact in integers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.levels import Levels
from featherweight.core.site import Site
from featherweight.core.task import evaluate
from featherweight.errors import BadData, BadOption, CompressionError
from featherweight.ingredients.grid.shift_sums import codebook, greedy, shift_levels, shift_sums
from featherweight.recipes.shiftcnn import shift_add, shift_plan

ON_A_LINE = torch.linspace(-1, 1, 2**13 + 1, dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_a_codebook_has_one_entry_less_than_its_index_could_name(bits: int) -> None:
    for n in (1, 2, 3):
        entries = codebook(n, bits)
        assert len(entries) == len(entries.unique()) == 2**bits - 1
        assert float(entries.max()) == 2.0 ** (1 - n)
        assert float(entries[entries > 0].min()) == 2.0 ** (-n - (2**bits - 1) // 2 + 2)


@pytest.mark.parametrize(("terms", "error"), [(1, 0.25), (2, 0.0625), (3, 0.015625)])
def test_the_largest_errors_are_those_of_the_paper(terms: int, error: float) -> None:
    snapped = sum(greedy(ON_A_LINE, 4, terms))
    assert float((snapped - ON_A_LINE).abs().max()) == error


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_the_nearest_level_is_the_greedy_sum(bits: int, terms: int) -> None:
    values = ON_A_LINE + 1e-7  # half-way the two may differ
    assert torch.equal(Levels(shift_levels(bits, terms))(values), sum(greedy(values, bits, terms)))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 50), st.sampled_from([1, 2]), st.sampled_from([0, 1]), st.sampled_from([1, 3]), st.integers(2, 4))
def test_shifts_and_additions_are_the_convolution_exactly(
    seed: int, stride: int, padding: int, groups: int, bits: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(6, 9, 3, stride, padding, groups=groups, bias=False).double()
    layer.weight.data.div_(layer.weight.abs().max() / 2.0 ** (seed % 5))  # a power of two as scale rounds nothing
    plan = shift_plan(layer.weight.detach(), bits, 2)
    x = torch.randint(0, 256, (2, 6, 7, 5))
    attach(layer, shift_sums(Site("", layer), bits, 2))
    got = shift_add(layer, x, plan)
    assert got.dtype == torch.int64
    assert torch.equal(got.double() * plan.scale / 2**plan.deepest, layer(x.double()))
    terms = sum((term != 0).sum() for term in greedy(layer.weight.detach() / plan.scale, bits, 2))
    assert 0 < plan.additions <= int(terms), "terms that cancel need no addition"


def test_a_linear_layer_by_shifts() -> None:
    layer = nn.Linear(20, 5, bias=False)
    plan = shift_plan(layer.weight.detach(), 4, 2)
    x = torch.randint(-128, 128, (3, 20))
    attach(layer, shift_sums(Site("", layer), 4))
    torch.testing.assert_close(shift_add(layer, x, plan).float() * plan.scale / 2**plan.deepest, layer(x.float()))


@pytest.mark.parametrize("masked", [False, True])
def test_codes_are_the_weight_and_masked_weights_set_no_scale(masked: bool) -> None:
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight[0, 0] = 50.0
    keep = torch.ones(5, 6).bool()
    keep[0, 0] = not masked
    largest = layer.weight.detach()[keep].abs().max()
    if masked:
        attach(layer, Mask(keep))
    attach(layer, shift_sums(Site("", layer), 4))
    wanted = layer.weight.detach().clone()
    assert float(wanted.abs().max()) == float(largest)
    codes = codes_of(bake(layer))
    assert codes is not None
    assert torch.equal(codes.decode(), wanted)


def test_two_terms_lose_nothing_without_training() -> None:
    task = small_task()
    model = fit(small_cnn(), task, epochs=8, lr=0.01).eval()
    with recording() as ledger:
        small = entry("shiftcnn")(copy.deepcopy(model), task)
    assert evaluate(small, task).value >= evaluate(model, task).value - 0.01
    assert any("2 terms of 4 bits" in told for told in ledger.notes)

    def gap(found: nn.Module) -> float:
        x, _ = next(iter(task.valid))
        with torch.no_grad():
            return float((found.eval()(x) - model(x)).square().mean())

    errors = [gap(entry("shiftcnn")(copy.deepcopy(model), task, terms=n)) for n in (1, 2, 3)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_refusals() -> None:
    model, task = small_cnn(), small_task()
    with pytest.raises(BadOption, match="weight_bits=1"):
        entry("shiftcnn")(model, task, weight_bits=1)
    with pytest.raises(BadData, match="takes integers"):
        shift_add(nn.Linear(2, 2), torch.ones(1, 2), shift_plan(torch.ones(2, 2), 4, 1))
    for p in model.parameters():
        p.data.zero_()
    with pytest.raises(CompressionError, match="nothing to quantize"):
        entry("shiftcnn")(model, task)
    assert shift_plan(torch.zeros(2, 2), 4, 2).additions == 0
