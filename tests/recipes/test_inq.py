"""Powers of two, exact portions, and frozen weights that no optimizer moves by a single bit."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import small_cnn
from featherweight.catalogue import entry
from featherweight.core.blueprint import blueprint, conform
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, bake, codes_of, forms_of
from featherweight.core.levels import Levels
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData, BadOption, CompressionError
from featherweight.recipes.inq import FrozenPart, freeze, powers_of_two

LAYERS = ("0", "3", "8")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {path: model.get_submodule(path).weight.detach().clone() for path in LAYERS}


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(2, 6))
def test_the_rule_of_the_paper_is_the_nearest_level(seed: int, bits: int) -> None:
    """`beta sgn(w)` where (alpha + beta) / 2 <= |w| < 3 beta / 2; and max|w| never lies beyond the last interval."""
    torch.manual_seed(seed)
    weight = torch.randn(50) * 2.0 ** (seed % 7 - 3)
    levels = powers_of_two(weight, bits)
    sizes = levels[levels >= 0].tolist()
    assert len(levels) == 2 ** (bits - 1) + 1
    assert float(weight.abs().max()) < 1.5 * sizes[-1]
    wanted = torch.zeros_like(weight)
    for alpha, beta in pairwise(sizes):
        wanted[(weight.abs() >= (alpha + beta) / 2) & (weight.abs() < 1.5 * beta)] = beta
    assert torch.equal(Levels(levels.float())(weight), wanted * weight.sign())


def test_half_way_goes_up_as_in_the_rule() -> None:
    grid = Levels(powers_of_two(torch.tensor([1.0]), 3).float())  # 0, 0.5, 1 and their negatives
    assert grid(torch.tensor([0.25, 0.75, -0.25, -0.75, 0.24])).tolist() == [0.5, 1.0, -0.5, -1.0, 0.0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_weights_are_bitwise_unchanged_under_momentum_and_decay(
    trained: tuple[nn.Module, Task], optimizer: str
) -> None:
    model, task = copy.deepcopy(trained[0]), trained[1]
    seen: list[dict[str, tuple[Tensor, Tensor]]] = []

    def watched(network: nn.Module, given: Task, **options: object) -> nn.Module:
        def look(progress: float) -> None:
            held = {path: network.get_submodule(path) for path in LAYERS}
            forms = {path: forms_of(layer)[0] for path, layer in held.items()}
            seen.append({p: (forms[p].frozen.clone(), layer.weight.detach().clone()) for p, layer in held.items()})

        return fit(network, given, after_step=look, **options)

    object.__setattr__(task := copy.copy(task), "fit", watched)
    entry("inq")(model, task, portions=[0.3, 0.7, 1.0], epochs=4, lr=0.05, optimizer=optimizer)
    assert len(seen) == 12
    for (before, after), path in ((pair, path) for pair in pairwise(seen) for path in LAYERS):
        frozen = before[path][0]
        assert torch.equal(before[path][1][frozen], after[path][1][frozen])
        assert not torch.equal(before[path][1][~frozen], after[path][1][~frozen]), "the others learn"
    last = seen[-1]
    for path in LAYERS:
        assert torch.equal(last[path][1][last[path][0]], weights(model)[path][last[path][0]])


def test_the_levels_are_those_of_the_first_weights(trained: tuple[nn.Module, Task]) -> None:
    model, task = copy.deepcopy(trained[0]), trained[1]
    wanted = {path: powers_of_two(w.double(), 3).float() for path, w in weights(model).items()}
    entry("inq")(model, task, weight_bits=3, epochs=4, lr=0.05)
    for path, found in weights(model).items():
        assert torch.isin(found, wanted[path]).all()
        codes = codes_of(bake(copy.deepcopy(model)).get_submodule(path))
        assert codes is not None
        assert torch.equal(codes.decode(), found)


def test_portions_are_exact_counts_and_the_largest_go_first() -> None:
    layer = nn.Linear(10, 10)
    with torch.no_grad():
        layer.weight.copy_(torch.ones(10, 10))  # ties
        layer.weight[0] = 3.0
    site, form = Site("", layer), FrozenPart(layer.weight)
    attach(layer, form)
    grid = Levels(powers_of_two(site.weight, 5).float())
    for portion, count in ((0.05, 5), (0.5, 50), (1.0, 100)):
        freeze(form, site, grid, portion, "magnitude")
        assert int(form.frozen.sum()) == count
        if portion == 0.05:
            assert int(form.frozen[0].sum()) == 5


def test_masked_weights_stay_zero_and_count_in_no_portion(trained: tuple[nn.Module, Task]) -> None:
    model, task = copy.deepcopy(trained[0]), trained[1]
    keep = torch.rand(16, 8, 3, 3) > 0.6
    attach(model.get_submodule("3"), Mask(keep))
    seen = []

    def counted(network: nn.Module, given: Task, **options: object) -> nn.Module:
        form = forms_of(network.get_submodule("3"))[0]
        seen.append(int((form.frozen & keep).sum()))
        assert not bool((form.frozen & ~keep).any())
        return fit(network, given, **options)

    object.__setattr__(task := copy.copy(task), "fit", counted)
    entry("inq")(model, task, epochs=3, portions=[0.5, 1.0])
    assert seen == [round(0.5 * int(keep.sum()))]
    assert (weights(model)["3"][~keep] == 0).all()
    assert weights(model)["3"][keep].any()


def test_retraining_repairs_what_rounding_at_once_breaks(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained

    def loss(found: nn.Module) -> float:
        with torch.no_grad():
            return float(torch.stack([task.loss(found.eval()(x), y) for x, y in task.train]).mean())

    once = entry("inq")(copy.deepcopy(model), task, weight_bits=3, portions=[1.0])
    steps = entry("inq")(copy.deepcopy(model), task, weight_bits=3, epochs=9, lr=0.02)
    assert loss(steps) < loss(once)
    assert evaluate(steps, task).value >= 0.9


def test_later_methods_train_around_the_frozen_weights(trained: tuple[nn.Module, Task]) -> None:
    model, task = copy.deepcopy(trained[0]), trained[1]
    entry("inq")(model, task, epochs=1)
    before, bias = weights(model), model.get_submodule("8").bias.detach().clone()
    fit(model, task, epochs=2, lr=0.05, optimizer="sgd")
    assert all(torch.equal(before[path], after) for path, after in weights(model).items())
    assert not torch.equal(bias, model.get_submodule("8").bias)
    again = conform(small_cnn(), *blueprint(model)).eval()
    x = task.inputs()[0][0]
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))


def test_refusals(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    for portions in ([0.5], [0.5, 0.5, 1.0], []):
        with pytest.raises(BadOption, match="portions="):
            entry("inq")(copy.deepcopy(model), task, portions=portions)
    with pytest.raises(BadOption, match="weight_bits=1"):
        entry("inq")(copy.deepcopy(model), task, weight_bits=1)
    zero = copy.deepcopy(model)
    for path in LAYERS:
        zero.get_submodule(path).weight.data.zero_()
    with pytest.raises(CompressionError, match="nothing to quantize"):
        entry("inq")(zero, task)
    zero.get_submodule("0").weight.data.fill_(float("nan"))
    with pytest.raises(BadData, match="not finite"):
        entry("inq")(zero, task)


def test_a_random_partition_is_any_weights_and_the_same_for_a_seed() -> None:
    layer = nn.Linear(20, 20)
    grid, masks = Levels(powers_of_two(layer.weight.detach(), 5).float()), []
    for seed in (3, 3, 4):
        form = FrozenPart(layer.weight)
        torch.manual_seed(seed)
        freeze(form, Site("", layer), grid, 0.5, "random")
        masks.append(form.frozen)
    assert [int(mask.sum()) for mask in masks] == [200] * 3
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    largest = layer.weight.abs() >= layer.weight.abs().flatten().sort(descending=True).values[199]
    assert 50 < int((masks[0] & largest).sum()) < 150, "about half of them are among the largest half"
