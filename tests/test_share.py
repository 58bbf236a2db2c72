"""The verb `share`: few values a layer, zeros apart, gradients summed over a value's weights."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, Table, attach, bake, codes_of, forms_of
from featherweight.core.ledger import recording
from featherweight.errors import BadOption, CompressionError, MissingNeed, UnknownName
from featherweight.ingredients.cluster.lloyd import lloyd
from featherweight.ingredients.start.starts import density, forgy, linear_span
from featherweight.share import SoftCodebook, centroids_of, nearest, share

KMEANS = {"cluster": lloyd, "start": linear_span, "epochs": 0}


def objective(values: torch.Tensor, centroids: torch.Tensor) -> float:
    return float((values.double() - centroids[nearest(values, centroids)]).square().sum())


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_a_layer_keeps_no_more_values_than_its_bits_allow(bits):
    model = small_mlp()
    share(model, small_task(), weight_bits=bits, **KMEANS)
    bake(model)
    for layer in (model[1], model[3]):
        assert layer.weight.unique().numel() <= 2**bits
        codes = codes_of(layer)
        assert isinstance(codes.rule, Table)
        assert torch.equal(codes.decode(), layer.weight)


def test_every_weight_takes_its_nearest_value():
    model = small_mlp()
    before = model[1].weight.detach().clone()
    share(model, small_task(), weight_bits=3, **KMEANS)
    values = model[1].weight.unique()
    best = (before.unsqueeze(-1) - values).abs().amin(-1)
    assert torch.allclose((before - model[1].weight).abs(), best, atol=1e-7)


def test_it_is_lossless_with_as_many_values_as_there_are():
    model, x = small_mlp().eval(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for layer in (model[1], model[3]):
            layer.weight.copy_(torch.randn(8)[torch.randint(8, layer.weight.shape)])
    before = [model[i].weight.detach().clone() for i in (1, 3)]
    outputs = model(x)
    share(model, small_task(), weight_bits=3, **KMEANS)
    assert all(torch.equal(model[i].weight, w) for i, w in zip((1, 3), before, strict=True))
    assert torch.equal(model(x), outputs)


def test_masked_weights_stay_zero_apart_from_the_values_and_through_training():
    model, keep = small_mlp(), torch.rand(32, 64) > 0.8
    attach(model[1], Mask(keep))
    share(model, small_task(), weight_bits=2, cluster=lloyd, start=linear_span, epochs=2, lr=1e-2)
    assert torch.equal(model[1].weight == 0, ~keep)
    bake(model)
    assert model[1].weight.unique().numel() == 5  # four values and the zero
    assert torch.equal(codes_of(model[1]).decode(), model[1].weight)


@pytest.mark.parametrize("masked", [False, True])
def test_plain_zeros_become_masked(masked):
    model = small_mlp()
    if masked:
        attach(model[1], Mask(torch.rand(32, 64) > 0.3))
    with torch.no_grad():
        original = model[1].parametrizations.weight.original if masked else model[1].weight
        original[:16] = 0
    gone = model[1].weight == 0
    share(model, small_task(), weight_bits=2, cluster=lloyd, start=linear_span, epochs=1, lr=1e-2)
    assert torch.equal(model[1].weight == 0, gone)


def test_an_all_zero_layer_is_left_alone_and_said():
    model = small_mlp()
    nn.init.zeros_(model[3].weight)
    with recording() as ledger:
        share(model, small_task(), weight_bits=2, **KMEANS)
    assert "zero" in ledger.skipped["3"]
    assert not forms_of(model[3])
    nn.init.zeros_(model[1].parametrizations.weight.original)
    with pytest.raises(CompressionError, match="nothing to share"):
        share(model, small_task(), weight_bits=2, **KMEANS)


def test_the_gradient_of_a_value_is_the_sum_over_its_weights():
    model, task = small_mlp(), small_task()
    share(model, task, weight_bits=2, **KMEANS)
    plain = small_mlp()
    plain.load_state_dict({f"{i}.{n}": getattr(model[i], n).detach() for i in (1, 3) for n in ("weight", "bias")})
    x, y = next(iter(task.train))
    for net in (model, plain):
        task.loss(net(x), y).backward()
    for i in (1, 3):
        held = model[i].parametrizations.weight
        index = held[0].forms[0].index.long().flatten()
        expected = torch.zeros(len(held.original)).index_add_(0, index, plain[i].weight.grad.flatten())
        assert torch.allclose(held.original.grad, expected, rtol=1e-4, atol=1e-6)


def test_training_the_values_lowers_the_loss_and_keeps_the_sharing():
    model, task = small_mlp(), small_task()
    share(model, task, weight_bits=2, **KMEANS)
    index = forms_of(model[1])[0].index.clone()

    def loss() -> float:
        with torch.no_grad():
            return float(torch.stack([task.loss(model(x), y) for x, y in task.train]).mean())

    before = loss()
    share(model, task, weight_bits=2, **{**KMEANS, "epochs": 4, "lr": 5e-3})
    assert loss() < before
    assert torch.equal(forms_of(model[1])[0].index, index)


def test_bits_by_layer_type():
    model = small_cnn()
    share(model, small_task(), weight_bits={"Conv2d": 4, "Linear": 2}, **KMEANS)
    assert [model[i].weight.unique().numel() for i in (3, 8)] == [16, 4]


def test_sharing_shared_weights_again_with_fewer_values():
    model = small_mlp()
    share(model, small_task(), weight_bits=5, **KMEANS)
    share(model, small_task(), weight_bits=2, **KMEANS)
    assert model[1].weight.unique().numel() == 4
    assert len(forms_of(model[1])) == 1


values = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=60).map(torch.tensor)


@given(values, st.integers(1, 9))
@settings(deadline=None)
def test_lloyd_never_increases_the_objective_and_ends_at_a_fixed_point(numbers, k):
    centroids = linear_span(numbers, k)
    before = objective(numbers, centroids)
    for _ in range(8):
        centroids = lloyd(numbers, centroids, iterations=1)
        after = objective(numbers, centroids)
        assert after <= before * (1 + 1e-9) + 1e-9
        before = after
    end = lloyd(numbers, centroids)
    assert torch.allclose(lloyd(numbers, end, iterations=1), end, rtol=1e-12, atol=1e-12)


@given(values, st.integers(1, 9))
@settings(deadline=None)
def test_no_more_values_than_asked_and_all_of_them_if_they_fit(numbers, k):
    centroids = centroids_of(numbers, lloyd, linear_span, k)
    assert len(centroids) <= k
    if numbers.unique().numel() <= k:
        assert torch.equal(centroids.float()[nearest(numbers, centroids)], numbers + 0.0)


def test_starts():
    numbers = torch.cat([torch.randn(500) * 0.01, torch.tensor([-3.0, 5.0])])
    span = linear_span(numbers, 9)
    assert (float(span[0]), float(span[-1])) == (-3.0, 5.0)
    assert torch.allclose(span.diff(), torch.ones(8, dtype=torch.float64))
    assert (density(numbers, 16).abs() < 0.1).sum() == 14
    drawn = forgy(numbers, 8)
    assert torch.isin(drawn.float(), numbers).all()
    assert torch.equal(drawn, forgy(numbers, 8))
    for start in (linear_span, density, forgy):
        assert bool((start(numbers, 8).diff() >= 0).all())


def test_large_weights_are_served_better_by_the_linear_start():
    tail = torch.linspace(0.3, 1, 40)
    numbers = torch.cat([torch.randn(5000) * 0.05, tail, -tail])
    error = {start: objective(tail, lloyd(numbers, start(numbers, 16), 2)) for start in (linear_span, density)}
    assert error[linear_span] < 0.5 * error[density]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_bits": 0}, BadOption, "weight_bits=0"),
        ({"weight_bits": 4.0}, BadOption, "whole number"),
        ({"weight_bits": {"LSTM": 4}}, UnknownName, "LSTM"),
        ({"epochs": -1}, BadOption, "epochs=-1"),
        ({"where": "fc9"}, UnknownName, "fc9"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(options, error, message):
    model = small_mlp()
    with pytest.raises(error, match=message):
        share(model, small_task(), **{**KMEANS, "weight_bits": 4, **options})
    assert not forms_of(model[1])


def test_training_needs_training_data():
    task = small_task()
    with pytest.raises(MissingNeed, match="train"):
        share(small_mlp(), type(task)(valid=task.valid), **{**KMEANS, "epochs": 1})


def test_a_cold_soft_assignment_is_the_nearest_value_and_both_learn():
    weight, centroids = torch.randn(50, requires_grad=True), torch.tensor([-1.0, 0.2, 1.5], requires_grad=True)
    form = SoftCodebook(centroids)
    form.cool(0.0)
    form(weight, centroids).square().sum().backward()
    assert bool((weight.grad != 0).all())
    assert bool((centroids.grad != 0).all())
    form.cool(2.0)  # colder than training ends
    with torch.no_grad():
        wanted = centroids[nearest(weight, centroids)]
        close = (weight[:, None] - centroids).square().sort(1).values.diff(dim=1)[:, 0] > 1e-4
        torch.testing.assert_close(form(weight, centroids)[close], wanted[close])


def test_soft_assignment_lets_weights_change_their_value():
    model, task = small_mlp(), small_task()
    fit(model, task, epochs=4, lr=1e-2)
    hard, soft = copy.deepcopy(model), copy.deepcopy(model)
    share(hard, task, weight_bits=1, epochs=8, lr=5e-3)
    share(soft, task, weight_bits=1, epochs=8, lr=5e-3, assignment="soft")

    def loss(one: nn.Module) -> float:
        with torch.no_grad():
            return float(torch.stack([task.loss(one(x), y) for x, y in task.train]).mean())

    assert loss(soft) < loss(hard)
    for layer, other in ((bake(soft)[at], bake(hard)[at]) for at in (1, 3)):
        assert layer.weight.unique().numel() == 2
        assert torch.equal(codes_of(layer).decode(), layer.weight)
        assert not torch.equal(codes_of(layer).symbols, codes_of(other).symbols)


def test_soft_assignment_keeps_masks():
    model, keep = small_mlp(), torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    share(model, small_task(), weight_bits=2, epochs=2, lr=1e-2, assignment="soft")
    weight = bake(model)[1].weight
    assert bool((weight[~keep] == 0).all())
    assert weight.unique().numel() <= 5
