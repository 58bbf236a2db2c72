"""The paper's claims: what each order leaves, XNOR-Net as order 1, columns as the convolution reads them."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import featherweight as fw
from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.binary import Start
from featherweight.core.fit import fit
from featherweight.core.forms import Form, Mask, activation_form, attach, bake, codes_of
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.export import onnx
from featherweight.recipes import horq as module
from featherweight.recipes import xnor_net
from featherweight.recipes.horq import ResidualSigns, residual_signs


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 50))
def test_each_order_takes_off_n_times_its_size_squared(n: int, terms: int, seed: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before, after = (x - residual_signs(x, (0,), k) for k in (terms - 1, terms))
    beta = before.abs().mean()
    torch.testing.assert_close(after.square().sum(), before.square().sum() - n * beta.square())


@pytest.mark.parametrize(
    ("n", "wanted"), [(20000, (0.3634, 0.1307, 0.0585, 0.0330)), (27, (0.349, 0.120, 0.051, 0.026))]
)
def test_the_error_of_normal_inputs(n: int, wanted: tuple[float, ...]) -> None:
    x = torch.randn(max(1, 400000 // n), n)
    for terms, error in enumerate(wanted, 1):
        left = (x - residual_signs(x, (1,), terms)).square().sum(1) / x.square().sum(1)
        assert float(left.mean()) == pytest.approx(error, abs=0.002)


OPTIONS: list[dict] = [
    {},
    {"padding": 1},
    {"padding": "same", "dilation": 2},
    {"stride": 2, "padding": (2, 0)},
    {"groups": 2, "padding": 1},
    {"padding": 2, "padding_mode": "circular"},
]


def binary(conv: nn.Conv2d, order: int) -> nn.Conv2d:
    conv = copy.deepcopy(conv)
    module.binarize(conv, Site("", conv), Start(torch.randn(4), 1.0, 1.0), order)
    return conv


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_order_one_is_xnor_net(options: dict) -> None:
    conv, x = nn.Conv2d(4, 6, 3, **options), torch.randn(2, 4, 9, 9)
    torch.manual_seed(1)
    ours = binary(conv, 1)
    torch.manual_seed(1)
    theirs = copy.deepcopy(conv)
    xnor_net.binarize(theirs, Site("", theirs), Start(torch.randn(4), 1.0, 1.0))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layer_multiplies_the_columns_of_the_paper(options: dict) -> None:
    conv, x = nn.Conv2d(4, 6, 3, bias=False, **options), torch.randn(2, 4, 9, 9)
    ours = binary(conv, 3)
    form = activation_form(ours, "input")
    assert isinstance(form, ResidualSigns)
    centred = x - form.shift.detach().view(-1, 1, 1)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    around = conv._reversed_padding_repeated_twice
    columns = F.unfold(F.pad(centred, around, mode), 3, conv.dilation, 0, conv.stride)
    alive = F.unfold(F.pad(torch.ones_like(centred), around, mode), 3, conv.dilation, 0, conv.stride)
    columns, alive = (c.view(2, conv.groups, -1, c.shape[-1]) for c in (columns, alive))
    rest, total = columns, torch.zeros_like(columns)
    for _ in range(3):
        part = rest.abs().mean(2, keepdim=True) * torch.where(rest >= 0, 1.0, -1.0) * alive
        total, rest = total + part, rest - part
    weight = ours.weight.detach().view(conv.groups, 6 // conv.groups, -1)
    wanted = torch.einsum("goc,ngcl->ngol", weight, total).reshape(conv(x).shape)
    torch.testing.assert_close(ours(x).detach(), wanted)


def test_higher_orders_are_nearer_to_the_layer() -> None:
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(4, 4, 9, 9)
    signs = copy.deepcopy(binary(conv, 1).weight.detach())
    true = F.conv2d(x, signs, padding=1)
    gaps = []
    for order in (1, 2, 3, 4):
        torch.manual_seed(0)
        layer = copy.deepcopy(conv)
        module.binarize(layer, Site("", layer), Start(torch.zeros(4), 1.0, 1.0), order)
        gaps.append(float((layer(x).detach() - layer.bias.detach().view(-1, 1, 1) - true).square().mean()))  # type: ignore[union-attr]
    assert all(later < 0.7 * earlier for earlier, later in pairwise(gaps)), gaps
    assert gaps[-1] < 0.2 * gaps[0], gaps


def test_training_recovers_and_file_and_export_agree(trained: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = trained
    attach(pruned := copy.deepcopy(model).get_submodule("3"), Mask(torch.rand(16, 8, 3, 3) > 0.3))
    small = copy.deepcopy(model)
    small.add_module("3", pruned)
    small = entry("horq")(small, task, epochs=6, lr=0.01)
    assert evaluate(small, task).value >= evaluate(model, task).value - 0.07
    plain = bake(copy.deepcopy(small)).eval()
    codes = codes_of(plain.get_submodule("3"))
    assert codes is not None
    assert set(codes.symbols.unique().tolist()) == {-1, 0, 1}
    x = task.inputs()[0][0]
    with torch.no_grad():
        fw.save(small, tmp_path / "m.fw", example_inputs=task.inputs())
        for loaded in (fw.load(tmp_path / "m.fw"), fw.load(tmp_path / "m.fw", into=small_cnn())):
            assert torch.equal(loaded.eval()(x), plain(x))
    report = onnx(small, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert report.int8_weights == 1
    assert report.difference is not None
    assert report.difference < 1e-4


def test_a_linear_network_without_batch_norms_keeps_its_scale() -> None:
    torch.manual_seed(0)
    task = small_task()
    model = fit(small_mlp(), task, epochs=10, lr=0.01).eval()
    small = entry("horq")(copy.deepcopy(model), task, epochs=0, order=3, keep_first_last=False).eval()
    assert evaluate(small, task).value > 0.7


def test_gradients_reach_inputs_weights_and_shifts() -> None:
    conv, x = binary(nn.Conv2d(4, 6, 3, padding=1), 2), torch.randn(2, 4, 6, 6, requires_grad=True)
    conv(x).square().sum().backward()
    gradients: list[Tensor | None] = [x.grad, *(p.grad for p in conv.parameters())]
    assert len(gradients) == 4
    assert all(g is not None and bool((g != 0).any()) for g in gradients)


def test_damaged_forms_are_found() -> None:
    form = ResidualSigns(torch.zeros(4), -3, 1.0, 2, nn.Conv2d(4, 2, 3, padding=1))
    held, tensors = form.state()
    assert Form.restored("ResidualSigns", held, tensors).unsound() == ""
    for key in held:
        assert Form.restored("ResidualSigns", {**held, key: {"no": "sense"}}, tensors).unsound(), key


def test_bad_options(trained: tuple[nn.Module, Task]) -> None:
    with pytest.raises(BadOption, match="order=0"):
        entry("horq")(copy.deepcopy(trained[0]), trained[1], order=0)
    with pytest.raises(CompressionError, match="keep_first_last=False"):
        entry("horq")(small_mlp(), small_task(), epochs=0)
