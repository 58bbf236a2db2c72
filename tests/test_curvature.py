"""Derivatives by single weights: against autograd sample by sample, finite differences and closed forms."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import Batches, blobs, small_cnn, small_task
from featherweight.core import curvature
from featherweight.core.curvature import fisher_diagonal, ggn_diagonal, mean_gradients, output_sensitivity
from featherweight.core.forms import Mask, attach
from featherweight.core.ledger import recording
from featherweight.core.site import sites
from featherweight.core.task import Task
from featherweight.errors import BadData, BadOption


class Shared(nn.Module):
    """One layer used twice, one weight in two layers, inputs of several rows a sample, an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b, self.c = nn.Linear(6, 3), nn.Linear(6, 3)
        self.c.weight = self.b.weight

    def forward(self, x):
        rows = self.a(self.a(x.reshape(-1, 6)).relu_())
        return (self.b(rows) + self.c(rows.tanh())).view(len(x), 4, 3).sum(1)


class Convolved(nn.Module):
    """Grouped, strided, circularly padded, transposed and one-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1, groups=2, padding_mode="circular")
        self.b = nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False)
        self.c = nn.Conv1d(3, 3, 5, stride=2)

    def forward(self, x):
        return self.c(self.b(F.relu(self.a(x))).flatten(2)).mean(2)


class Attending(nn.Module):
    """torch's attention, which uses the weight of its last layer without a call; a layer called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out, self.unused = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        return self.out(input=self.attention(x, x, x)[0].mean(1))


def by_sample(model, task, of, value):
    """The mean over samples of `of(gradient of value(sample))`, straight from autograd."""
    model = copy.deepcopy(model).eval()
    total = {path: torch.zeros(site.weight.shape, dtype=torch.float64) for path, site in sites(model).items()}
    count = 0
    for x, y in task.calibrating():
        for i in range(len(x)):
            for term in value(model(x[i : i + 1]), y[i : i + 1]):
                weights = [site.module.weight for site in sites(model).values()]
                grads = torch.autograd.grad(term, weights, retain_graph=True, materialize_grads=True)
                for path, grad in zip(total, grads, strict=True):
                    total[path] += of(grad.double())
            count += 1
    return {path: one / count for path, one in total.items()}


def task_for(shape, classes=3, n=10, **options):
    x, y = blobs(shape, classes, n)
    return Task(train=Batches(x, y, 4), valid=Batches(x, y, 4), **options)


CASES = [(small_cnn(3), (1, 8, 8)), (Shared(), (4, 6)), (Convolved(), (2, 4, 4)), (Attending(), (5, 4))]


@pytest.mark.parametrize(("model", "shape"), CASES, ids=lambda v: type(v).__name__)
def test_second_moments_are_those_of_single_samples(model, shape, monkeypatch):
    monkeypatch.setattr(curvature, "CHUNK", 200)  # a few samples at a time, and a rest
    task = task_for(shape)
    found, batches = sites(model), list(task.train)
    expected = by_sample(model, task, torch.square, lambda out, y: [F.cross_entropy(out, y)])
    for path, one in fisher_diagonal(model, task, found, batches).items():
        torch.testing.assert_close(one, expected[path], rtol=1e-4, atol=1e-9)

    def classes(out, y):  # the Fisher matrix of cross-entropy: the expectation over the network's own predictions
        p = out.softmax(1).detach()
        return [p[0, k].sqrt() * -out.log_softmax(1)[0, k] for k in range(3)]

    expected = by_sample(model, task, torch.square, classes)
    for path, one in ggn_diagonal(model, task, found, batches).items():
        torch.testing.assert_close(one, expected[path], rtol=1e-4, atol=1e-8)
    expected = by_sample(model, task, torch.abs, lambda out, y: [out.square().sum()])
    for path, one in output_sensitivity(model, task, found, batches).items():
        torch.testing.assert_close(one, expected[path], rtol=1e-4, atol=1e-7)


def test_classes_that_are_drawn_have_the_right_mean():
    model, task = small_cnn(3), task_for((1, 8, 8), n=6)
    found, batches = sites(model), list(task.train)
    exact = ggn_diagonal(model, task, found, batches)
    drawn = ggn_diagonal(model, task, found, batches, draws=150)
    for path in found:
        assert abs(float(drawn[path].sum() / exact[path].sum()) - 1) < 0.15
    with pytest.raises(BadOption, match="cross-entropy"):
        ggn_diagonal(model, task_for((1, 8, 8), loss=F.mse_loss), found, batches, draws=1)


@pytest.mark.parametrize("training", [False, True])
def test_mean_gradients_are_finite_differences(training):
    model, task = small_cnn().double(), small_task()
    batches = [(x.double(), y) for x, y in list(task.train)[:2]]
    before = copy.deepcopy(model.state_dict())
    found = sites(model)
    grads = mean_gradients(model, task, found, batches, training=training)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def loss():
        model.train(training)
        with torch.no_grad():
            return sum(len(x) * task.loss(model(x), y) for x, y in batches) / sum(len(x) for x, _ in batches)

    for path, site in found.items():
        flat, at = site.module.weight.data.view(-1), int(torch.randint(site.weight.numel(), ()))
        flat[at] += 1e-7
        up = loss()
        flat[at] -= 2e-7
        slope = (up - loss()) / 2e-7
        flat[at] += 1e-7
        assert float(slope) == pytest.approx(float(grads[path].view(-1)[at]), rel=1e-4, abs=1e-9)


def test_squared_error_has_the_curvature_of_its_quadratic():
    x, w = torch.randn(40, 5), torch.randn(1, 5)
    task = Task(train=Batches(x, x @ w.T, 16), valid=Batches(x, x @ w.T), loss=F.mse_loss)
    model = nn.Sequential(nn.Linear(5, 1, bias=False))
    found = ggn_diagonal(model, task, sites(model), list(task.train))["0"]
    torch.testing.assert_close(found, (2 * x.double().square().mean(0)).view(1, 5), rtol=1e-5, atol=1e-7)


def test_derivatives_are_by_the_weight_that_the_layer_sees():
    model, task = small_cnn(), small_task()
    keep = torch.rand(16, 8, 3, 3) > 0.5
    attach(model[3], Mask(keep))
    grads = mean_gradients(model, task, sites(model), list(task.train))["3"]
    assert grads[~keep].abs().sum() > 0
    assert fisher_diagonal(model, task, sites(model), list(task.train))["3"][~keep].sum() > 0


def test_bad_data():
    model, task = small_cnn(), small_task()
    found = sites(model)
    for derivatives in (mean_gradients, fisher_diagonal, ggn_diagonal):
        with pytest.raises(BadData, match="no batch"):
            derivatives(model, task, found, [])
        with pytest.raises(BadData, match="not finite"):
            derivatives(model, task, found, [(torch.full((2, 1, 8, 8), torch.nan), torch.zeros(2, dtype=torch.long))])


def test_where_a_sample_has_many_outputs_classes_are_drawn_or_it_is_refused():
    wide, batches = nn.Sequential(nn.Linear(4, 600)), [(torch.randn(2, 4), torch.tensor([0, 1]))]
    with recording() as ledger:
        drawn = ggn_diagonal(wide, small_task(), sites(wide), batches)["0"]
    assert ledger.notes == ["curvature is an estimate, from a class drawn for each sample: it has 600 outputs"]
    assert int((drawn.sum(1) > 1e-4).sum()) == 2, "the class that was drawn for each of two samples"
    squares = small_task(loss=lambda output, target: output.square().mean())
    with pytest.raises(BadOption, match="magnitude_iterative"):
        ggn_diagonal(wide, squares, sites(wide), batches)
