"""Equalization: the function stays, ranges agree, and grids with one scale a tensor stop losing the network."""

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.core.fit import fit
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import Mask, attach, bake
from featherweight.core.ledger import recording
from featherweight.core.pairs import Pair, equalize_pairs, find_pairs, layers_of, ranges, scale
from featherweight.core.task import Task, evaluate
from featherweight.errors import CompressionError
from featherweight.quantize import quantize
from featherweight.recipes.equalize import equalize
from featherweight.recipes.int8 import int8

IMAGE = torch.randn(4, 1, 8, 8)


class Depthwise(nn.Module):
    """The block of MobileNetV2 with ReLU: expand, depthwise, project, and a residual around a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(6, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 6, 1),
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


def lively(model: nn.Module) -> nn.Module:
    """Batch norms with statistics of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 2)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.1, 4)
            nn.init.normal_(module.running_mean)
    return model.eval()


def same(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = model(x)
        return float((other(x) - wanted).abs().max() / wanted.abs().max())


NETS = {
    "mlp": (small_mlp, 1),
    "cnn": (small_cnn, 2),
    "depthwise": (Depthwise, 2),
    "flattened": (lambda: nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)), 1),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.ReLU()
        ),
        1,
    ),
    "plain": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3)), 1),
}


@pytest.mark.parametrize("name", NETS)
def test_the_function_stays_and_ranges_agree(name: str) -> None:
    build, count = NETS[name]
    model = lively(build())
    task = Task(valid=[], example_inputs=IMAGE)
    equal = equalize(copy.deepcopy(model), task)
    assert same(model, equal, IMAGE) < 1e-5
    pairs, _ = find_pairs(equal, IMAGE)
    assert len(pairs) == count
    for pair in pairs:
        made, read = ranges(equal, pair)
        assert torch.allclose(made, read, rtol=0.02)


def test_three_layers_of_a_depthwise_block_meet_at_their_geometric_mean() -> None:
    model = lively(Depthwise())
    fold_batchnorm(model, IMAGE)
    pairs, reasons = find_pairs(model, IMAGE)
    assert [(p.first, p.second) for p in pairs] == [("block.0", "block.3"), ("block.3", "block.6")]
    assert "several operators read" in reasons["stem.0"]
    (made, middle), (_, read) = (ranges(model, pair) for pair in pairs)
    wanted = (made * middle * read) ** (1 / 3)
    equalize_pairs(model, pairs, tolerance=1e-9, passes=200)
    torch.testing.assert_close(ranges(model, pairs[0])[0], wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(ranges(model, pairs[1])[1], wanted, rtol=1e-4, atol=0)


def uneven(model: nn.Module, x: Tensor, decades: float) -> nn.Module:
    """The same function with channels of very different size."""
    pairs, _ = find_pairs(model, x)
    for pair in pairs:
        channels = len(layers_of(model, pair)[0].weight)
        scale(model, pair, 10 ** ((torch.rand(channels, dtype=torch.float64) - 0.5) * 2 * decades))
    return model


def test_one_scale_a_tensor_is_enough_behind_it() -> None:
    """The claim of the paper's table 1: per-tensor grids at chance without, as good as float with equalization."""
    task = small_task()
    model = fit(small_cnn(), task, epochs=8, lr=0.01).eval()
    fold_batchnorm(model, task.inputs())
    float_score = evaluate(model, task).value
    uneven(model, task.inputs()[0][0], 2.0)
    assert evaluate(model, task).value == float_score

    def quantized(one: nn.Module) -> float:
        return evaluate(quantize(one, task, weights="symmetric_tensor", weight_bits=6), task).value

    lost = quantized(copy.deepcopy(model))
    kept = quantized(equalize(copy.deepcopy(model), task))
    assert lost < float_score - 0.2
    assert kept >= float_score - 1 / 32


def test_masks_stay_and_dead_channels_do_no_harm() -> None:
    model = small_mlp().eval()
    keep = torch.ones(32, 64, dtype=torch.bool)
    keep[3] = False
    keep[:, ::2] = False
    attach(model[1], Mask(keep))
    equal = equalize(copy.deepcopy(model), Task(valid=[], example_inputs=IMAGE))
    assert torch.equal(equal[1].weight == 0, ~keep)
    assert same(model, equal, IMAGE) < 1e-5
    assert torch.equal(bake(equal)[1].weight != 0, keep)


def test_large_biases_move_through_relus_and_change_nothing_above_three_deviations() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        for _ in range(50):
            model.train()(torch.randn(256, 1, 8, 8))
        model[2].bias.fill_(5.0)
    model.eval()
    x = torch.randn(512, 1, 8, 8)
    with recording() as ledger:
        equal = equalize(copy.deepcopy(model), Task(valid=[], example_inputs=IMAGE), absorb_bias=True)
    with torch.no_grad():
        wanted = model(x)
        assert float((equal(x) - wanted).abs().mean() / wanted.abs().max()) < 1e-3  # only the tails differ
        plain = equalize(copy.deepcopy(model), Task(valid=[], example_inputs=IMAGE))
        assert 0.5 < float(equal[1](x.flatten(1)).mean() / plain[1](x.flatten(1)).mean()) < 0.65  # (5 - 2) / 5
    assert "the biases of 16 channels were absorbed into the next layer" in ledger.notes


def test_relu6_is_left_or_replaced_and_that_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.Flatten()).eval()
    task = Task(valid=[], example_inputs=IMAGE)
    with pytest.raises(CompressionError, match="relu6='replace'"):
        equalize(copy.deepcopy(model), task)
    with recording() as ledger:
        equal = equalize(copy.deepcopy(model), task, relu6="replace")
    assert same(model, equal, IMAGE) < 1e-5
    assert "1 ReLU6 were replaced by ReLU: the function differs where an activation exceeds 6" in ledger.notes


def test_what_cannot_be_equalized_is_named() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(torch.nn.functional.gelu(self.a(x)))
            return self.d(torch.relu(self.c(torch.relu(self.c(x)))))

    pairs, reasons = find_pairs(Reused(), torch.randn(2, 8))
    assert pairs == []
    assert "gelu" in reasons["a"]
    assert "called more than once" in reasons["b"]
    assert reasons["c"] == "it is called more than once"
    task = small_task()
    with pytest.raises(CompressionError, match="before quantizing it"):
        equalize(int8(small_cnn(), task), task)


def test_pairs_say_what_stands_between() -> None:
    found, _ = find_pairs(fold_batchnorm(small_cnn().eval(), IMAGE), IMAGE)
    assert found[0] == Pair("0", "3", 1, ("relu",))
    assert (found[1].first, found[1].second, found[1].columns) == ("3", "8", 1)
