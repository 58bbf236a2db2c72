"""Eight bits after training: what the recipe declares, and that a runtime computes the same with integers."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from conftest import fused_operators
from featherweight import zoo
from featherweight.catalogue import entry
from featherweight.core.forms import Affine, activation_forms, bake, codes_of, mask_of
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import MissingNeed, UnknownName
from featherweight.export import onnx as to_onnx
from featherweight.export import session
from featherweight.prune import prune
from featherweight.recipes.int8 import int8


def task_of(x: Tensor) -> Task:
    return Task(valid=[(x, torch.zeros(len(x), dtype=torch.long))], calibration=[(x,)])


def test_a_trained_network_keeps_its_metric_and_runs_on_integers(
    trained: tuple[nn.Module, Task], tmp_path: Path
) -> None:
    model, task = trained
    small = int8(copy.deepcopy(model), task)
    assert abs(evaluate(small, task).value - evaluate(model, task).value) <= 1 / 32
    report = to_onnx(small, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert (report.kind, report.int8_weights) == ("qdq", 3)
    assert evaluate(session(tmp_path / "m.onnx"), task).k == evaluate(small, task).k
    assert {"QLinearConv", "QGemm"} <= set(fused_operators(tmp_path / "m.onnx", tmp_path))
    assert not {"Conv", "Gemm", "FusedConv", "Relu"} & set(fused_operators(tmp_path / "m.onnx", tmp_path))


def test_weights_are_symmetric_per_channel_and_zero_stays_zero(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    baked = bake(int8(copy.deepcopy(model), task))
    codes = codes_of(baked.get_submodule("3"))
    assert codes is not None
    assert isinstance(codes.rule, Affine)
    assert codes.rule.scale.shape == (16,)
    assert codes.rule.axis == 0
    assert codes.symbols.abs().flatten(1).amax(1).eq(127).all()
    assert not codes.rule.zero_point.any()


def test_activations_are_unsigned_and_a_relu_is_the_end_of_its_grid(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    forms = activation_forms(int8(copy.deepcopy(model), task))
    assert set(forms) == {"0", "3", "8"}
    assert set(forms["0"]) == {"input", "output"}
    assert set(forms["8"]) == {"input"}  # the outputs of the network stay float
    behind_relu = forms["0"]["output"].steps()  # type: ignore[operator]
    assert (behind_relu.zero_point, behind_relu.low, behind_relu.high) == (0, 0, 255)
    assert 0 < forms["0"]["input"].steps().zero_point < 255  # type: ignore[operator]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 8, 3),
        nn.Conv2d(4, 8, 3, bias=False, stride=2, padding=1),
        nn.Conv2d(4, 8, 3, groups=2, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, groups=4, padding="same"),
        nn.Linear(7, 5),
        nn.Linear(7, 5, bias=False),
    ],
    ids=["plain", "strided", "grouped_dilated", "depthwise", "linear", "linear_without_bias"],
)
def test_one_layer_on_integers_is_within_one_step(layer: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(8, 4, 7, 7) if isinstance(layer, nn.Conv2d) else torch.randn(64, 7)
    layer.reset_parameters()  # parameters of a table are drawn before the seed is set
    model = nn.Sequential(copy.deepcopy(layer), nn.ReLU(), nn.Flatten())
    last = nn.Linear(model(x).shape[1], 3)
    task = task_of(x)
    small = int8(nn.Sequential(*model, last), task).eval()
    to_onnx(nn.Sequential(small[0], small[1]), tmp_path / "m.onnx", example_inputs=x)
    with torch.no_grad():
        wanted = small[1](small[0](x))
    forms = activation_forms(small)["0"]
    step = forms["output"].steps().scale if "output" in forms else 1e-2 * float(wanted.max())  # type: ignore[operator]
    assert float((session(tmp_path / "m.onnx")(x) - wanted).abs().max()) <= step * 1.001
    assert "QLinearConv" in fused_operators(tmp_path / "m.onnx", tmp_path) or isinstance(layer, nn.Linear)


def test_residual_networks_stay_on_integers_from_the_input_to_the_pooling(tmp_path: Path) -> None:
    model = zoo.build("resnet:depth=8,width=0.5").eval()
    small = int8(model, task_of(torch.randn(4, 1, 28, 28)))
    to_onnx(small, tmp_path / "m.onnx", example_inputs=torch.randn(2, 1, 28, 28))
    operators = fused_operators(tmp_path / "m.onnx", tmp_path)
    assert operators.count("QLinearConv") == 9
    assert operators.count("QLinearAdd") == 3
    assert operators.count("QuantizeLinear") == 2  # the image, and the pooled features
    assert not {"Conv", "FusedConv", "Add", "Relu"} & set(operators)


def test_pooling_between_functions_stays_on_integers(tmp_path: Path) -> None:
    small = int8(zoo.build("lenet5"), task_of(torch.randn(4, 1, 28, 28)))
    to_onnx(small, tmp_path / "m.onnx", example_inputs=torch.randn(2, 1, 28, 28))
    operators = fused_operators(tmp_path / "m.onnx", tmp_path)
    assert (operators.count("QLinearConv"), operators.count("QGemm")) == (2, 2)
    assert operators.count("QuantizeLinear") == 1


class Functional(nn.Module):
    """Operators between modules: two readers of one convolution, an addition and a concatenation inside one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.last, self.unused = nn.Conv2d(8, 2, 1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.left(torch.relu_(x.clone())) + self.right(x)
        return self.last(torch.cat([torch.relu(y), y], 1)).mean((2, 3))


def test_operators_between_modules_are_exact_too(tmp_path: Path) -> None:
    x = torch.randn(4, 1, 9, 9)
    model = Functional()
    with recording() as ledger:
        small = int8(copy.deepcopy(model), task_of(x)).eval()
    assert ledger.skipped["unused"].startswith("its inputs are not quantized")
    assert any("cannot carry a grid" in text for text in ledger.notes)
    with torch.no_grad():
        wanted = model(x)
        assert float((small(x) - wanted).abs().max() / wanted.abs().max()) < 0.05
    report = to_onnx(small, tmp_path / "m.onnx", example_inputs=x)
    assert report.difference is not None
    assert report.difference < 0.02


@pytest.mark.parametrize("calibrator", ["minmax", "percentile", "mse"])
def test_calibrators(trained: tuple[nn.Module, Task], calibrator: str) -> None:
    model, task = trained
    small = int8(copy.deepcopy(model), task, calibrator=calibrator)
    assert abs(evaluate(small, task).value - evaluate(model, task).value) <= 2 / 32


def test_other_layers_and_bad_options_are_named(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    with recording() as ledger:
        int8(nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.Conv2d(2, 4, 3)), task_of(torch.randn(2, 1, 8, 8)))
    assert "ConvTranspose2d" in ledger.skipped["0"]
    with pytest.raises(UnknownName, match="did you mean 'minmax'"):
        int8(copy.deepcopy(model), task, calibrator="minmaxx")
    with pytest.raises(MissingNeed, match="calibration"):
        int8(copy.deepcopy(model), Task(valid=task.valid))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y.mean((2, 3)) if float(y.sum()) > 0 else y.amax((2, 3))


def test_a_model_without_a_graph_is_quantized_without_folding() -> None:
    with recording() as ledger:
        small = int8(Branching(), task_of(torch.randn(2, 1, 8, 8)))
    assert any(text.startswith("batch norm is not folded") for text in ledger.notes)
    assert isinstance(small.get_submodule("norm"), nn.BatchNorm2d)
    assert codes_of(bake(small).get_submodule("conv")) is not None


def test_a_grid_that_stands_at_several_places_goes_into_a_file_without_class(tmp_path) -> None:
    """LeNet-5's pooling keeps the grid of what it reads."""
    torch.manual_seed(0)
    images = torch.rand(64, 1, 28, 28)
    task = Task(valid=[(images, torch.randint(0, 10, (64,)))], calibration=[images])
    result = fw.compress(zoo.build("lenet5"), task, "int8", out=tmp_path, measure=False, onnx=False)
    assert result.report["file"]["class_free"], result.report["file"]
    with torch.no_grad():
        assert torch.equal(fw.load(tmp_path / "model.fw")(images), result.model(images))


def test_pruned_networks_are_equalized_too_and_keep_their_zeros(trained: tuple[nn.Module, Task]) -> None:
    model, task = copy.deepcopy(trained[0]), trained[1]
    pruned = prune(model, task, sparsity=0.5, epochs=0)
    keep = mask_of(pruned.get_submodule("3"))
    assert keep is not None
    keep, score = keep.clone(), evaluate(pruned, task).value
    with recording() as ledger:
        small = int8(pruned, task, equalize=True)
    assert "2 pairs of layers were scaled to equal ranges" in ledger.notes
    assert evaluate(small, task).value >= score - 1 / 32
    assert not bake(small).get_submodule("3").weight[~keep].any()


def test_equalization_leaves_the_integers_of_an_earlier_method(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    found = {}
    for equalize in (False, True):
        small = entry("twn")(copy.deepcopy(model), task, epochs=0)
        with recording() as ledger:
            baked = bake(int8(small, task, equalize=equalize))
        codes = codes_of(baked.get_submodule("3"))
        assert codes is not None
        found[equalize] = len(codes.symbols.unique())
    assert found == {False: 3, True: 3}
    assert any(text.startswith("layers are not equalized: an earlier method's grids") for text in ledger.notes)
