"""Louizos et al. 2018: the price of an open gate is exact, gates close where they do not pay, what is closed goes."""

import copy
import math

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate, run
from featherweight.errors import BadOption, CompressionError, MissingNeed, UnknownName
from featherweight.recipes.l0_hard_concrete import LEAST, at_last, drawn, expected, open_probability

l0 = entry("l0_hard_concrete")
FAST = {"epochs": 8, "lr": 0.01, "gate_lr": 0.4, "penalty": 0.1, "round_to": 1}


def test_the_closed_forms_are_those_of_the_samples():
    log_alpha = torch.linspace(-4.6, 4.6, 24)
    z = drawn(log_alpha, torch.rand(200_000, 24))
    torch.testing.assert_close((z > 0).float().mean(0), open_probability(log_alpha), rtol=0, atol=0.005)
    torch.testing.assert_close(z.mean(0), expected(log_alpha), rtol=0, atol=0.005)
    assert ((z == 0).any(0) & (z == 1).any(0)).all(), "both ends are drawn exactly"
    assert float(open_probability(torch.tensor(LEAST))) == pytest.approx(0.047, abs=5e-4)
    assert float(at_last(torch.tensor(LEAST))) == 0
    assert float(at_last(torch.tensor(math.log(100)))) == 1


def peeked(seen, training=False):
    """A fit that looks at the gated network after its training, and at the penalty."""

    def watched(model, task, *, epochs, step=None, **options):
        if step is None:
            return model
        fit(model, task, epochs=epochs, step=step, **options)
        seen["model"] = copy.deepcopy(model).eval()
        seen["outputs"] = model.eval()(task.valid.x).detach()
        seen["log_alpha"] = model.get_parameter("fw_gate_log_alpha").detach().clone()
        seen["terms"] = step(model, next(iter(task.train)), 1.0)
        seen["loss"] = task.loss(*run(model, task, next(iter(task.train))))
        return model

    return watched


def test_the_penalty_counts_the_weights_that_are_left_and_decays_those_alone():
    seen = {}
    model = small_cnn()
    l0(model, small_task(fit=peeked(seen)), **FAST | {"penalty": {"0": 0.7, "3": 0.2, "8": 0.3}, "weight_decay": 0.01})
    likely, w = open_probability(seen["log_alpha"]), {i: seen["model"][i].weight.detach() for i in (0, 3, 8)}
    wanted = 0.0
    for gate in range(8):  # filters of the first convolution, then of the second with the column that reads them
        wanted += likely[gate] * (9 * 0.7 / 96 + 0.005 * w[0][gate].square().sum())
    for gate in range(16):
        wanted += likely[8 + gate] * (72 * 0.2 / 96 + 0.005 * w[3][gate].square().sum())
        wanted += likely[8 + gate] * (4 * 0.3 / 96 + 0.005 * w[8][:, gate].square().sum())
    torch.testing.assert_close(seen["terms"]["L0"].detach(), wanted)
    torch.testing.assert_close(seen["terms"]["loss"].detach(), seen["loss"].detach())


def test_without_a_price_it_has_no_gradient_and_nothing_closes():
    seen = {}
    with pytest.raises(CompressionError, match="no gate was closed"):
        l0(small_mlp(), small_task(fit=peeked(seen)), **FAST | {"penalty": 0.0, "weight_decay": 0.0, "gate_lr": 1e-3})
    assert seen["terms"]["L0"] == 0
    assert not any(
        g.any()
        for g in torch.autograd.grad(seen["terms"]["L0"], [*seen["model"].parameters()], allow_unused=True)
        if g is not None
    )


def test_a_high_price_closes_every_gate_and_no_layer_is_emptied():
    seen = {}
    model, task = small_mlp(), small_task(fit=peeked(seen), loss=lambda output, target: 0 * output.sum())
    with recording() as ledger:
        l0(model, task, **FAST | {"penalty": 1e3, "epochs": 10, "gate_lr": 2.0})
    assert torch.allclose(seen["log_alpha"], torch.tensor(LEAST))
    assert model[3].in_features == 1
    assert int((model[1].weight != 0).any(0).sum()) == 1
    assert sum("all inputs were closed" in text for text in ledger.notes) == 2


def planted(n=600, features=30, useful=4):
    x = torch.randn(2 * n, features)
    y = (x[:, :useful].sum(1) > 0).long()
    return Task(train=Batches(x[:n], y[:n], 50), valid=Batches(x[n:], y[n:], 300))


def test_finds_the_inputs_that_matter_and_shrinks_the_hidden_layer():
    task = planted()
    model = fit(nn.Sequential(nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 2)), task, epochs=5, lr=0.01)
    before = evaluate(model, task).value
    with recording() as ledger:
        l0(model, task, epochs=25, lr=0.01, gate_lr=0.1, penalty={"0": 0.3, "2": 3.0}, round_to=1)
    assert (model[0].weight != 0).any(0).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert model[0].out_features == model[2].in_features <= 16
    assert evaluate(model, task).value >= before
    assert any("26 of the 30 inputs that it keeps are masked" in text for text in ledger.notes)


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2 = nn.Linear(32, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.fc2(self.fc1(nn.functional.max_pool2d(self.conv2(self.conv1(x)), 2).flatten(1)).relu())


@pytest.mark.parametrize("draw", ["batch", "sample"])
def test_the_smaller_network_is_the_gated_one(draw):
    seen = {}
    model, task = Flattened(), small_task(fit=peeked(seen))
    l0(model, task, **FAST | {"draw": draw})
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in Flattened().parameters())
    torch.testing.assert_close(model.eval()(task.valid.x), seen["outputs"], rtol=1e-4, atol=1e-5)
    closed = at_last(seen["log_alpha"]) == 0
    assert closed.any()
    assert not closed.all()
    assert not [name for name, _ in model.named_parameters() if "gate" in name]


def test_kept_channels_are_rounded_up_by_the_likeliest():
    seen = {}
    widths = {}
    for round_to in (1, 4, 16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
        l0(model, small_task(fit=peeked(seen)), **FAST | {"round_to": round_to})
        widths[round_to] = model[1].out_features
        assert (model[3].weight != 0).any(0).all(), "what stays is open"
    assert widths[1] < 40
    assert widths[4] == -(-widths[1] // 4) * 4
    assert widths[16] == -(-widths[1] // 16) * 16 or widths[16] == 40


def test_masks_survive_and_norms_are_settled():
    model, task = small_cnn(), small_task()
    attach(model[3], Mask(torch.rand(16, 8, 3, 3) > 0.5))
    l0(model, task, **FAST)
    assert 0.3 < float((model[3].weight == 0).float().mean()) < 0.7
    assert mask_of(model[3]) is not None
    with torch.no_grad():
        first = torch.cat([model[0](x) for x, _ in task.train])
    torch.testing.assert_close(model[1].running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_bad_options():
    with pytest.raises(BadOption, match="penalty"):
        l0(small_mlp(), small_task(), penalty=-1.0)
    with pytest.raises(UnknownName, match="nosuch"):
        l0(small_mlp(), small_task(), penalty={"nosuch": 1.0})
    with pytest.raises(BadOption, match="where"):
        l0(small_mlp(), small_task(), penalty={"1": 1.0}, where="1")
    with pytest.raises(BadOption, match="magnitude_iterative"):
        l0(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), small_task(), **FAST)
    with pytest.raises(MissingNeed, match="train"):
        l0(small_mlp(), Task(valid=small_task().valid), **FAST)
