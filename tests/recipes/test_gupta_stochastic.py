"""Rounding that is right on average, weights that are never float, and the stall of rounding to the nearest."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.blueprint import blueprint, conform
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, activation_form, attach, bake, codes_of, originals
from featherweight.core.grids import ActivationGrid
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption
from featherweight.recipes.gupta_stochastic import FixedPoint, fixed_point, limits


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 6))
def test_stochastic_rounding_is_right_on_average(seed: int, places: int) -> None:
    torch.manual_seed(seed)
    values, draws, eps = torch.randn(20), 4000, 2.0**-places
    rounded = fixed_point(values.repeat(draws, 1), 16, places, "stochastic").double()
    above = (values.double() / eps) % 1
    sigma = eps * (above * (1 - above) / draws).sqrt()
    assert ((rounded.mean(0) - values.double()).abs() <= 5 * sigma + 1e-12).all()
    assert ((rounded - values).abs() < eps).all()


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(2, 16), st.integers(0, 14), st.sampled_from(["stochastic", "nearest"]))
def test_numbers_are_multiples_of_eps_inside_the_range(seed: int, bits: int, places: int, rounding) -> None:
    torch.manual_seed(seed)
    values = 10 * torch.randn(50)
    rounded = fixed_point(values, bits, places, rounding)
    low, high = limits(bits, places)
    assert torch.equal(rounded * 2.0**places, (rounded * 2.0**places).round())
    assert ((rounded >= low) & (rounded <= high)).all()
    again = fixed_point(rounded, bits, places, rounding)
    assert torch.equal(again, rounded), "what is on the grid stays, whatever the dice say"


def test_the_same_seed_gives_the_same_numbers() -> None:
    values = torch.randn(1000)
    torch.manual_seed(3)
    first = fixed_point(values, 8, 4, "stochastic")
    torch.manual_seed(3)
    assert torch.equal(first, fixed_point(values, 8, 4, "stochastic"))
    assert not torch.equal(first, fixed_point(values, 8, 4, "stochastic"))


def pulled(rounding: str) -> Tensor:
    """Weights of 0 that every step pulls by eps / 10 towards 1, after 400 steps."""
    model = nn.Linear(200, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, 0] = 1.0
    eps = 2.0**-6
    data = Batches(torch.ones(400, 200), torch.ones(400), size=1)
    task = Task(train=data, valid=data, loss=lambda out, _: -0.1 * eps * out.sum())
    options = {"weight_bits": 8, "weight_places": 6, "grad_places": 16, "epochs": 1, "lr": 1.0}
    fitted = copy.copy(task)
    object.__setattr__(fitted, "fit", lambda *args, **given: fit(*args, **{**given, "decay": "constant"}))
    entry("gupta_stochastic")(model, fitted, rounding=rounding, optimizer=torch.optim.SGD, **options)
    return model.weight.detach()[0, 1:]


def test_nearest_rounding_stalls_where_stochastic_rounding_moves_on_average() -> None:
    assert (pulled("nearest") == 0).all()
    moved = pulled("stochastic")
    gone, eps = 400 * 0.1 * 2.0**-6, 2.0**-6
    sigma = eps * (400 * 0.1 * 0.9) ** 0.5
    assert abs(float(moved.mean()) - gone) < 5 * sigma / 199**0.5


def test_weights_are_on_the_grid_after_every_step() -> None:
    model, task = small_cnn(), small_task()
    seen = []

    def watched(network: nn.Module, given: Task, **options) -> nn.Module:
        def look(progress: float) -> None:
            options["after_step"](progress)
            raw = [p for name, p in network.named_parameters() if "original" in name]
            seen.append(all(torch.equal(p * 64, (p * 64).round()) for p in raw) and len(raw))

        return fit(network, given, **{**options, "after_step": look})

    object.__setattr__(watching := copy.copy(task), "fit", watched)
    entry("gupta_stochastic")(model, watching, weight_bits=8, weight_places=6, epochs=2)
    assert seen == [4] * 6  # three weights and a bias


def test_sixteen_bits_train_like_float_from_the_same_start() -> None:
    torch.manual_seed(0)
    task = small_task()
    start = fit(small_cnn(), task, epochs=1, lr=0.01).eval()
    float_ = fit(copy.deepcopy(start), task, epochs=6, lr=0.02, optimizer="momentum")
    fixed = entry("gupta_stochastic")(copy.deepcopy(start), task, epochs=6, lr=0.02)
    assert evaluate(fixed, task).value >= evaluate(float_, task).value - 0.04
    assert evaluate(fixed, task).value > evaluate(start, task).value


def test_the_result_is_declared_and_codes_are_exact() -> None:
    model, task = small_mlp(), small_task()
    attach(model.get_submodule("1"), Mask(torch.rand(32, 64) > 0.5))
    small = entry("gupta_stochastic")(model, task, weight_bits=8, weight_places=6, epochs=1)
    for path in ("1", "3"):
        form = activation_form(small.get_submodule(path), "input")
        assert isinstance(form, ActivationGrid)
        assert form.steps().scale == 2.0**-10
    again = conform(small_mlp(), *blueprint(small)).eval()
    x = task.inputs()[0][0]
    with torch.no_grad():
        assert torch.equal(again(x), small.eval()(x))
    wanted = {p: small.get_submodule(p).weight.detach().clone() for p in ("1", "3")}
    bake(small)
    for path, weight in wanted.items():
        codes = codes_of(small.get_submodule(path))
        assert codes is not None
        assert torch.equal(codes.decode(), weight)
        assert float(weight.abs().max()) <= 2
    assert int((wanted["1"] == 0).sum()) >= 32 * 64 // 3


def test_activations_and_gradients_are_rounded_and_cut_off() -> None:
    form = FixedPoint(4, 1)  # multiples of 0.5 from -4 to 3.5
    value = torch.tensor([-9.0, 0.3, 9.0], requires_grad=True)
    out = form.eval()(value)
    out.sum().backward()
    assert out.tolist() == [-4.0, 0.5, 3.5]
    assert value.grad is not None
    assert value.grad.tolist() == [0.0, 1.0, 0.0]
    tokens = torch.tensor([1, 2])
    assert form(tokens) is tokens


def test_what_is_cut_off_is_said_and_impossible_formats_are_refused() -> None:
    model, task = small_mlp(), small_task()
    model.get_submodule("1").weight.data.mul_(100)
    with recording() as ledger:
        entry("gupta_stochastic")(model, task, epochs=0)
    assert any("1:" in told and "are cut off at 2" in told for told in ledger.notes)
    with pytest.raises(BadOption, match="pass fewer weight_places"):
        entry("gupta_stochastic")(small_mlp(), task, weight_bits=8, weight_places=24)


@pytest.mark.parametrize("then", ["xnor_net", "bnn", "few_multiplications"])
def test_methods_that_move_biases_know_those_on_grids(then: str) -> None:
    """With its biases on grids a network is binarized to the same outputs as with the same biases as plain numbers."""
    torch.manual_seed(0)
    task = small_task()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
    for layer in (model[1], model[3], model[5]):
        nn.init.uniform_(layer.bias, -1.5, 1.5)
    gupta = entry("gupta_stochastic")(model, task, epochs=0).eval()
    found = []
    for start in (copy.deepcopy(gupta), bake(copy.deepcopy(gupta))):
        torch.manual_seed(1)
        small = entry(then)(start, task, epochs=0 if then != "few_multiplications" else 1, lr=1e-9).eval()
        with torch.no_grad():
            found.append(small(task.inputs()[0][0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_layer_inputs_and_gradients_are_in_fixed_point_while_it_trains() -> None:
    model, task = small_mlp(), small_task()
    inputs: list[Tensor] = []
    grads: list[Tensor] = []

    def watched(network: nn.Module, given: Task, **options) -> nn.Module:
        layer = network.get_submodule("3")
        linear = torch.nn.functional.linear

        def look(x: Tensor) -> Tensor:
            inputs.append(x.detach().clone())
            out = linear(x, layer.weight, layer.bias)
            if out.requires_grad:
                out.register_hook(lambda grad: grads.append(grad.clone()))
            return out

        layer.forward = look  # what the product itself is given, and what is given back to it
        try:
            return fit(network, given, **options)
        finally:
            del layer.__dict__["forward"]

    object.__setattr__(task := copy.copy(task), "fit", watched)
    entry("gupta_stochastic")(model, task, act_bits=8, act_places=4, grad_bits=12, grad_places=8, epochs=1)
    assert len(inputs) == len(grads) == 3
    for values, eps in ((inputs, 2.0**-4), (grads, 2.0**-8)):
        assert all(torch.equal(one / eps, (one / eps).round()) for one in values)
        assert any(one.any() for one in values)


def test_the_result_computes_gradients_in_float_again() -> None:
    model, task = small_mlp(), small_task()
    small = entry("gupta_stochastic")(model, task, epochs=1, grad_bits=2, grad_places=0)
    layer = small.get_submodule("3")
    assert activation_form(layer, "grad") is None
    assert activation_form(layer, "input") is not None
    x = torch.rand(4, 32)
    (layer(x) * 0.3).sum().backward()
    torch.testing.assert_close(originals(layer, "bias")[0].grad, torch.full((4,), 1.2))


@pytest.mark.parametrize("kind", ["weight", "act"])
def test_the_sign_needs_a_place_in_front_of_the_point(kind: str) -> None:
    with pytest.raises(BadOption, match=f"pass fewer {kind}_places"):
        entry("gupta_stochastic")(small_mlp(), small_task(), **{f"{kind}_bits": 8, f"{kind}_places": 8})
