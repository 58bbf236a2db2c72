import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.flow import follow
from featherweight.core.forms import Form, Mask, activation_form, attach, bake, codes_of, forms_of
from featherweight.core.grids import ActivationGrid, Seen, SymmetricGrid, covering
from featherweight.core.ledger import recording
from featherweight.core.site import Site, sites
from featherweight.core.task import Task
from featherweight.errors import BadData, BadOption, MissingNeed, UnknownName
from featherweight.ingredients.grid.symmetric import symmetric_mse
from featherweight.ingredients.place.fused import fused
from featherweight.ingredients.range.observed import mse, percentile
from featherweight.quantize import Range, quantize

weights = st.integers(0, 1000).map(lambda seed: torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(seed)))


@given(weights, st.integers(2, 8), st.sampled_from([0, 1, None]))
def test_weights_are_within_half_a_step_and_zero_is_exact(weight: Tensor, bits: int, axis: int | None) -> None:
    grid = SymmetricGrid(bits, axis)
    weight[0, 0, 0] = 0.0
    scale = grid.scale(weight)
    step = scale if axis is None else scale.view([-1 if d == axis else 1 for d in range(3)])
    snapped = grid(weight)
    assert ((snapped - weight).abs() <= step * 0.5001).all()
    assert snapped[0, 0, 0] == 0
    assert torch.equal(grid(snapped).sign(), snapped.sign())


@given(weights, st.integers(1, 16), st.booleans())
def test_codes_are_the_weight_bit_for_bit(weight: Tensor, bits: int, masked: bool) -> None:
    layer = nn.Conv1d(3, 4, 2)
    layer.weight.data.copy_(weight)
    if masked:
        attach(layer, Mask(weight > 0))
    attach(layer, SymmetricGrid(bits))
    wanted = layer.weight.detach().clone()
    codes = codes_of(bake(layer))
    assert codes is not None
    assert torch.equal(codes.decode(), wanted)
    assert int(codes.symbols.abs().max()) <= max(1, 2 ** (bits - 1) - 1)


def test_the_grid_is_that_of_the_survivors() -> None:
    layer = nn.Linear(3, 1)
    layer.weight.data.copy_(torch.tensor([[1.0, 0.5, 100.0]]))
    attach(layer, Mask(torch.tensor([[True, True, False]])))
    attach(layer, SymmetricGrid(8))
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[1.0, 64 / 127, 0.0]]))


def test_channels_of_zeros_stay_zero() -> None:
    grid = SymmetricGrid(8)
    weight = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    assert torch.equal(grid(weight), weight)
    assert grid.scale(weight)[0] == 1


def test_gradients_pass_where_the_grid_reaches() -> None:
    grid = SymmetricGrid(4, None, torch.tensor(0.5))
    weight = torch.tensor([1.0, 0.2, -0.3, -1.0], requires_grad=True)
    grid(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_a_narrower_range_is_found_where_it_pays() -> None:
    weight = torch.cat([torch.linspace(-0.3, 0.3, 200), torch.tensor([1.0])]).view(1, -1)
    narrow = symmetric_mse(Site.of(weight), bits=3)
    wide = SymmetricGrid(3)
    assert (narrow(weight) - weight).square().sum() < (wide(weight) - weight).square().sum()


@given(st.floats(-50, 0), st.floats(0, 50), st.integers(1, 8))
def test_activation_grids_hold_zero_and_cover_their_range(low: float, high: float, bits: int) -> None:
    grid = covering(low, high, bits)
    step = float(grid.scale)
    values = torch.linspace(low, high, 101)
    assert float(grid(torch.zeros(1))) == 0.0
    if high - low > 1e-30:
        assert ((grid(values) - values).abs() <= 1.01 * step).all()
    assert len(torch.unique(grid(values))) <= 2**bits
    assert torch.equal(grid(grid(values)), grid(values))


def test_activation_gradients_are_cut_off_with_the_values() -> None:
    value = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    covering(0.0, 1.0)(value).sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [0.0, 1.0, 0.0]


def test_integers_pass_an_activation_grid() -> None:
    tokens = torch.tensor([1, 500])
    assert torch.equal(covering(0.0, 1.0)(tokens), tokens)


def test_forms_come_back_from_their_state() -> None:
    for form, value in ((SymmetricGrid(4, 0, torch.tensor([0.5, 1.0])), torch.randn(2, 3)), (covering(-1, 1), None)):
        again = Form.restored(type(form).__name__, *form.state())
        x = torch.randn(2, 3) if value is None else value
        assert torch.equal(again(x), form(x))


def test_what_was_seen_is_cut_off_by_the_clamp() -> None:
    seen = Seen((0.0, 6.0))
    assert torch.equal(seen(torch.tensor([-3.0, 2.0, 9.0])), torch.tensor([-3.0, 2.0, 9.0]))
    seen(torch.randn(20000))
    assert (seen.low, seen.high) == (0.0, 6.0)
    assert len(seen.sample) < 10000


@pytest.mark.parametrize("calibrator", [percentile, mse])
def test_a_range_is_that_of_all_features_not_of_those_that_a_stride_meets(calibrator: Range) -> None:
    seen, generator = Seen(), torch.Generator().manual_seed(3)
    for _ in range(4):
        value = torch.rand(256, 512, generator=generator)
        value[:, 1::2] *= 4
        before = torch.get_rng_state()
        seen(value)
        assert torch.equal(torch.get_rng_state(), before)
    grid = calibrator(seen, 8)
    assert float(grid.scale) * 255 == pytest.approx(4.0, abs=0.05)


def test_every_position_of_a_batch_may_be_in_the_sample() -> None:
    seen, positions = Seen(), torch.arange(784.0).view(1, 1, 28, 28).expand(64, 8, 28, 28)
    seen(positions)
    assert len(seen.sample.unique()) > 770
    first, again = seen.parts[0], Seen()
    again(positions)
    seen(positions)
    assert torch.equal(again.parts[0], first)
    assert not torch.equal(seen.parts[1], first)


def test_bits_differ_by_layer() -> None:
    model = quantize(small_cnn(), small_task(), weight_bits={"Conv2d": 4, "8": 2})
    baked = bake(model)
    bound = {path: int(codes_of(baked.get_submodule(path)).symbols.max()) for path in ("0", "3", "8")}  # type: ignore[union-attr]
    assert bound == {"0": 7, "3": 7, "8": 1}


def test_training_goes_through_the_grids() -> None:
    task = small_task()
    model = quantize(small_mlp(), task, acts="minmax", weight_bits=2, epochs=2, lr=0.01)
    (grid,) = forms_of(model.get_submodule("1"))
    assert isinstance(grid, SymmetricGrid)
    assert len(torch.unique(model.get_submodule("3").weight[0].detach())) <= 3
    assert isinstance(activation_form(model.get_submodule("1"), "input"), ActivationGrid)


def test_tied_layers_share_one_grid() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with recording() as ledger:
        quantize(model, Task(valid=[torch.randn(2, 4)]), weight_bits=3)
    assert torch.equal(model[0].weight, model[2].weight)
    assert "goes with it" in ledger.skipped["2"]
    bake(model)
    assert model[0].weight is model[2].weight


def test_refusals() -> None:
    task = small_task()
    with pytest.raises(UnknownName, match="unknown weights 'symetric': did you mean 'symmetric'"):
        quantize(small_cnn(), task, weights="symetric")
    with pytest.raises(BadOption, match="weight_bits=0"):
        quantize(small_cnn(), task, weight_bits=0)
    with pytest.raises(BadOption, match="calibration_batches"):
        quantize(small_cnn(), task, acts="minmax", calibration_batches=0)
    with pytest.raises(MissingNeed):
        quantize(small_cnn(), Task(valid=task.valid), acts="minmax")


class Chain(nn.Module):
    """A block whose shortcut reads what the block's first layer reads, with an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + x)


def test_the_flow_of_one_run() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(inplace=True), Chain(), nn.Flatten(), nn.Linear(64, 2))
    layers = {p: m for p, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    flow = follow(model, torch.randn(2, 1, 4, 4), layers)
    assert [s.layer or s.name for s in flow.steps] == ["0", "relu", "2.conv", "add", "relu", "view", "4"]
    assert len({t for s in flow.steps for t in s.makes}) == 7  # what is changed in place is another tensor
    assert flow.outputs == set(flow.steps[-1].makes)


def test_fused_places_cover_a_residual_block() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(inplace=True), Chain(), Chain(), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(2, 1, 4, 4)
    layers = {p: m for p, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    places = fused(model, Task(valid=Batches(x, torch.zeros(2))), layers)
    assert {site for place in places for site in place.sites} == {
        ("0", "input"),
        ("0", "output"),  # the ReLU behind it is the end of the grid
        ("2.conv", "output"),
        ("2.act", "input"),
        ("3.conv", "output"),
        ("3.act", "input"),
        ("5", "input"),
    }
    assert [place.clamp[0] for place in places if ("0", "output") in place.sites] == [0.0]
    assert [len(p.sites) for p in places if ("3.act", "input") in p.sites] == [2]  # flattening keeps the grid
    before = copy.deepcopy(model)
    quantize(model, Task(valid=[x], calibration=[x]), acts="minmax", place="fused")
    with torch.no_grad():
        assert float((model(x) - before(x)).abs().max() / before(x).abs().max()) < 0.05


def test_what_is_on_a_coarser_grid_stays_there() -> None:
    model, task = small_cnn(), small_task()
    four = bake(quantize(model, task, weight_bits=4))
    before = codes_of(four.get_submodule("3"))
    with recording() as ledger:
        eight = bake(quantize(copy.deepcopy(four), task, weight_bits=8))
    after = codes_of(eight.get_submodule("3"))
    assert before is not None
    assert after is not None
    assert torch.equal(before.symbols, after.symbols)
    assert any("keep the integers" in str(line) for line in ledger.notes)
    two = codes_of(bake(quantize(four, task, weight_bits=2)).get_submodule("3"))
    assert two is not None
    assert int(two.symbols.abs().max()) == 1


def test_norms_fold_into_the_grids_that_were_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    task = small_task()
    trained = quantize(model, task, weight_bits=3, acts="mse", epochs=2, lr=1e-2)
    plain, x = bake(copy.deepcopy(trained)).eval(), task.inputs()[0][0]
    held = codes_of(plain[0])
    folded = quantize(copy.deepcopy(model), task, weights=None, acts=None, grads="dorefa_gradient", fold=True).eval()
    assert isinstance(folded[1], nn.Identity)
    found = codes_of(folded[0])
    assert held is not None
    assert found is not None
    assert torch.equal(found.symbols.abs(), held.symbols.abs())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_network_on_its_grids() -> None:
    """A weight that oscillates between two levels would leave an average of both behind (Nagel et al., 2022)."""
    torch.manual_seed(0)
    model, task = (
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)),
        small_task(),
    )
    quantize(model, task, weight_bits=2, epochs=1, lr=1e-2)
    batches = list(task.calibrating())
    with torch.no_grad():
        means = torch.stack([model[0](x).mean((0, 2, 3)) for x, _ in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)


@pytest.mark.parametrize("name", ["dorefa", "bwn", "xnor_net", "kmeans_share", "gong_pq", "binaryconnect"])
def test_weights_that_are_not_finite_are_refused_by_a_method_alone(name: str) -> None:
    model, task = small_mlp(), small_task()
    model.get_submodule("1").weight.data[0, 0] = torch.nan
    with pytest.raises(BadData, match="the weights of 1 are not finite"):
        entry(name)(model, task)
    attach(model.get_submodule("1"), Mask(~model.get_submodule("1").weight.isnan()))
    assert "1" in sites(model), "a mask hides it"
