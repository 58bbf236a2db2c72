"""Chen et al. 2016: networks that grow keep their function; what is copied, what is shared out, and what grows on."""

import copy

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, bake
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.core.widening import again, spread, widen_channels
from featherweight.errors import BadData, BadOption, CompressionError
from featherweight.recipes.net2net import draw


class Residual(nn.Module):
    """Residual sums, a depthwise and a grouped convolution, a concatenation, rectifiers as functions, a flat map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.bn_a = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.bn_b = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.last, self.head = nn.Conv2d(20, 4, 3, stride=2, padding=1), nn.Linear(64, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = (x + self.bn_b(self.b(self.bn_a(self.a(x)).relu()))).relu()
        y = self.grouped(self.deep(x).relu()).relu()
        return self.head(self.last(torch.cat([x, y], 1)).relu().flatten(1))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.two(self.norm(self.one(x.flatten(1)))).relu())


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    return fit(Residual(), small_task(), epochs=1, lr=0.01).eval()


def grown(model, task=None, **options):
    """The grown network, and by how much its outputs moved, relative to the largest."""
    task = task or small_task()
    x = task.inputs()[0]
    with torch.no_grad():
        before = model.eval()(*x)
        new = entry("net2net")(copy.deepcopy(model), task, epochs=0, **{"noise": 0.0, **options}).eval()
        return new, float((new(*x) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize(
    ("make", "options"),
    [("residual", {}), ("cnn", {"width": 3, "depth": 0}), ("cnn", {"width": 1, "depth": 2}), ("mlp", {})],
    ids=str,
)
def test_function_is_kept_at_step_0(make, options, residual, trained):
    model = {"residual": residual, "cnn": trained[0], "mlp": small_mlp()}[make]
    new, moved = grown(model, **options)
    assert moved < 1e-5
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, new))
    assert after > 1.2 * before


def test_in_double_precision_nothing_moves_but_rounding(trained):
    x, y = torch.randn(8, 1, 8, 8).double(), torch.arange(8) % 4
    task = Task(train=Batches(x, y), valid=Batches(x, y))
    assert grown(copy.deepcopy(trained[0]).double(), task)[1] < 1e-13


def test_every_width_is_what_was_asked(residual):
    new, moved = grown(residual, width=1.5, depth=0)
    assert moved < 1e-5
    widths = {name: len(m.weight) for name, m in new.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert widths == {"stem": 12, "a": 9, "b": 12, "deep": 12, "grouped": 18, "last": 6, "head": 4}
    assert new.deep.groups == 12
    assert new.grouped.groups == 2
    assert new.head.in_features == 96


def test_layers_are_copied_and_the_next_shares_out():
    """`U_i = W_i[g]` and `U_{i+1} = W_{i+1}[:, g] / |{k: g(k) = g(j)}|`, written out entry by entry."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).eval()
    fit(model, Task(train=Batches(x := torch.randn(16, 1, 4, 4), y := torch.arange(16) % 4), valid=Batches(x, y)),
        epochs=1)  # fmt: skip
    new, copies = copy.deepcopy(model), torch.tensor([1, 3, 2])
    channels = channel_groups(new, x)
    assert channels.outputs["0"].tolist() == [0, 1, 2]
    assert widen_channels(new, copies, channels) == ""
    g = [0, 1, 1, 1, 2, 2]
    for j, i in enumerate(g):
        assert torch.equal(new[0].weight[j], model[0].weight[i])
        assert torch.equal(new[0].bias[j], model[0].bias[i])
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(new[1], key)[j], getattr(model[1], key)[i])
        for place in range(4):  # the flattened 2 x 2 map of a channel
            assert torch.equal(new[4].weight[:, 4 * j + place], model[4].weight[:, 4 * i + place] / g.count(i))
    assert torch.equal(new[4].bias, model[4].bias)


def test_copies_of_a_map_stand_as_a_whole():
    ids = torch.tensor([0, 0, 1, 1, -1, -1])
    assert spread(ids, torch.tensor([2, 1])).tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert spread(torch.tensor([0, 1, 0, 1]), torch.tensor([1, 2])).tolist() == [0, 1, 1, 2, 3, 3]
    assert again(ids, torch.tensor([2, 1])).tolist() == [False, False, True, True, False, False, False, False]


def test_inserted_layers_are_identities_with_norms_that_undo_themselves(trained):
    model, task = trained
    new, _ = grown(model, task, width=1, kernel=5)
    host, rectifier, layer, norm = new[1]
    assert isinstance(host, nn.BatchNorm2d)
    assert isinstance(rectifier, nn.ReLU)
    assert torch.equal(layer.weight, nn.init.dirac_(torch.empty(8, 8, 5, 5)))
    assert layer.bias is None
    assert torch.equal(norm.bias, norm.running_mean)
    assert torch.equal(norm.weight, (norm.running_var + norm.eps).sqrt())
    x = torch.cat([a for a, _ in task.train])
    with torch.no_grad():
        seen = host.eval()(model[0](x)).relu()
    assert torch.allclose(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, seen.var((0, 2, 3), correction=0), atol=1e-4)


def test_originals_of_copies_are_drawn_at_random_with_replacement():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    channels = channel_groups(model, torch.zeros(2, 8))
    more = torch.stack([draw(channels, channels.outputs["0"], 1.5)[channels.outputs["0"]] - 1 for _ in range(100)])
    assert more.sum(1).eq(32).all()
    assert int(more.max()) > 1
    assert 20 < int(more.sum(0).min()) <= int(more.sum(0).max()) < 85, "50 each, plus or minus five deviations"


def test_only_chosen_layers_grow(trained):
    new, _ = grown(trained[0], where="3")
    layers = {name: len(m.weight) for name, m in new.named_modules() if isinstance(m, nn.Conv2d)}
    assert layers == {"0": 8, "3": 24, "4.2": 24}


def test_layers_that_no_rectifier_follows_are_named(trained):
    with recording() as ledger:
        grown(trained[0])
    assert "no identity layers behind 8: no rectifier alone reads what they put out" in ledger.notes


def test_noise_moves_copies_alone_and_training_tells_them_apart():
    task, model = small_task(), small_mlp()
    still, _ = grown(model, width=2, depth=0, noise=0.0)
    torch.manual_seed(0)
    noisy, moved = grown(model, width=2, depth=0, noise=0.01)
    assert 1e-5 < moved < 0.05
    rows = noisy[1].weight
    originals = [any(torch.equal(row, old) for old in model[1].weight) for row in rows]
    assert sum(originals) == 32
    assert len(rows) == 64
    gap = torch.stack([(model[1].weight - row).norm(dim=1).min() for row in rows]).detach()
    rms = float(gap[gap > 0].square().mean().sqrt()) / 8  # of 64 weights each
    assert rms == pytest.approx(0.01 * float(model[1].weight.detach().std()), rel=0.1)
    for net, alike in ((still, True), (noisy, False)):
        learned = fit(copy.deepcopy(net), task, epochs=3, lr=0.01)[1].weight
        assert (len(learned.unique(dim=0)) < 64) == alike


def test_larger_network_starts_where_the_smaller_ended():
    task = small_task()
    small = fit(small_cnn(), task, epochs=8, lr=0.01)
    start = evaluate(small, task).value
    new = entry("net2net")(copy.deepcopy(small), task, epochs=1)
    scratch = copy.deepcopy(new)
    for module in scratch.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    told = evaluate(new, task).value
    assert told >= start - 0.05
    assert told > evaluate(fit(scratch, task, epochs=1, lr=1e-4), task).value + 0.2


def test_masked_weights_stay_zero():
    model = small_mlp()
    attach(model[1], Mask(torch.rand(32, 64) > 0.5), root=model)
    new = bake(entry("net2net")(model, small_task(), width=2, depth=0, epochs=1))
    assert float((new[1].weight == 0).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_units_under_a_layer_norm_stay_and_that_is_no_error():
    new, moved = grown(Normed().eval(), depth=0)
    assert moved < 1e-5
    assert (new.one.out_features, new.two.out_features) == (8, 18)


def test_bad_input():
    task = small_task()
    with pytest.raises(BadOption, match="raise one of them"):
        entry("net2net")(small_mlp(), task, width=1, depth=0)
    with pytest.raises(BadOption, match="odd number"):
        entry("net2net")(small_mlp(), task, kernel=2)
    quantized = entry("int8")(small_mlp(), task, calibration_batches=1)
    with pytest.raises(BadOption, match="grow it before"):
        entry("net2net")(quantized, task)
    with pytest.raises(CompressionError, match="choose another method"):
        entry("net2net")(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), task)
    empty = Task(train=[], valid=task.valid)
    with pytest.raises(BadData, match="no data reach"):
        entry("net2net")(small_cnn(), empty, epochs=0)
