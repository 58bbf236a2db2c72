"""Huang and Wang 2018: factors reach exact zeros, the lasso's on a quadratic; what is zero goes without a trace."""

import copy

import pytest
import torch
from sklearn.linear_model import Lasso
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import bake
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.sss import Gates, accelerated
from featherweight.zoo import build

sss = entry("sss")


@pytest.mark.parametrize("penalty", [0.01, 0.1, 0.5])
def test_on_a_quadratic_it_converges_to_the_lasso_that_is_not_negative(penalty):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    true = torch.tensor([1.5, 0, 0.7, -1.0, 0, 0.3, 0, -0.4, 0.05, 2.0, 0, 0], dtype=torch.float64)
    y = x @ true + 0.1 * torch.randn(200, generator=generator, dtype=torch.float64)
    s, velocity = torch.ones(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    for _ in range(3000):
        s, velocity = accelerated(s, velocity, x.T @ (x @ s - y) / 200, rate=0.05, penalty=penalty, momentum=0.9)
    best = Lasso(alpha=penalty, positive=True, fit_intercept=False, tol=1e-12, max_iter=100000).fit(x, y)
    torch.testing.assert_close(s, torch.from_numpy(best.coef_), rtol=0, atol=1e-6)
    assert (s[true < 0] == 0).all()


def test_the_step_is_the_papers():
    s, velocity = torch.tensor([1.0, 0.02, 0.5]), torch.tensor([0.1, 0.0, -0.4])
    gradient = torch.tensor([1.0, 0.0, -2.0])
    new, speed = accelerated(s, velocity, gradient, rate=0.1, penalty=0.5, momentum=0.5)
    z = torch.tensor([0.85, 0.0, 0.65])  # of 0.9, 0.02 and 0.7, less 0.05
    torch.testing.assert_close(speed, z - s + 0.5 * velocity)
    torch.testing.assert_close(new, (z + 0.5 * speed).clamp_min(0))
    assert new[1] == 0


@pytest.mark.parametrize("structures", ["both", "channels", "blocks"])
def test_factors_scale_what_structures_put_out_and_fold_exactly(structures):
    torch.manual_seed(0)
    model, task = build("resnet:depth=8,channels=(4,4,4)", classes=4), small_task()
    fit(model, task, epochs=1)
    gates = Gates.of(model, task, structures)
    assert len(gates.blocks) == (0 if structures == "channels" else 3)
    scaled = copy.deepcopy(model).eval()
    gates.attach(model)
    with torch.no_grad():
        gates.factors[gates.used] = 0.5
    tied = 0.5 if structures != "blocks" else 1.0  # the factors of the stem's channels, which the first block shares
    block = scaled.stages[0][0]
    branch, whole = [], []
    block.bn2.register_forward_hook(lambda m, a, o: branch.append(o))
    model.eval().stages[0][0].bn2.register_forward_hook(lambda m, a, o: whole.append(o))
    x = task.valid.x
    inner = 0.5 if structures != "blocks" else 1.0
    with torch.no_grad():
        gated = model(x)
        stem = scaled.bn1(scaled.conv1(x)).relu() * tied
        hidden = block.bn1(block.conv1(stem)).relu() * inner
        expected = block.bn2(block.conv2(hidden)) * tied * (0.5 if structures != "channels" else 1.0)
    torch.testing.assert_close(whole[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bake(model)(x), gated, rtol=1e-5, atol=1e-6)


def test_exact_zeros_appear_and_the_network_stays_what_it_was():
    task, model = small_task(), fit(small_cnn(), small_task(), epochs=6, lr=0.01)
    outputs = []

    def watched(model, task, **options):
        fit(model, task, **options)
        if options["label"] == "structure selection":
            outputs.append(copy.deepcopy(bake(copy.deepcopy(model))).eval()(task.valid.x))
        return model

    with recording() as ledger:
        sss(model, small_task(fit=watched), penalty=0.1, epochs=20, round_to=1)
    assert int(next(text for text in ledger.notes if "factors are zero" in text).split(" ")[0]) >= 6
    assert sum(p.numel() for p in model.parameters()) < 600
    torch.testing.assert_close(model.eval()(task.valid.x), outputs[0], rtol=1e-4, atol=1e-5)
    assert evaluate(model, task).value > 0.9


def test_blocks_are_removed_and_the_network_stays_what_it_was():
    torch.manual_seed(0)
    task = small_task()
    model = fit(build("resnet:depth=14,channels=(4,8,8)", classes=4), task, epochs=6, lr=0.01)
    layers = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    with recording() as ledger:
        sss(model, task, penalty=0.1, structures="blocks", epochs=20)
    gone = next(text for text in ledger.notes if "residual branches removed" in text)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) <= layers - 2 * int(gone.split(" ")[0])
    assert int(gone.split(" ")[0]) >= 1
    assert evaluate(model, task).value > 0.9


def test_channels_of_a_depthwise_layer_have_one_factor():
    first, last = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(96, 4))
    model = nn.Sequential(*first, nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU(), *last)
    gates = Gates.of(model, small_task(), "channels")
    assert gates.places.keys() == {("0", "weight"), ("0", "bias")}


def test_one_channel_of_a_layer_stays():
    model = small_mlp()
    sss(model, small_task(loss=lambda output, target: 0 * output.sum()), penalty=10.0, epochs=2, round_to=1)
    assert model[1].out_features == 1


def test_bad_options():
    with pytest.raises(BadOption, match="no residual blocks"):
        sss(small_cnn(), small_task(), structures="blocks")
    with pytest.raises(CompressionError, match="raise the penalty"):
        sss(small_cnn(), small_task(), penalty=0.0, epochs=1)
