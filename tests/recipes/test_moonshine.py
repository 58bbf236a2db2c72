"""Crowley et al. 2018: the blocks' parameters and starts, and a student of cheap blocks that learns by attention."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import evaluate
from featherweight.errors import BadOption, CompressionError, MissingNeed, UnknownName
from featherweight.ingredients.block.moonshine_blocks import moonshine_blocks
from featherweight.recipes.moonshine import moonshine
from matches import watched


class Wide(nn.Module):
    """A wide residual network with a block at each of two sizes, rectifiers as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1, self.a = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2, self.b = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn3, self.c = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.short, self.head = nn.Conv2d(8, 16, 1, stride=2), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(self.bn2(self.a(self.bn1(x).relu())).relu())
        y = self.bn3(x).relu()
        return self.head((self.c(y) + self.short(y)).relu().mean((2, 3)))


def conv(inputs=8, outputs=16, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def weights(block):
    return sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("block", "count"),
    [
        ("G(N)", lambda c, k: c * 9 + c * k),
        ("G(4)", lambda c, k: c * c * 9 // 4 + c * k),
        ("B(2)", lambda c, k: c * k // 2 + (k // 2) ** 2 * 9 + k * k // 2),
        ("BG(2,4)", lambda c, k: c * k // 2 + (k // 2) ** 2 * 9 // 4 + k * k // 2),
        ("BG(4,2)", lambda c, k: c * k // 4 + (k // 4) ** 2 * 9 // 2 + k * k // 4),
        ("Conv2x2", lambda c, k: 4 * c * k),
    ],
)
def test_parameters_shapes_and_stride_are_those_of_the_table(block, count):
    x = torch.randn(2, 8, 8, 8)
    for layer in (conv(), conv(stride=2, bias=False)):
        new = moonshine_blocks(layer, block=block)
        assert weights(new) == count(8, 16)
        assert new(x).shape == layer(x).shape
        last = [m for m in new.modules() if isinstance(m, nn.Conv2d)][-1]
        assert (last.bias is None) == (layer.bias is None)
        inner = [type(m) for m in new.modules() if isinstance(m, (nn.BatchNorm2d, nn.ReLU))]
        parts = sum(isinstance(m, nn.Conv2d) for m in new.modules())
        assert inner == [nn.BatchNorm2d, nn.ReLU] * (parts - 1), "between the parts, and nothing behind the last"


@pytest.mark.parametrize(
    ("block", "layer"),
    [
        ("G(1)", conv(8, 8, stride=2)),
        ("G(2)", conv(8, 4)),  # 4 outputs need rank 4 = C / g
        ("B(1)", conv(6, 8)),
    ],
)
def test_wide_enough_linear_blocks_are_the_layer_itself(block, layer):
    x = torch.randn(2, layer.in_channels, 8, 8, dtype=torch.float64)
    layer = layer.double()
    new = moonshine_blocks(layer, block=block, between="linear")
    assert torch.allclose(new(x), layer(x), atol=1e-10)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in new.modules())


@pytest.mark.parametrize("layer", [conv(8, 12), conv(6, 8, 5)])
def test_depthwise_start_is_the_nearest_of_rank_one_a_channel(layer):
    """Eckart and Young: what is lost of each input channel is all but its largest singular value."""
    new = moonshine_blocks(layer, block="G(N)", between="linear")
    spatial, point = new[0].weight[:, 0], new[1].weight[:, :, 0, 0]
    made = torch.einsum("oc,chw->ochw", point, spatial)
    s = torch.linalg.svdvals(layer.weight.detach().transpose(0, 1).flatten(2))
    lost = (layer.weight - made).square().sum((0, 2, 3))
    assert torch.allclose(lost, s[:, 1:].square().sum(1), atol=1e-5)


def test_more_groups_and_thinner_bottlenecks_lose_more():
    layer = conv(8, 8)
    x = torch.randn(4, 8, 8, 8)

    def lost(block):
        return float((moonshine_blocks(layer, block=block, between="linear")(x) - layer(x)).detach().norm())

    assert lost("G(1)") < 1e-4 < lost("G(2)") < lost("G(4)") < lost("G(N)")
    assert lost("B(1)") < 1e-4 < lost("B(2)") < lost("B(4)")
    assert lost("B(2)") < lost("BG(2,2)")


def test_corners_stand_where_the_kernel_has_them():
    layer = conv(3, 5, stride=2)
    new = moonshine_blocks(layer, block="Conv2x2")
    cross = copy.deepcopy(layer)
    cross.weight.data[:, :, 1, :] = 0
    cross.weight.data[:, :, :, 1] = 0
    x = torch.randn(2, 3, 9, 9)
    assert torch.allclose(new(x), cross(x), atol=1e-6)


def test_what_cannot_become_a_block_says_why():
    assert "groups=8" in moonshine_blocks(conv(8, 8, groups=8))
    assert "no multiple" in moonshine_blocks(conv(8, 9), block="B(2)")
    assert "do not fall" in moonshine_blocks(conv(6, 6), block="G(4)")
    assert "3 x 3" in moonshine_blocks(conv(8, 8, 5), block="Conv2x2")
    assert "as it is" in moonshine_blocks(conv(), block="S")


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return fit(Wide(), small_task(), epochs=4, lr=0.01).eval()


@pytest.mark.parametrize("block", ["G(N)", "BG(2,2)"])
def test_student_has_the_teachers_taps_and_cheap_blocks(wide, block):
    seen = {}
    model = copy.deepcopy(wide)
    task = small_task(teacher=wide)
    held = copy.deepcopy(wide.state_dict())
    student = moonshine(model, task, block=block, epochs=1)
    assert isinstance(student.stem, nn.Conv2d)
    assert isinstance(student.short, nn.Conv2d), "1 x 1: no cheaper as a block"
    for name in ("a", "b", "c"):
        assert isinstance(student.get_submodule(name), nn.Sequential)
        for net in (student, wide):
            net.get_submodule(name).register_forward_hook(
                lambda m, a, y, key=(name, net is wide): seen.update({key: y.shape})
            )
    x = task.inputs()[0]
    assert student(*x).shape == wide(*x).shape
    assert all(seen[name, True] == seen[name, False] for name in ("a", "b", "c"))
    assert all(torch.equal(held[k], v) for k, v in wide.state_dict().items())
    assert all(p.grad is None for p in wide.parameters())


def test_weight_of_attention_is_shared_by_the_taps(wide, monkeypatch):
    told = {}

    def learn(model, task, terms, **options):
        told.update(terms)
        return model

    monkeypatch.setattr("featherweight.recipes.moonshine.learn", learn)
    moonshine(copy.deepcopy(wide), small_task(teacher=wide), beta=1000.0, soft=0.5)
    attention = told["attention"]
    assert [a == b for a, b in attention.pairs] == [True] * len(attention.pairs)
    assert len(attention.pairs) == 2, "maps of 8 x 8 and of 4 x 4"
    assert attention.weight == 3 * 1000 / 2
    assert told["softened"].weight == 0.5


def test_labels_attention_and_softened_probabilities_are_minimised(wide):
    steps = []
    task = small_task(teacher=wide, fit=watched(steps))
    student = moonshine(copy.deepcopy(wide), task, beta=10.0, soft=0.5, temperature=2.0).eval()
    x, y = next(iter(task.train))
    terms = steps[-1][0](student, (x, y), 0.0)
    assert terms.keys() == {"labels", "attention", "softened"}
    torch.testing.assert_close(terms["labels"], nn.functional.cross_entropy(student(x), y))
    p, q = (wide(x) / 2).softmax(1), (student(x) / 2).softmax(1)
    torch.testing.assert_close(terms["softened"], 0.5 * 4 * (p * (p / q).log()).sum(1).mean())


def test_start_from_the_teacher_is_ahead_of_a_random_one(wide):
    task = small_task(teacher=wide)

    def learned(start, between):
        torch.manual_seed(0)
        student = moonshine(copy.deepcopy(wide), task, block="G(N)", start=start, between=between, epochs=5, lr=3e-3)
        return evaluate(student, task).value, float(sum(task.loss(student(x), y).detach() for x, y in task.valid))

    for between in ("norm", "linear"):
        (ours, loss), (theirs, other) = learned("factors", between), learned("random", between)
        assert ours >= theirs + 0.05
        assert loss < other


def test_bad_input(wide):
    task = small_task(teacher=wide)
    with pytest.raises(BadOption, match="text such as"):
        entry("moonshine")(copy.deepcopy(wide), task, block="G8B2")
    with pytest.raises(BadOption, match="no Conv2d layer"):
        entry("moonshine")(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), task)
    with pytest.raises(CompressionError, match="choose another block"):
        entry("moonshine")(copy.deepcopy(wide), task, block="G(5)")
    with pytest.raises(BadOption, match="no maps whose attention"):
        entry("moonshine")(copy.deepcopy(wide), small_task(teacher=small_mlp()))
    with pytest.raises(MissingNeed, match="teacher"):
        entry("moonshine")(copy.deepcopy(wide), small_task())
    with pytest.raises(UnknownName, match="at which the teacher is tapped"):
        entry("moonshine")(small_cnn(), task)
