"""Learned rounding: better than to nearest, on the grid, near its two neighbours, and exact in codes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.core.fit import fit
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import Mask, attach, bake, codes_of
from featherweight.core.grids import SymmetricGrid
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.errors import BadOption
from featherweight.quantize import quantize
from featherweight.recipes.adaround import Rounding, adaround, learned, sampled


def same(value: Tensor) -> Tensor:
    return value


def layer_of(bits: int, columns: int = 24, outputs: int = 8) -> tuple[nn.Linear, Tensor]:
    """A layer on a grid, and inputs that are strongly correlated."""
    torch.manual_seed(1)
    layer = nn.Linear(columns, outputs)
    attach(layer, SymmetricGrid(bits))
    return layer, torch.randn(512, 4) @ torch.randn(4, columns) + 0.1 * torch.randn(512, columns)


def test_correlated_inputs_want_another_rounding_than_nearest() -> None:
    """The paper's point: the error of outputs, not of weights, is what is to be small."""
    layer, x = layer_of(4)
    rounding = Rounding.of(layer)
    target = nn.functional.linear(x, layer.parametrizations.weight.original.detach(), layer.bias.detach())
    h = learned(rounding, x, target, same, iterations=600, lr=1e-2, by=0.1)

    def errors(found: Tensor) -> tuple[float, float]:
        gap = (rounding.outputs(x, found) - target).square().mean()
        moved = (rounding.weight(found)[0] - layer.parametrizations.weight.original.detach()).square().mean()
        return float(gap), float(moved)

    (learned_outputs, learned_weights), (nearest_outputs, nearest_weights) = errors(h), errors(rounding.nearest())
    assert learned_outputs < 0.5 * nearest_outputs
    assert learned_weights > nearest_weights
    assert set(h.unique().tolist()) <= {0.0, 1.0}
    assert 0.02 < float((h != rounding.nearest()).float().mean()) < 0.7


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_weight_is_one_of_its_two_neighbours_and_codes_are_exact(trained, bits: int) -> None:
    model, task = trained
    plain = fold_batchnorm(copy.deepcopy(model), task.inputs())
    small = adaround(copy.deepcopy(model), task, weight_bits=bits, iterations=40, rows=256)
    shown = {path: small.get_submodule(path).weight.detach().clone() for path in ("0", "3", "8")}
    baked = bake(small)
    for path, weight in shown.items():
        codes = codes_of(baked.get_submodule(path))
        assert codes is not None
        assert torch.equal(codes.decode(), weight)
        top = 2 ** (bits - 1) - 1
        assert int(codes.symbols.abs().max()) <= top
        step = codes.rule.scale.view(-1, *[1] * (weight.dim() - 1))
        inside = plain.get_submodule(path).weight.detach().abs() <= step * top
        gap = (weight - plain.get_submodule(path).weight.detach()).abs() / step
        assert float(gap[inside].max()) <= 1 + 1e-4


def test_two_bits_keep_more_of_the_metric_than_nearest() -> None:
    torch.manual_seed(0)
    task = small_task((1, 8, 8), classes=8)
    model = fit(small_cnn(8), task, epochs=20, lr=0.01).eval()
    nearest = quantize(
        fold_batchnorm(copy.deepcopy(model), task.inputs()),
        task,
        weights="symmetric_mse",
        weight_bits=2,
        acts="minmax",
        place="fused",
    )
    with recording() as ledger:
        found = adaround(copy.deepcopy(model), task, weight_bits=2, iterations=300, rows=1024)
    rows = ledger.tables["rounding"]
    assert all(row["learned"] >= row["nearest"] for row in rows)
    assert evaluate(model, task).value > 0.9
    assert evaluate(found, task).value >= evaluate(nearest, task).value
    assert evaluate(found, task).value >= 0.9


def test_float_activations_masks_and_depthwise_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(216, 4),
    ).eval()
    keep = torch.rand(4, 216) > 0.5
    attach(model[5], Mask(keep))
    before = copy.deepcopy(model)
    small = adaround(model, small_task(), weight_bits={"Conv2d": 4, "5": 3}, act_bits=None, iterations=60, rows=256)
    assert not [name for name, _ in small.named_modules() if "fw_" in name]
    assert not small[5].weight[~keep].any()
    bound = {path: int(codes_of(m).symbols.abs().max()) for path, m in bake(small).named_children() if codes_of(m)}
    assert bound == {"0": 7, "2": 7, "5": 3}
    x = next(iter(small_task().valid))[0]
    with torch.no_grad():
        assert float((small(x) - before(x)).square().mean() / before(x).square().mean()) < 0.05


def test_rows_of_a_grouped_convolution_give_its_outputs() -> None:
    for layer in (nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), nn.Conv2d(3, 5, (1, 3)), nn.Linear(7, 5)):
        x = torch.randn(5, 7) if isinstance(layer, nn.Linear) else torch.randn(5, layer.in_channels, 9, 9)
        attach(layer, SymmetricGrid(8))
        rounding = Rounding.of(layer)
        with torch.no_grad():
            rows, outputs = sampled(layer, x, layer(x), 40)
            torch.testing.assert_close(rounding.outputs(rows, rounding.nearest()), outputs, rtol=1e-4, atol=1e-5)


def test_bits_out_of_range_are_refused(trained) -> None:
    model, task = trained
    for bits in (1, 9):
        with pytest.raises(BadOption, match="from 2 to 8"):
            adaround(copy.deepcopy(model), task, weight_bits=bits)
    layer = small_mlp()
    nn.init.zeros_(layer[1].weight)
    zero = adaround(layer, task, iterations=10, rows=64)
    assert not zero[1].weight.any()
