from pathlib import Path

import onnx as onnx_format
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import small_mlp
from featherweight.catalogue import entry
from featherweight.core.forms import Affine, Codes, Product, Table, attach, bake, declare_codes
from featherweight.core.grids import ActivationGrid, SymmetricGrid, covering
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData, BadOption, ExportError, FormatError, TraceError
from featherweight.export import onnx, session
from featherweight.export.lower import dequantize, int8


class Convnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.down = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.down(torch.relu(self.conv(x)))).flatten(1))


@pytest.fixture
def convnet() -> nn.Module:
    torch.manual_seed(0)
    return Convnet()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def snapped(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            attach(module, SymmetricGrid(8))
    return bake(model)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx_format.load(str(path)).graph.node]


def test_float_file_is_dynamic_named_and_equal(convnet: nn.Module, images: Tensor, tmp_path: Path) -> None:
    report = onnx(convnet, tmp_path / "m.onnx", example_inputs=images)
    proto = onnx_format.load(str(tmp_path / "m.onnx"))
    assert (report.kind, report.inputs, report.outputs) == ("float", ["input"], ["output"])
    assert report.dynamic_batch
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.opset_import[0].version == report.opset == 20
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size
    assert report.difference is not None
    assert report.difference < 1e-5
    more = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(session(tmp_path / "m.onnx")(more), convnet(more), rtol=1e-4, atol=1e-5)


def test_same_model_same_bytes_and_nothing_of_this_machine(convnet: nn.Module, images: Tensor, tmp_path: Path) -> None:
    onnx(convnet, tmp_path / "a.onnx", example_inputs=images, check=False)
    onnx(convnet, tmp_path / "b.onnx", example_inputs=images[:2], check=False)
    content = (tmp_path / "a.onnx").read_bytes()
    assert content == (tmp_path / "b.onnx").read_bytes()
    assert str(Path.cwd()).encode() not in content
    assert b"test_export" not in content
    assert {p.name for p in tmp_path.iterdir()} == {"a.onnx", "b.onnx"}


def test_model_is_left_alone(convnet: nn.Module, images: Tensor, tmp_path: Path) -> None:
    attach(convnet.get_submodule("conv"), SymmetricGrid(4))
    convnet.train()
    before = convnet(images)
    onnx(convnet, tmp_path / "m.onnx", example_inputs=images)
    assert convnet.training
    assert torch.equal(convnet(images), before)


def test_int8_weights_are_stored_as_integers_and_exact(convnet: nn.Module, images: Tensor, tmp_path: Path) -> None:
    plain = onnx(convnet, tmp_path / "f.onnx", example_inputs=images)
    report = onnx(snapped(convnet), tmp_path / "w.onnx", example_inputs=images)
    assert (report.kind, report.int8_weights, report.moved) == ("weights", 3, 0.0)
    assert report.difference is not None
    assert report.difference < 1e-5
    assert report.bytes < plain.bytes
    assert operators(tmp_path / "w.onnx").count("DequantizeLinear") == 3


def test_declared_grids_become_pairs_with_integer_biases(convnet: nn.Module, images: Tensor, tmp_path: Path) -> None:
    model = snapped(convnet)
    attach(model.get_submodule("conv"), covering(-4.0, 4.0), "input")
    attach(model.get_submodule("conv"), covering(0.0, 3.0), "output")
    shared = covering(0.0, 2.0)
    attach(model.get_submodule("down"), shared, "output")
    attach(model.get_submodule("head"), shared, "input")
    report = onnx(model, tmp_path / "q.onnx", example_inputs=images)
    graph = onnx_format.load(str(tmp_path / "q.onnx")).graph
    kinds = [(t.data_type, len(t.dims) > 1) for t in graph.initializer]
    assert report.kind == "qdq"
    assert kinds.count((onnx_format.TensorProto.INT32, False)) == 3
    assert kinds.count((onnx_format.TensorProto.INT8, True)) == 3
    assert operators(tmp_path / "q.onnx").count("QuantizeLinear") == 4
    assert "Relu" not in operators(tmp_path / "q.onnx")  # the grids end at zero
    assert report.difference is not None
    assert report.difference < 0.02
    assert 0 < report.moved < 0.01


def test_low_bit_grids_are_clipped_to_their_range(images: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    attach(model[1], ActivationGrid(1 / 3, 0, 0, 3), "input")
    report = onnx(model, tmp_path / "q.onnx", example_inputs=images)
    assert "Clip" in operators(tmp_path / "q.onnx")
    assert report.difference is not None
    assert report.difference < 1e-5


def test_wide_grids_stay_float_arithmetic(images: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    attach(model[1], ActivationGrid(1e-3, 0, 0, 1023), "input")
    report = onnx(model, tmp_path / "q.onnx", example_inputs=images)
    assert "QuantizeLinear" not in operators(tmp_path / "q.onnx")
    assert report.difference is not None
    assert report.difference < 1e-3


def test_linear_on_three_dimensions_keeps_integer_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = snapped(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)))
    report = onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 6))
    graph = onnx_format.load(str(tmp_path / "m.onnx")).graph
    assert report.int8_weights == 2
    assert "Transpose" not in {node.op_type for node in graph.node}
    assert sum(t.data_type == onnx_format.TensorProto.INT8 for t in graph.initializer if len(t.dims) > 1) == 2


@given(st.integers(2, 7), st.integers(0, 100))
def test_half_integer_zero_points_become_odd_symbols(bits: int, seed: int) -> None:
    n = 2**bits - 1
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(0, n + 1, (4, 5), generator=generator)
    scale = torch.rand(4, generator=generator) + 0.01
    codes = Codes(symbols, Affine(scale, torch.tensor(n / 2), 0), (4, 5))
    found = int8(codes)
    assert found is not None
    assert torch.equal(dequantize(*found), codes.decode())


def test_eight_bits_around_a_half_do_not_fit() -> None:
    codes = Codes(torch.tensor([0, 255]), Affine(torch.tensor(0.1), torch.tensor(127.5)), (2,))
    assert int8(codes) is None


def test_codes_that_are_no_short_grid_are_said(images: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    few(model[1], Affine(torch.tensor(0.3), torch.tensor(0)), torch.arange(128) * 1000)
    report = onnx(model, tmp_path / "m.onnx", example_inputs=images)
    assert report.int8_weights == report.shifted == 0
    assert any(note.startswith("1: weights stay float") for note in report.notes)


GRIDS = {
    "levels around a half": (Affine(torch.tensor(0.01), torch.tensor(127.5)), 0, 256),
    "unsigned": (Affine(torch.rand(64) + 0.1, torch.arange(64), axis=0), 0, 256),
    "unsigned, of each input": (Affine(torch.rand(32) + 0.1, torch.arange(32), axis=1), 0, 256),
    "a float offset": (Affine(torch.rand(64) + 0.1, torch.randn(64), axis=0), 0, 16),
    "blocks": (Affine(torch.rand(64 * 32 * 9 // 24) + 0.1, torch.tensor(0), block=24), -8, 8),
    "unsigned blocks": (Affine(torch.rand(64 * 32 * 9 // 24) + 0.1, torch.full((768,), 7), block=24), 0, 16),
    "sixteen bits": (Affine(torch.tensor(0.001), torch.tensor(0)), -(2**15), 2**15),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_beyond_int8_are_stored_as_integers_exactly(name: str, tmp_path: Path) -> None:
    model, (rule, low, high) = nn.Sequential(nn.Conv2d(32, 64, 3)), GRIDS[name]
    few(model[0], rule, torch.randint(low, high, (64, 32, 3, 3)))
    x = torch.randn(2, 32, 5, 5)
    report = onnx(model, tmp_path / "m.onnx", example_inputs=x)
    wanted = ("weights", 0, 1, 0) if name == "blocks" else ("float", 0, 0, 1)
    assert (report.kind, report.int8_weights, report.blocked, report.shifted) == wanted
    assert report.difference < 1e-5
    assert report.bytes < (0.55 if name == "sixteen bits" else 0.45) * 4 * model[0].weight.numel()


def few(layer: nn.Module, rule: Affine | Table | Product, symbols: Tensor) -> None:
    codes = Codes(symbols, rule, tuple(layer.weight.shape))
    layer.weight.data.copy_(codes.decode())
    declare_codes(layer, "weight", codes)


TABLES = {
    "table": (Table(torch.randn(16).double().float()), torch.randint(0, 16, (64, 32, 3, 3))),
    "a table per channel": (Table(torch.randn(64, 4), 0), torch.randint(0, 4, (64, 32, 3, 3))),
    "a table per input": (Table(torch.randn(32, 4), 1), torch.randint(0, 4, (64, 32, 3, 3))),
    "vectors": (Product(torch.randn(32, 8, 9)), torch.randint(0, 8, (64, 32))),
    "vectors of channels": (Product(torch.randn(8, 16, 4), 1), torch.randint(0, 16, (64 * 9, 8))),
    "vectors in stages": (Product(torch.randn(3, 32, 8, 9)), torch.randint(0, 8, (3, 64, 32))),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_stored_as_bytes_and_looked_up_exactly(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(32, 64, 3))
    few(model[0], *TABLES[name])
    x = torch.randn(2, 32, 5, 5)
    report = onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert (report.kind, report.int8_weights, report.looked_up) == ("float", 0, 1)
    assert report.difference < 1e-5
    assert report.bytes < 0.5 * 4 * model[0].weight.numel()
    with torch.no_grad():
        model[0].weight.view(-1)[7] += 0.5  # the gate would see a single wrong weight
        assert (session(tmp_path / "m.onnx")(x)[0] - model(x)).abs().max() > 0.01


def test_codes_of_a_table_that_is_longer_than_the_weight_stay_float(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    few(model[0], Table(torch.randn(4, 8), 0), torch.arange(8).expand(4, 8))
    assert onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 8)).looked_up == 0


def test_half_precision_is_stored_as_such(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(200, 100))
    model[0].weight.data.copy_(model[0].weight.half())
    report = onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 200))
    assert report.halves == 1
    assert report.bytes < 0.55 * 4 * 20_000
    assert report.difference < 1e-5


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.embed(tokens) * scale
        x = x if mask is None else x * mask.unsqueeze(-1)
        return {"logits": self.head(x.mean(1)), "features": x}


def test_names_of_dictionaries(tmp_path: Path) -> None:
    model = Named()
    inputs = {"tokens": torch.randint(0, 11, (3, 5)), "mask": torch.ones(3, 5)}
    report = onnx(model, tmp_path / "m.onnx", example_inputs=inputs)
    assert (report.inputs, report.outputs) == (["tokens", "mask"], ["logits", "features"])
    run = session(tmp_path / "m.onnx")
    logits, _ = run(**inputs)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**inputs)["logits"])
    torch.testing.assert_close(run(inputs["tokens"], inputs["mask"])[0], logits)
    with pytest.raises(BadData, match="takes the inputs tokens, mask"):
        run(tokens=inputs["tokens"])


def test_given_names(convnet: nn.Module, images: Tensor, tmp_path: Path) -> None:
    names: dict[str, list[str]] = {"input_names": ["image"], "output_names": ["scores"]}
    report = onnx(convnet, tmp_path / "m.onnx", example_inputs=images, **names)
    assert (report.inputs, report.outputs) == (["image"], ["scores"])
    assert session(tmp_path / "m.onnx").inputs == ["image"]
    with pytest.raises(BadOption, match="2 names: the model takes 1"):
        onnx(convnet, tmp_path / "m.onnx", example_inputs=images, input_names=["a", "b"])


def test_a_single_sample_still_gives_a_dynamic_batch(convnet: nn.Module, images: Tensor, tmp_path: Path) -> None:
    assert onnx(convnet, tmp_path / "m.onnx", example_inputs=images[:1]).dynamic_batch
    assert session(tmp_path / "m.onnx")(images).shape == (4, 3)


def test_sessions_are_evaluated_like_modules(convnet: nn.Module, images: Tensor, tmp_path: Path) -> None:
    task = Task(valid=[(images, torch.tensor([0, 1, 2, 0]))])
    onnx(convnet, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert evaluate(session(tmp_path / "m.onnx"), task).k == evaluate(convnet, task).k


def test_collapsed_models_are_refused(images: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(ExportError, match="same output for different inputs"):
        onnx(model, tmp_path / "m.onnx", example_inputs=images)
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_untraceable_models_get_one_sentence(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"^Branching cannot be traced \(") as error:
        onnx(Branching(), tmp_path / "m.onnx", example_inputs=images)
    assert "\n" not in str(error.value)
    assert "load(into=" in str(error.value)


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_operators_that_onnx_lacks_are_named(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="bessel_j0") as error:
        onnx(Strange(), tmp_path / "m.onnx", example_inputs=images)
    assert "\n" not in str(error.value)


def test_folders_that_cannot_be_written(convnet: nn.Module, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        onnx(convnet, tmp_path / "file" / "m.onnx", example_inputs=images, check=False)


def test_files_that_are_no_onnx(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(FormatError, match="does not load"):
        session(tmp_path / "m.onnx")
    with pytest.raises(FormatError, match="does not load"):
        session(tmp_path / "absent.onnx")


def test_biases_stay_float_where_the_grids_are_too_coarse_for_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 8)
    for bits, whole in ((8, True), (2, False)):
        model = nn.Sequential(nn.Linear(8, 4))
        attach(model[0], SymmetricGrid(bits))
        attach(model[0], covering(0.0, 1.0, bits), "input")
        report = onnx(model, tmp_path / "m.onnx", example_inputs=x)
        stored = onnx_format.load(str(tmp_path / "m.onnx")).graph.initializer
        assert any(t.data_type == onnx_format.TensorProto.INT32 and t.dims for t in stored) is whole
        assert report.moved <= 0.005
        assert report.difference < 1e-2


def test_a_network_in_half_precision_is_exported_in_its_own_type(tmp_path: Path) -> None:
    model = small_mlp().eval().half()
    x = torch.rand(3, 1, 8, 8).half()
    report = onnx(model, tmp_path / "m.onnx", example_inputs=x)
    found = session(tmp_path / "m.onnx")(x)
    assert found.dtype == torch.float16
    assert report.difference is not None
    assert report.difference < 4e-3
    assert report.bytes < 2.5 * sum(p.numel() for p in model.parameters())


def test_weights_that_bfloat16_holds_are_stored_so_and_are_exact(tmp_path: Path) -> None:
    model = small_mlp().eval()
    with torch.no_grad():
        for path in ("1", "3"):
            weight = model.get_submodule(path).weight
            weight.copy_((weight * 1e-4).bfloat16().float())  # too small for float16
            model.get_submodule(path).bias.zero_()
    x = torch.rand(3, 1, 8, 8)
    report = onnx(model, tmp_path / "m.onnx", example_inputs=x)
    kinds = {i.name: i.data_type for i in onnx_format.load(tmp_path / "m.onnx").graph.initializer}
    assert [kind for name, kind in kinds.items() if "weight" in name] == [onnx_format.TensorProto.BFLOAT16] * 2
    assert report.halves == 2
    assert report.difference is not None
    assert report.difference < 1e-5


def test_a_table_per_output_is_written_only_where_that_is_shorter(tmp_path: Path) -> None:
    """Found: the places of 2000 tables, integers of 64 bits, were not counted, and the file grew."""
    model, x = nn.Sequential(nn.Linear(11, 2000, bias=False)), torch.rand(2, 11)
    plain = onnx(model, tmp_path / "plain.onnx", example_inputs=x)
    sketched = entry("network_sketching")(model, Task(valid=[], example_inputs=x), weight_bits=2)
    report = onnx(sketched, tmp_path / "m.onnx", example_inputs=x)
    assert report.bytes <= plain.bytes + 2000
