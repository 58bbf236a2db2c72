"""Gates stand where they cut a channel off, whatever couples it; what is left without them computes the same."""

import copy

import pytest
import torch
from torch import nn

from featherweight.core.channels import Channels
from featherweight.core.forms import bake
from featherweight.core.gates import gated, gates_of, remove_closed
from featherweight.core.ledger import recording
from featherweight.core.noise import linear_sites
from featherweight.core.task import Task
from featherweight.errors import BadOption, CompressionError

X = torch.randn(3, 1, 8, 8)


def conv(a, b, **options):
    return nn.Conv2d(a, b, 3, padding=1, **options)


class Flattened(nn.Module):
    """LeNet-5 in small: a channel is four inputs of the linear layer behind it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc1, self.fc2 = (
            nn.Conv2d(1, 5, 3),
            nn.Conv2d(5, 6, 3),
            nn.Linear(24, 7),
            nn.Linear(7, 4),
        )

    def forward(self, x):
        x = self.conv2(nn.functional.max_pool2d(self.conv1(x), 2).sigmoid())
        return self.fc2(self.fc1(nn.functional.adaptive_max_pool2d(x, 2).flatten(1)).relu())


class Mixed(nn.Module):
    """Residual sums, concatenation, depthwise, grouped and transposed convolutions, a norm of every kind of channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = conv(1, 8), nn.BatchNorm2d(8)
        self.inner, self.back = conv(8, 6), conv(6, 8)
        self.depth, self.point = conv(8, 8, groups=8), nn.Conv2d(8, 8, 1)
        self.group, self.up = conv(16, 12, groups=2), nn.ConvTranspose2d(12, 5, 2, stride=2)
        self.last = nn.Linear(5, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).sigmoid()
        x = x + self.back(self.inner(x).relu())
        y = torch.cat([x, self.point(self.depth(x))], 1)
        return self.last(self.up(self.group(y).relu()).mean((2, 3)))


class Tokens(nn.Module):
    """Attention, whose projections work without calls, and a layer norm, behind which every channel depends on all."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.embed(x.squeeze(1))
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


def built(kind):
    torch.manual_seed(1)
    model = {"flattened": Flattened, "mixed": Mixed, "tokens": Tokens}[kind]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias)
    return model


def placed(model):
    found = linear_sites(model, Task(valid=[X]))
    return gates_of(model, X, {path: site.module for path, site in found.items()})


@pytest.mark.parametrize("kind", ["flattened", "mixed", "tokens"])
@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_what_is_left_without_closed_gates_computes_the_same(kind, share):
    model = built(kind)
    gates, before = placed(model), sum(p.numel() for p in model.parameters())
    values, score = torch.rand(gates.count) + 0.5, torch.rand(gates.count)
    closed = score < share
    if kind == "mixed":  # where halves must lose equally many, others open again: leave those alone here
        closed[torch.isin(gates.numbers, torch.cat([v for family in gates.channels.equal for v in family]))] = False
    with gated(model, gates, lambda n, training: torch.where(closed, 0.0, values)[None], {}), torch.no_grad():
        wanted = model(X)
    with recording() as ledger:
        remove_closed(model, gates, values, closed, score)
    assert not any("one of" in text for text in ledger.notes), "every layer reads something, as drawn"
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in bake(model).parameters()) < before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_gates_of_a_flattened_network_are_those_of_the_paper():
    """Maps of convolutions, and besides every input of a linear layer (Louizos et al.: 20-25-45-462 has 45 of 800)."""
    gates = placed(built("flattened"))
    assert len(gates.numbers) == 5 + 6 + 7
    assert gates.count == 5 + 6 + 7 + 24
    assert {p: len(v) for p, v in gates.reads.items()} == {"conv2": 1, "fc1": 2, "fc2": 1}
    sizes = gates.total({h.path: torch.ones_like(built("flattened").get_submodule(h.path).weight) for h in gates.held})
    assert sorted(sizes.tolist()) == sorted([9.0] * 5 + [45.0] * 6 + [4.0] * 7 + [7.0] * 24)


def test_what_a_gate_cannot_cut_off_has_none_and_that_is_said():
    with recording() as ledger:
        gates = placed(built("tokens"))
    rows = {path: [int((v >= 0).sum()) for v in vectors] for path, vectors in gates.reads.items()}
    assert rows == {"embed": [8], "up": [12], "down": [20], "head": [12]}
    assert len(gates.numbers) == 20, "only the hidden layer's channels can go"
    assert all(path in ledger.skipped for path in ("embed", "down", "attention.out_proj"))
    with recording() as ledger:
        linear_sites(built("tokens"), Task(valid=[X]))
    assert "without a call" in ledger.skipped["attention.out_proj"]


def test_coupled_channels_share_a_gate_and_layers_that_are_not_chosen_keep_theirs():
    model = built("mixed")
    gates = placed(model)
    (stem,) = gates.reads["inner"]
    assert torch.equal(gates.reads["group"][0][:8], stem)
    assert "depth" not in gates.reads
    layers = {path: getattr(model, path) for path in ("back", "last")}
    with recording() as ledger:
        some = gates_of(model, X, layers)
    assert some.reads.keys() == {"back", "last"}
    assert len(some.numbers) == 6 + 5
    assert "something other than the chosen layers" in ledger.skipped["stem"]


def test_a_pass_draws_once_for_all_that_read_a_channel():
    model, seen = built("mixed"), []
    gates = placed(model)

    def draw(samples, training):
        seen.append((samples, training))
        return torch.rand(samples, gates.count)

    with gated(model, gates, draw, {"p": nn.Parameter(torch.zeros(2))}):
        assert "fw_gate_p" in dict(model.named_parameters())
        twin = copy.deepcopy(model)
        model.train()(X)
        model.eval()(X)
        assert not torch.equal(twin(X), twin(X))
    assert seen[:2] == [(3, True), (3, False)]
    assert "fw_gate_p" not in dict(model.named_parameters())
    assert torch.equal(model(X), model(X))


def test_channels_that_must_stay_open_again_and_no_layer_is_emptied():
    model = built("mixed")
    gates = placed(model)
    score = torch.arange(float(gates.count))
    with recording() as ledger:
        kept = remove_closed(
            copy.deepcopy(model), gates, torch.ones(gates.count), torch.ones(gates.count).bool(), score
        )
    assert kept.last.in_features == 1
    assert any("all inputs were closed" in text for text in ledger.notes)
    closed = torch.zeros(gates.count).bool()
    closed[gates.reads["last"][0][:3]] = True
    none = remove_closed(copy.deepcopy(model), gates, torch.ones(gates.count), closed, score, choose=lambda c, d: d[:0])
    torch.testing.assert_close(none(X), model(X))
    some = remove_closed(copy.deepcopy(model), gates, torch.ones(gates.count), closed, score, choose=lambda c, d: d[:1])
    assert some.up.out_channels == 4
    with pytest.raises(CompressionError, match="no gate"):
        remove_closed(model, gates, torch.ones(gates.count), torch.zeros(gates.count).bool(), score)
    assert Channels.legal is remove_closed.__kwdefaults__["choose"]


def test_a_network_without_anything_to_gate_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 3))
    with pytest.raises(BadOption, match="magnitude_iterative"):
        placed(model)
