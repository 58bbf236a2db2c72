"""Which layers are chosen and which are refused; swapped layers come back as they were, shared ones shared."""

import copy

import pytest
import torch
from torch import nn

from featherweight.coding import load, save
from featherweight.core.blueprint import blueprint, conform, restructure, structure
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import Mask, attach
from featherweight.core.ledger import recording
from featherweight.core.surgery import altered, swap, targets
from featherweight.errors import BadOption, FormatError


class Twice(nn.Module):
    """One linear layer at two paths, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.first(x)))


def swapped_twice() -> Twice:
    model = Twice()
    swap(model, "first", nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6)))
    return model.eval()


def same_and_shared(twin: nn.Module, model: nn.Module) -> None:
    x = torch.randn(4, 6)
    assert twin.again is twin.first
    assert len(list(twin.parameters())) == len(list(model.parameters()))
    assert torch.equal(twin(x), model(x))


def test_a_swapped_layer_at_two_paths_stays_one_in_a_blueprint():
    model = swapped_twice()
    same_and_shared(conform(Twice(), *blueprint(model)).eval(), model)


@pytest.mark.parametrize("bare", [False, True])
def test_a_swapped_layer_at_two_paths_stays_one_in_a_file(tmp_path, bare):
    model = swapped_twice()
    save(model, tmp_path / "model.fw", bare=bare)
    same_and_shared(load(tmp_path / "model.fw", into=Twice()).eval(), model)


def test_files_that_describe_a_shared_layer_twice_are_still_read():
    model = swapped_twice()
    plan = structure(model)
    assert plan["swaps"]["again"] == {"same": "first"}
    plan["swaps"]["again"] = copy.deepcopy(plan["swaps"]["first"])
    assert type(restructure(Twice(), plan, {}).again) is nn.Sequential


@pytest.mark.parametrize("other", ["head", "again", ["first"]])
def test_a_layer_that_is_one_that_is_not_described_is_refused(other):
    plan = structure(swapped_twice())
    plan["swaps"]["again"] = {"same": other}
    with pytest.raises(FormatError, match="which it does not describe"):
        restructure(Twice(), plan, {})


def test_swapped_layers_with_tied_weights_stay_tied():
    def fresh() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    model = fresh()
    for path in ("0", "1"):
        swap(model, path, nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    twin = conform(fresh(), *blueprint(model))
    assert twin[1].weight is twin[0].weight
    assert torch.equal(twin[0].weight, model[0].weight)


def test_a_layer_twice_in_a_swapped_sequence_is_described_twice():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3))
    swap(model, "0", nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared))
    twin = conform(nn.Sequential(nn.Linear(3, 3)), *blueprint(model))
    assert len(twin[0]) == 4


# --- which layers are chosen ------------------------------------------------------------------------------------------


def test_weights_that_something_else_computes_are_not_chosen():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with recording() as ledger:
        assert list(targets(model)) == ["1"]
    assert "remove_parametrizations" in ledger.skipped["0"]
    with pytest.raises(BadOption, match="carries torch's own parametrization"):
        targets(model, "0")


def test_masked_layers_are_chosen():
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model[0], Mask(torch.rand(4, 4) > 0.5))
    assert list(targets(model)) == ["0"]
    assert not altered(model[0])


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Padded(nn.Conv2d):
    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(x + 1, weight, bias)


class Named(nn.Conv2d):
    pass


def test_layers_that_compute_something_else_are_told():
    assert "forward of its own" in altered(Standardised(3, 4, 3))
    assert "_conv_forward of its own" in altered(Padded(3, 4, 3))
    assert "is none of" in altered(nn.ReLU())
    changed = nn.Linear(2, 2)
    changed.forward = lambda x: x
    assert "computes something else than Linear" in altered(changed)
    for plain in (Named(3, 4, 3), nn.Linear(2, 2), nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(3)):
        assert altered(plain) == ""


class Biasless(nn.Conv2d):
    """Never reads its bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight)


class NormAct(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize("conv", [Biasless, Standardised, Padded, nn.Conv2d])
@pytest.mark.parametrize("norm", [NormAct, nn.BatchNorm2d])
def test_folding_never_changes_what_a_model_computes(conv, norm):
    model = nn.Sequential(conv(3, 4, 3), norm(4)).eval()
    nn.init.uniform_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    torch.testing.assert_close(fold_batchnorm(model, x)(x), expected)
    plain = conv is nn.Conv2d and norm is nn.BatchNorm2d
    assert isinstance(model[1], nn.Identity) == plain
