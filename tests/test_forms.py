"""Forms stack, survive copies and training, and bake to the same outputs with their codes beside the weights."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import small_mlp, small_task
from featherweight.catalogue import entries
from featherweight.coding import load, save
from featherweight.core.blueprint import blueprint, conform
from featherweight.core.fit import fit
from featherweight.core.forms import (
    Affine,
    Codebook,
    Codes,
    Form,
    Mask,
    Product,
    Table,
    attach,
    bake,
    codes_of,
    forms_of,
    from_values,
    mask_of,
    mask_zeros,
    masked_names,
)
from featherweight.core.trace import trace
from featherweight.errors import BadOption, FormatError
from featherweight.ingredients.grid.sketch import signs_of


def shared(weight: torch.Tensor, k: int = 3) -> Codebook:
    centroids = torch.linspace(float(weight.min()), float(weight.max()), k)
    return Codebook(centroids, (weight.unsqueeze(-1) - centroids).abs().argmin(-1))


def test_masks_are_outermost_whoever_attaches_first():
    layer = nn.Linear(6, 5)
    keep = torch.rand(5, 6) > 0.5
    weight = layer.weight.detach().clone()
    attach(layer, Mask(keep))
    attach(layer, shared(weight))
    assert [type(f).__name__ for f in forms_of(layer)] == ["Codebook", "Mask"]
    assert torch.equal(layer.weight == 0, ~keep)
    assert layer.weight.unique().numel() == 4


def test_bake_keeps_outputs_and_leaves_codes():
    layer = nn.Linear(6, 5)
    weight = layer.weight.detach().clone()
    attach(layer, shared(weight))
    attach(layer, Mask(torch.rand(5, 6) > 0.5))
    x = torch.randn(3, 6)
    before = layer(x)
    bake(layer)
    assert type(layer) is nn.Linear
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    assert torch.equal(layer(x), before)
    codes = codes_of(layer)
    assert codes is not None
    assert torch.equal(codes.decode(), layer.weight)


def test_codes_are_dropped_once_the_weight_changes():
    layer = nn.Linear(6, 5)
    attach(layer, shared(layer.weight.detach()))
    bake(layer)
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert codes_of(layer) is None


def test_baking_a_copy_leaves_the_original_working():
    model = small_mlp()
    attach(model[1], Mask(torch.rand(32, 64) > 0.5))
    twin = copy.deepcopy(model)
    attach(twin[1], Mask(torch.rand(32) > 0.5), at="bias")
    bake(twin)
    x = torch.randn(2, 1, 8, 8)
    assert model(x).shape == (2, 4)
    assert (model[1].weight == 0).float().mean() > 0.3
    assert type(twin[1]) is nn.Linear
    assert type(model[1].bias) is nn.Parameter


def test_pruned_weights_stay_zero_under_momentum_and_decay():
    model, task = small_mlp(), small_task()
    keep = torch.rand(32, 64) > 0.7
    attach(model[1], Mask(keep))
    fit(model, task, epochs=2, lr=0.05, optimizer="sgd")
    assert torch.equal(model[1].weight == 0, ~keep)


@pytest.mark.parametrize(("grad", "moved"), [("kept", False), ("dense", True)])
def test_gradient_of_pruned_weights(grad, moved):
    layer = nn.Linear(4, 4, bias=False)
    attach(layer, Mask(torch.zeros(4, 4), grad=grad))
    layer(torch.ones(1, 4)).sum().backward()
    assert bool(layer.parametrizations.weight.original.grad.abs().sum() > 0) is moved


def test_centroid_gradient_is_the_sum_over_its_weights():
    layer = nn.Linear(6, 5, bias=False)
    book = shared(layer.weight.detach())
    attach(layer, book)
    x = torch.randn(7, 6)
    layer(x).square().sum().backward()
    plain = layer.weight.detach().clone().requires_grad_()
    (x @ plain.T).square().sum().backward()
    expected = torch.zeros(3).index_add_(0, book.index.flatten(), plain.grad.flatten())
    assert torch.allclose(layer.parametrizations.weight.original.grad, expected, rtol=1e-5)


def test_tied_parameters_share_forms_and_stay_tied():
    model = nn.ModuleDict({"a": nn.Embedding(7, 4), "b": nn.Linear(4, 7, bias=False)})
    model["b"].weight = model["a"].weight
    attach(model["a"], Mask(torch.rand(7, 4) > 0.5), root=model)
    assert torch.equal(model["a"].weight, model["b"].weight)
    assert len(list(model.parameters())) == 1
    bake(model)
    assert model["a"].weight is model["b"].weight
    assert (model["a"].weight == 0).any()


def test_unknown_tensor_is_refused():
    with pytest.raises(BadOption, match="has no parameter 'wight'"):
        attach(nn.Linear(2, 2), Mask(torch.ones(2, 2)), at="wight")


def test_zeros_can_be_masked_again_after_a_bake():
    model = small_mlp()
    attach(model[1], Mask(torch.rand(32, 64) > 0.5))
    names = masked_names(model)
    bake(model)
    zeros = model[1].weight == 0
    mask_zeros(model, names)
    assert torch.equal(mask_of(model[1]), ~zeros)


@given(st.lists(st.sampled_from([0.0, -0.0, 0.1, -0.1, 3.0, 1e-30]), max_size=40))
def test_table_codes_are_exact(values):
    weight = torch.tensor(values)
    assert torch.equal(from_values(weight).decode(), weight)


def test_rules_decode():
    affine = Codes(torch.tensor([[0, 1], [2, 3]]), Affine(torch.tensor([1.0, 10.0]), torch.tensor([1, 2]), 0), (2, 2))
    assert affine.decode().tolist() == [[-1.0, 0.0], [0.0, 10.0]]
    product = Codes(torch.tensor([[1, 0]]), Product(torch.tensor([[[0.0], [1.0]], [[5.0], [6.0]]])), (1, 2))
    assert product.decode().tolist() == [[1.0, 5.0]]
    stages = Codes(torch.tensor([[[1, 0]], [[0, 1]]]), Product(torch.stack([product.rule.codebooks] * 2) * 2), (1, 2))
    assert stages.decode().tolist() == [[2.0, 22.0]]
    rows = Codes(torch.tensor([[1, 0], [0, 1]]), Table(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0), (2, 2))
    assert rows.decode().tolist() == [[2.0, 1.0], [3.0, 4.0]]
    assert rows.masked(torch.tensor([[True, False], [True, True]])).decode().tolist() == [[2.0, 0.0], [3.0, 4.0]]
    runs = Codes(
        torch.tensor([[1, 2, 3], [4, 5, 6]]), Affine(torch.tensor([1.0, 10.0, 2.0]), torch.tensor(1), block=2), (2, 3)
    )
    assert runs.decode().tolist() == [[0.0, 1.0, 20.0], [30.0, 8.0, 10.0]]
    assert runs.masked(torch.tensor([[True, False, True]] * 2)).decode().tolist() == [
        [0.0, 0.0, 20.0],
        [30.0, 0.0, 10.0],
    ]
    half = Codes(torch.tensor([0, 1]), Affine(torch.tensor(2.0), torch.tensor(0.5)), (2,))
    masked = half.masked(torch.tensor([True, False]))
    assert isinstance(masked.rule, Table)
    assert masked.decode().tolist() == [-1.0, 0.0]


def test_blueprint_round_trip_keeps_forms_values_and_gradients():
    model, task = small_mlp(), small_task()
    attach(model[1], shared(model[1].weight.detach(), 5))
    attach(model[1], Mask(torch.rand(32, 64) > 0.5))
    attach(model[3], Mask(torch.rand(4, 32) > 0.2, grad="dense"))
    data, tensors = blueprint(model)
    twin = conform(small_mlp(), data, tensors)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(twin(x), model(x))
    fit(model, task, epochs=1)
    fit(twin, task, epochs=1)
    assert torch.equal(twin(x), model(x))


def test_a_form_on_a_container_is_refused():
    with pytest.raises(BadOption, match="attach it to a layer inside"):
        attach(nn.Sequential(nn.Linear(2, 2)), Mask(torch.ones(2)), at="input")


def test_forms_of_ingredients_are_restored_in_a_fresh_process():
    code = "from featherweight.core.forms import Form; import torch; Form.restored('DoReFaWeights', {}, {})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "unknown form" not in done.stderr


def normed(which: str) -> nn.Sequential:
    wrap = getattr(nn.utils.parametrizations, which)
    return nn.Sequential(wrap(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3)).eval()


@pytest.mark.parametrize("which", ["weight_norm", "spectral_norm"])
def test_parametrizations_of_others_are_left_alone(which, tmp_path):
    model, x = normed(which), torch.randn(4, 6)
    before = model(x)
    attach(model[2], Mask(torch.rand(3, 5) > 0.5))
    masked = model(x)
    assert not torch.equal(before, masked)
    assert masked_names(model) == [("2", "weight")]
    assert not forms_of(model[0])
    assert torch.equal(conform(normed(which), *blueprint(model))(x), masked)
    assert torch.equal(bake(model)(x), masked)
    assert nn.utils.parametrize.is_parametrized(model[0])
    for bare in (False, True):
        save(model, tmp_path / "model.fw", bare=bare)
        assert torch.equal(load(tmp_path / "model.fw", into=normed(which))(x), masked)


@pytest.mark.parametrize("at", ["weight", "bias"])
def test_a_form_beside_a_parametrization_of_others_is_refused(at):
    layer = normed("weight_norm")[0]
    with pytest.raises(BadOption, match=r"torch\.nn\.utils\.parametrize\.remove_parametrizations"):
        attach(layer, Mask(torch.ones_like(getattr(layer, at))), at=at)


def test_a_model_with_a_parametrization_of_others_is_traced_with_what_computes_the_weight():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    graph = trace(model, torch.randn(2, 3)).graph
    assert any("weight_norm" in str(node.target) for node in graph.nodes)


def test_every_form_of_ours_says_where_it_may_stand() -> None:
    """A form from a file that takes its sizes from a weight would let the file choose how much memory it takes."""
    entries()
    ours = {name: kind for name, kind in Form.known.items() if kind.__module__.startswith("featherweight.")}
    assert [name for name, kind in ours.items() if "stands" not in vars(kind)] == []
    assert all(set(kind.stands) <= {"weight", "input", "output", "grad"} for kind in ours.values())


def test_scales_of_blocks_must_make_up_the_weight() -> None:
    rule = Affine(torch.ones(2), torch.zeros((), dtype=torch.int32), block=1 << 40)
    with pytest.raises(FormatError, match="do not make a weight of 8"):
        rule.decode(torch.ones(8), (2, 4))


def test_a_byte_names_no_more_than_eight_binary_filters() -> None:
    with pytest.raises(BadOption, match="40 binary filters"):
        signs_of(40)
