"""The paper's claims: everything is a sign, sums are those of xnor and popcount, latent weights stay within bounds."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import featherweight as fw
from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.binary import SignInput, signs
from featherweight.core.fit import fit
from featherweight.core.forms import activation_form, bake, codes_of, forms_of, originals
from featherweight.core.grids import ActivationGrid
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.core.thresholds import integer_thresholds
from featherweight.errors import BadData, BadOption
from featherweight.export import onnx
from featherweight.recipes.bnn import ShiftAdaMax, power_of_two


@pytest.fixture(scope="module")
def binarized(trained: tuple[nn.Module, Task]) -> nn.Module:
    torch.manual_seed(0)
    model, task = trained
    return entry("bnn")(copy.deepcopy(model), task, epochs=8, lr=0.01)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 20))
def test_a_product_of_signs_is_a_count_of_differences(n: int, seed: int) -> None:
    """a . b = n - 2 popcount(a xor b), for any n, with words of 64 bits whose rest is zero on both sides."""
    torch.manual_seed(seed)
    a, b = signs(torch.randn(n)), signs(torch.randn(n))

    def words(v: Tensor) -> list[int]:
        bits = "".join("1" if s > 0 else "0" for s in v.tolist())
        return [int(bits[i : i + 64], 2) for i in range(0, n, 64)]

    differ = sum((x ^ y).bit_count() for x, y in zip(words(a), words(b), strict=True))
    assert int(a @ b) == n - 2 * differ


def test_training_recovers_and_everything_is_a_sign(
    trained: tuple[nn.Module, Task], binarized: nn.Module, tmp_path: Path
) -> None:
    model, task = trained
    assert evaluate(binarized, task).value >= evaluate(model, task).value - 0.1
    inputs = {path: activation_form(binarized.get_submodule(path), "input") for path in ("0", "3", "8")}
    assert [type(form) for form in inputs.values()] == [ActivationGrid, SignInput, SignInput]
    plain = bake(copy.deepcopy(binarized)).eval()
    for path in inputs:
        codes = codes_of(plain.get_submodule(path))
        assert codes is not None
        assert set(codes.symbols.unique().tolist()) == {-1, 1}
    fw.save(binarized, tmp_path / "m.fw", example_inputs=task.inputs())
    x = task.inputs()[0][0]
    with torch.no_grad():
        assert torch.equal(fw.load(tmp_path / "m.fw").eval()(x), plain(x))
    report = onnx(binarized, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert report.int8_weights == 3


def test_latent_weights_stay_within_their_scale(binarized: nn.Module) -> None:
    for path in ("0", "3", "8"):
        layer = binarized.get_submodule(path)
        (form,), (free,) = forms_of(layer), originals(layer, "weight")
        scale = form.scale.view(-1, *[1] * (free.dim() - 1))  # type: ignore[operator]
        assert (free.abs() <= scale).all()
        assert (free.abs() == scale).any(), "some were clipped"


def test_between_two_layers_are_integers_and_thresholds(trained: tuple[nn.Module, Task], binarized: nn.Module) -> None:
    """Sums of the second convolution, then batch norm, ReLU, mean pooling's input: sign by integer comparison alone."""
    _, task = trained
    plain = bake(copy.deepcopy(binarized)).eval()
    layer, norm = plain.get_submodule("3"), plain.get_submodule("4")
    assert isinstance(layer, nn.Conv2d)
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        plain(task.inputs()[0][0])
        hook.remove()
        sign, codes = seen[0], codes_of(layer)
        assert codes is not None
        assert set(sign.unique().tolist()) == {-1.0, 1.0}
        sums = nn.functional.conv2d(sign, codes.symbols.float(), None, layer.stride, layer.padding)
        scale = codes.rule.scale  # type: ignore[union-attr]

        def value(sums: Tensor) -> Tensor:
            return norm((sums * scale).view(-1, 16, 1, 1)).view(-1, 16).relu() - 0.3

        found = integer_thresholds(value, 16, -72, 72)
        flat = sums.movedim(1, -1).flatten(0, -2)
        assert torch.equal(found.signs(flat.long()), signs(value(flat)).long())


def test_a_network_without_batch_norms_starts_near_where_it_was() -> None:
    """Scales and the bias keep the size of what a layer puts out; without them nothing would fit."""
    torch.manual_seed(0)
    task = small_task()
    model = fit(small_mlp(), task, epochs=10, lr=0.01).eval()
    small = entry("bnn")(copy.deepcopy(model), task, epochs=0)
    x = task.inputs()[0][0]
    with torch.no_grad():
        before, after = model(x), small.eval()(x)
    assert 0.3 < float(after.std() / before.std()) < 3
    assert evaluate(small, task).value > 0.5
    assert evaluate(entry("bnn")(model, task, epochs=6, lr=0.01), task).value > 0.9


def test_shift_based_adamax_by_hand_and_in_training(trained: tuple[nn.Module, Task]) -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = ShiftAdaMax([weight], lr=2**-10)
    weight.grad = torch.tensor([0.3, -5.0, 0.0])
    optimizer.step()
    moved = 2.0**-7 * torch.tensor([0.3, -5.0, 0.0]) / 8 * torch.tensor([4.0, 0.25, 0.0])
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, -2.0, 3.0]) - moved)
    assert power_of_two(torch.tensor(0.7)) == 0.5
    assert power_of_two(torch.tensor(0.72)) == 1.0, "the edge lies at 2^-1/2"
    model, task = trained
    small = entry("bnn")(copy.deepcopy(model), task, epochs=6, lr=2**-7, optimizer="shift_adamax")
    assert evaluate(small, task).value >= evaluate(model, task).value - 0.15


def test_the_ends_may_stay_float_and_a_later_grid_leaves_signs_alone(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    small = entry("bnn")(copy.deepcopy(model), task, epochs=1, keep_first_last=True)
    assert [activation_form(small.get_submodule(p), "input") is None for p in ("0", "3", "8")] == [True, False, True]
    with recording() as ledger:
        later = entry("int8")(small, task)
    assert isinstance(activation_form(later.get_submodule("3"), "input"), SignInput)
    assert "keeps the SignInput" in ledger.skipped["3"]


def test_bad_input(trained: tuple[nn.Module, Task]) -> None:
    model, _ = trained
    with pytest.raises(BadData, match="calibration data are empty"):
        entry("bnn")(copy.deepcopy(model), small_task(calibration=[]), epochs=0)
    with pytest.raises(BadOption, match="epochs=-1"):
        entry("bnn")(copy.deepcopy(model), small_task(), epochs=-1)
