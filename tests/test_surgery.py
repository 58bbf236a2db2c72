"""Which layers are chosen and which are refused; swapped layers come back as they were, shared ones shared."""

import copy

import pytest
import torch
from torch import nn

from featherweight.coding import load, save
from featherweight.core.blueprint import blueprint, conform, restructure, structure
from featherweight.core.surgery import swap
from featherweight.errors import FormatError


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
