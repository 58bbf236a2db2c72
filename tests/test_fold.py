import copy

import pytest
import torch
from torch import Tensor, nn

from featherweight import zoo
from featherweight.core.blueprint import blueprint, conform
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import Affine, Codes, Mask, Product, Table, attach, codes_of, declare_codes, mask_of
from featherweight.core.ledger import recording


def shaken(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and affine parameters that are not those of a fresh network."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())


def same_after_folding(model: nn.Module, x: Tensor) -> nn.Module:
    folded = fold_batchnorm(copy.deepcopy(model), x)
    with torch.no_grad():
        wanted, got = model(x), folded(x)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5
    return folded


@pytest.mark.parametrize("name", ["resnet:depth=8,width=0.5", "vgg:width=0.25", "mobilenet_v1", "mobilenet_v2"])
def test_networks_keep_their_outputs_and_lose_all_norms(name: str) -> None:
    model = shaken(zoo.build(name))
    folded = same_after_folding(model, torch.randn(2, 1, 28, 28))
    assert norms(model) > 0
    assert norms(folded) == 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 8, 3, bias=False),
        nn.Conv2d(4, 8, 3, groups=4, stride=2, padding=2, dilation=2),
        nn.ConvTranspose2d(4, 8, 3),
        nn.ConvTranspose2d(4, 8, 3, groups=2, bias=False),
    ],
    ids=["plain", "grouped", "transposed", "transposed_grouped"],
)
@pytest.mark.parametrize("affine", [True, False])
def test_layers(layer: nn.Module, affine: bool) -> None:
    model = shaken(nn.Sequential(copy.deepcopy(layer), nn.BatchNorm2d(8, affine=affine)))
    assert norms(same_after_folding(model, torch.randn(2, 4, 9, 9))) == 0


def test_linear_layers() -> None:
    model = shaken(nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    assert norms(same_after_folding(model, torch.randn(4, 5))) == 0


class Read(nn.Module):
    """Whatever must not be folded: read twice, used twice, shared weights, behind an addition, no statistics."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3, track_running_stats=kind != "batch")
        if kind == "tied":
            self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.kind == "read twice":
            return self.norm(y) + y
        if self.kind == "used twice":
            return self.norm(self.conv(y))
        if self.kind == "norm twice":
            return self.norm(self.other(self.norm(y)))
        if self.kind == "added":
            return self.norm(y + x)
        return self.other(self.norm(y))


@pytest.mark.parametrize("kind", ["read twice", "used twice", "norm twice", "added", "tied", "batch"])
def test_what_cannot_be_folded_stays_and_is_said(kind: str) -> None:
    model = Read(kind)
    if kind != "batch":
        shaken(model)
    x = torch.randn(2, 3, 4, 4)
    with recording() as ledger:
        folded = same_after_folding(model.eval(), x)
    assert norms(folded) == 1
    assert ledger.skipped["norm"].startswith("batch norm stays: ")


def test_a_norm_over_another_dimension_stays() -> None:
    model = shaken(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(4)))
    assert norms(same_after_folding(model, torch.randn(2, 4, 6))) == 1


def test_zeros_stay_zeros() -> None:
    model = shaken(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)))
    attach(model[0], Mask(torch.rand(6, 3, 3, 3) > 0.7))
    zeros = model[0].weight == 0
    folded = same_after_folding(model, torch.randn(2, 3, 5, 5))
    weight = folded.get_submodule("0").weight
    assert isinstance(weight, Tensor)
    assert torch.equal(weight == 0, zeros)
    keep = mask_of(folded.get_submodule("0"))
    assert keep is not None
    assert torch.equal(keep, ~zeros)


def test_a_fresh_model_is_made_the_same() -> None:
    model = shaken(zoo.build("resnet:depth=8,width=0.5"))
    x = torch.randn(2, 1, 28, 28)
    fold_batchnorm(model, x)
    again = conform(zoo.build("resnet:depth=8,width=0.5"), *blueprint(model)).eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_the_model_trains_on() -> None:
    model = fold_batchnorm(shaken(zoo.build("vgg:width=0.25")), torch.randn(2, 1, 28, 28)).train()
    model(torch.randn(2, 1, 28, 28)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


RULES = {
    "per tensor": Affine(torch.tensor(0.25), torch.tensor(0)),
    "per channel": Affine(torch.arange(1, 9) / 8, torch.arange(8) % 3, 0),
    "per block": Affine(torch.arange(1, 17) / 8, torch.tensor(1), block=18),
    "levels around zero": Affine(torch.tensor(0.5), torch.tensor(1.5)),
    "a table": Table(torch.tensor([-1.0, 0.0, 0.5, 3.0])),
    "a table per channel": Table(torch.randn(8, 4), 0),
}


@pytest.mark.parametrize("name", RULES)
def test_codes_are_scaled_with_the_weight_and_stay_integers(name: str) -> None:
    rule = RULES[name]
    model = shaken(nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)))
    model[1].weight.data[:3] = torch.tensor([-1.0, 0.0, 2.0])  # one channel turns its sign, one is gone
    codes = Codes(torch.randint(0, 4, (8, 4, 3, 3)), rule, (8, 4, 3, 3))
    model[0].weight.data.copy_(codes.decode())
    declare_codes(model[0], "weight", codes)
    folded = same_after_folding(model, torch.randn(2, 4, 5, 5))
    found = codes_of(folded[0])
    assert found is not None
    assert type(found.rule) is type(rule)
    assert torch.equal(found.decode(), folded[0].weight)
    assert len(found.symbols[0].unique()) <= 4
    if isinstance(found.rule, Affine) and name != "levels around zero":
        assert (found.rule.scale > 0).all()
        assert torch.equal(found.symbols[3:], codes.symbols[3:]) or bool((model[1].weight[3:] < 0).any())


def test_a_norm_behind_vectors_stays() -> None:
    model = shaken(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    codes = Codes(torch.randint(0, 2, (4, 3)), Product(torch.randn(3, 2, 2)), (4, 6))
    model[0].weight.data.copy_(codes.decode())
    declare_codes(model[0], "weight", codes)
    with recording() as ledger:
        fold_batchnorm(model, torch.randn(2, 6))
    assert norms(model) == 1
    assert "no scale or table of its own" in ledger.skipped["1"]
