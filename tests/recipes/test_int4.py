"""Weights of four bits in groups: the formula, the bytes, and files that ONNX Runtime and OpenVINO run."""

import copy
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from conftest import small_mlp, small_task
from featherweight.core.decibels import decibels
from featherweight.core.forms import Affine, Mask, attach, bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.task import Task
from featherweight.errors import BadOption, CompressionError
from featherweight.export import session
from featherweight.recipes.int4 import grouped, int4


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 2, stride=2), nn.Flatten(), nn.Linear(72, 64), nn.Linear(64, 4)
    ).eval()


def task_of(x: Tensor) -> Task:
    return Task(valid=[(x, torch.zeros(len(x), dtype=torch.long))])


def test_every_group_is_on_its_own_grid_and_codes_are_exact() -> None:
    layer = nn.Linear(96, 5)
    before = layer.weight.detach().clone() * torch.logspace(-2, 2, 3).repeat_interleave(32)
    layer.weight.data.copy_(before)
    int4(layer, task_of(torch.randn(2, 96)), group=32)
    shown = layer.weight.detach().clone()
    codes = codes_of(bake(layer))
    assert isinstance(codes.rule, Affine)
    assert (codes.rule.block, codes.rule.scale.shape) == (32, (15,))
    assert torch.equal(codes.decode(), shown)
    assert int(codes.symbols.abs().max()) <= 7
    step = codes.rule.scale.repeat_interleave(32).view(5, 96)
    inside = before.abs() <= 7 * step
    assert ((shown - before).abs() <= 0.5001 * step)[inside].all()
    assert inside.float().mean() > 0.9


def test_smaller_groups_lose_less_and_clipping_never_loses() -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(3.0).sample((32, 256))
    site = Site.of(weight)
    ratios = [decibels(weight, grouped(site, 4, group)(weight)) for group in (256, 128, 64, 32)]
    assert ratios == sorted(ratios)
    assert ratios[-1] > ratios[0] + 2
    plain = weight.view(-1, 64)
    step = plain.abs().amax(1, keepdim=True) / 7
    widest = ((plain / step).round() * step).view_as(weight)
    assert decibels(weight, grouped(site, 4, 64)(weight)) >= decibels(weight, widest)


def test_the_files_hold_four_bits_and_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)
    )
    x = torch.randn(64, 1, 28, 28)
    result = fw.compress(model.eval(), task_of(x), "int4", group=64, out=tmp_path, measure=False)
    weights = 784 * 256 + 256 * 256 + 256 * 8
    biases = 4 * (256 + 256 + 8)
    scales = 4 * (784 // 56 * 256 + 256 // 64 * 264)
    assert (tmp_path / "model.fw").stat().st_size < weights / 2 + scales + biases + 4000
    assert (tmp_path / "model.onnx").stat().st_size < weights / 2 + scales + biases + 4000
    proto = onnx.load(tmp_path / "model.onnx")
    stored = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert sorted(len(t.raw_data) for t in stored) == [1024, 32768, 100352]
    with torch.no_grad():
        wanted = result.model(x)
    assert float((session(tmp_path / "model.onnx")(x) - wanted).abs().max() / wanted.abs().max()) < 0.03
    assert result.report["onnx"]["difference"] < 1e-4


def test_openvino_runs_it(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    x = torch.randn(4, 1, 8, 8)
    result = fw.compress(network(), task_of(x), "int4", group=16, out=tmp_path, measure=False)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU", exact)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(compiled({0: x.numpy()})[0]), result.model(x), rtol=1e-3, atol=1e-4)


def test_layers_whose_inputs_do_not_divide_take_what_does() -> None:
    with recording() as ledger:
        small = int4(network(), task_of(torch.randn(2, 1, 8, 8)), group=64, weight_bits={"Conv2d": 8, "Linear": 3})
    rows = {row["layer"]: (row["bits"], row["group"]) for row in ledger.tables["groups"]}
    assert rows == {"0": (8, 9), "2": (8, 64), "4": (3, 36), "5": (3, 64)}
    assert (
        "4 layers with a scale for each 64 weights; 9, 36 where 64 does not divide what an output reads" in ledger.notes
    )
    assert int(codes_of(bake(small)[4]).symbols.abs().max()) <= 3


def test_masks_stay_and_zeros_are_refused() -> None:
    model = small_mlp()
    keep = torch.rand(32, 64) > 0.8
    attach(model[1], Mask(keep))
    small = int4(model, small_task(), group=16)
    assert not small[1].weight[~keep].any()
    assert torch.equal(
        codes_of(bake(small)[1]).symbols.view(32, 64)[~keep], torch.zeros(int((~keep).sum()), dtype=torch.int8)
    )
    dead = copy.deepcopy(small_mlp())
    for layer in (dead[1], dead[3]):
        nn.init.zeros_(layer.weight)
    with pytest.raises(CompressionError, match="nothing to quantize"):
        int4(dead, small_task())
    with pytest.raises(BadOption, match="from 2 to 8"):
        int4(small_mlp(), small_task(), weight_bits=1)
