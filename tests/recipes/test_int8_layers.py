"""Every layer of int8 networks of the zoo, given equal inputs, is in ONNX Runtime within one step of the simulation."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from featherweight import zoo
from featherweight.core.forms import activation_form, bake
from featherweight.core.task import Task
from featherweight.core.walk import joined, walk
from featherweight.export import onnx, session
from featherweight.recipes.int8 import int8


@pytest.mark.parametrize("spec", ["lenet5", "resnet:depth=8,width=0.5"])
def test_layers_agree_to_one_step(spec: str, tmp_path: Path) -> None:
    images = torch.rand(4, 1, 28, 28)
    task = Task(valid=[(images, torch.zeros(4, dtype=torch.long))], calibration=[(images,)])
    small = bake(int8(zoo.build(spec).eval(), task)).eval()
    layers = [path for path, module in small.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    inputs: dict[str, Tensor] = {}
    walk(small, task, joined(task, 1), layers, lambda path, layer, value: inputs.update({path: value.clone()}))
    assert set(inputs) == set(layers)
    exact = 0
    for path, value in inputs.items():
        alone = nn.Sequential(small.get_submodule(path))
        onnx(alone, tmp_path / "layer.onnx", example_inputs=value, check=False)
        with torch.no_grad():
            wanted = alone(value)
        grid = activation_form(alone[0], "output")
        # a layer whose output has no grid of its own is compared to a step of 255 over what it puts out
        step = grid.steps().scale if grid is not None else float(wanted.max() - wanted.min()) / 255  # type: ignore[operator]
        gap = (session(tmp_path / "layer.onnx")(value) - wanted).abs()
        assert float(gap.max()) <= 1.001 * step, path
        exact += int(float(gap.max()) <= 0.01 * step)
    assert exact >= 1
