"""Cross-layer sharing: one tensor for all blocks, stored once, its gradient the sum over its uses."""

import copy

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import Residual, small_mlp, small_stack, small_task
from featherweight.catalogue import entry
from featherweight.core.cost import cost
from featherweight.core.ledger import recording
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.albert_share import stacks
from featherweight.zoo.networks import build
from independent_reader import read


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_blocks_are_one_after_it_and_the_file_holds_them_once(tmp_path):
    model, task = small_stack(), small_task()
    result = fw.compress(model, task, "albert_share", epochs=1, out=tmp_path, measure=False)
    found = result.model
    for name, _ in found[2][0].named_parameters():
        assert len({block.get_parameter(name).data_ptr() for block in found[2]}) == 1
    told, _ = read((tmp_path / "model.fw").read_bytes())
    assert len(told["ties"]) == 3 * 6
    assert not any(name.startswith(("2.1.", "2.2.", "2.3.")) for name in told["names"])
    x = next(iter(task.valid))[0]
    for loaded in (fw.load(tmp_path / "model.fw"), fw.load(tmp_path / "model.fw", into=small_stack())):
        assert torch.equal(loaded.eval()(x), found(x))
        assert len(names(loaded)) == len(names(found)) == 4 + 6
    assert cost(found, x).macs == cost(model, x).macs
    assert (tmp_path / "model.onnx").stat().st_size < 4 * sum(p.numel() for p in model.parameters())


def test_the_gradient_is_the_sum_over_the_uses():
    torch.manual_seed(0)
    apart, task = small_stack(), small_task()
    with torch.no_grad():
        for block in apart[2][1:]:
            block.load_state_dict(apart[2][0].state_dict())
    tied = entry("albert_share")(copy.deepcopy(apart), task, epochs=0)
    x, y = next(iter(task.train))
    for model in (apart, tied):
        task.loss(model(x), y).backward()
    for name, p in tied[2][0].named_parameters():
        wanted = torch.stack([block.get_parameter(name).grad for block in apart[2]]).sum(0)
        torch.testing.assert_close(p.grad, wanted)


@pytest.mark.parametrize("start", ["mean", "first"])
def test_a_shared_weight_starts_where_it_should(start):
    model = small_stack()
    weights = [block.down.weight.detach().clone() for block in model[2]]
    entry("albert_share")(model, small_task(), start=start, epochs=0)
    wanted = torch.stack(weights).mean(0) if start == "mean" else weights[0]
    assert torch.equal(model[2][3].down.weight, wanted)


@pytest.mark.parametrize(("groups", "distinct"), [(1, 1), (2, 2), (3, 3)])
def test_groups_have_weights_of_their_own(groups, distinct):
    model = small_stack()
    entry("albert_share")(model, small_task(), groups=groups, epochs=0)
    owners = [block.down.weight.data_ptr() for block in model[2]]
    assert len(set(owners)) == distinct
    assert owners == sorted(owners, key=owners.index)  # blocks of a group stand together


def test_attention_alone_or_all_else():
    model = build("vit", dim=16, depth=3, heads=2)
    before = {name: p.numel() for name, p in model.named_parameters()}
    found = {}
    for share in ("attention", "ffn", "all"):
        tied = entry("albert_share")(copy.deepcopy(model), _images(), share=share, epochs=0)
        found[share] = set(before) - set(names(tied))
    assert found["attention"]
    assert all("attention" in name for name in found["attention"])
    assert not any("attention" in name for name in found["ffn"])
    assert found["attention"] | found["ffn"] == found["all"]


def _images():
    return small_task((1, 28, 28), classes=10)


def test_what_is_not_alike_stays():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Flatten(), nn.Linear(512, 4),
    )  # fmt: skip
    assert stacks(model) == {"": ["3", "6"]}
    entry("albert_share")(model, small_task(), epochs=0)
    assert model[3].weight is model[6].weight
    assert model[3].weight is not model[7].weight
    assert model[1].weight is not model[4].weight


def test_statistics_of_norms_stay_those_of_each_use():
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU())

    model = nn.Sequential(block(), block(), nn.Flatten(), nn.Linear(64, 4))
    model(torch.randn(4, 1, 8, 8))
    entry("albert_share")(model, small_task(), epochs=0)
    assert model[0][1].weight is model[1][1].weight
    assert not torch.equal(model[0][1].running_mean, model[1][1].running_mean)


def test_inner_stacks_of_blocks_that_are_shared_stay_apart():
    inner = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), *inner, nn.Linear(8, 4))
    entry("albert_share")(model, small_task(), epochs=0)
    assert model[2][0].weight is model[3][0].weight
    assert model[2][0].weight is not model[2][2].weight


class Tied(nn.Module):
    """A block that uses one weight twice, in its attention and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.ffn = nn.Linear(8, 8), nn.Linear(8, 8)
        self.ffn.weight = self.attention.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(torch.relu(self.attention(x)))


@pytest.mark.parametrize("share", ["all", "attention"])
def test_a_tie_inside_a_block_stays_and_is_counted_once(share):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sequential(Tied(), Tied(), Tied()), nn.Linear(8, 4))
    mean = torch.stack([block.ffn.weight for block in model[2]]).mean(0).detach()
    before = sum(p.numel() for p in model.parameters())
    with recording() as ledger:
        entry("albert_share")(model, small_task(), epochs=0, share=share)
    saved = before - sum(p.numel() for p in model.parameters())
    assert saved == 2 * (64 + 8 * (1 + (share == "all")))
    assert any(f"{saved:,} parameters less" in one for one in ledger.notes)
    for block in model[2]:
        assert block.ffn.weight is block.attention.weight is model[2][0].attention.weight
    torch.testing.assert_close(model[2][1].ffn.weight.detach(), mean)
    with pytest.raises(CompressionError, match="with weights of their own"):
        entry("albert_share")(model, small_task(), epochs=0, share=share)


def test_blocks_of_other_ties_are_not_alike():
    loose = Tied()
    loose.ffn.weight = nn.Parameter(torch.zeros(8, 8))
    assert stacks(nn.Sequential(Tied(), loose, Tied())) == {"": ["0", "2"]}


def test_a_trained_stack_recovers():
    model, task = small_stack(), small_task()
    fw.fit(model, task, epochs=6, lr=1e-2)
    result = fw.compress(model, task, "albert_share", epochs=6, lr=1e-2, onnx=False, measure=False)
    assert result.report["result"]["metric"] > 0.9


def test_refusals_name_a_cure():
    with pytest.raises(CompressionError, match="choose another method"):
        entry("albert_share")(small_mlp(), small_task())
    with pytest.raises(BadOption, match=r'of the part .attention.: pass share="all"'):
        entry("albert_share")(small_stack(), small_task(), share="attention")
    assert isinstance(small_stack()[2][0], Residual)
