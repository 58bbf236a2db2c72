"""What passes over data show: activations behind norm and nonlinearity, per-sample gates, gradients of weights."""

import copy

import pytest
import torch
from torch import nn

from conftest import Batches, blobs, small_cnn, small_mlp, small_task
from featherweight.core.channels import channel_groups, remove_channels
from featherweight.core.forms import Mask, attach
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.task import Task
from featherweight.errors import BadData, MissingNeed
from featherweight.ingredients.score.entropy import entropy
from featherweight.ingredients.score.fisher import fisher
from featherweight.ingredients.score.taylor_activation import taylor_activation
from featherweight.ingredients.score.taylor_squared import taylor_squared
from featherweight.ingredients.score.zeros import zeros
from featherweight.prune import prune


def everything(activation):
    return activation


def test_activations_are_those_behind_norm_and_nonlinearity():
    model, task = small_cnn(), small_task()
    with torch.no_grad():
        model(task.train.x)  # statistics
    study = Study(model, task, ["0", "3", "8"], 3)
    seen = study.activations(everything)
    model.eval()
    torch.testing.assert_close(seen["0"], model[:3](task.train.x[:96]))
    torch.testing.assert_close(seen["3"], model[:6](task.train.x[:96]))
    torch.testing.assert_close(seen["8"], model(task.train.x[:96]))
    assert study.activations(everything) is seen, "one pass serves every layer"


def test_gates_are_per_sample_sums_of_activation_times_gradient():
    model, task = small_cnn(), small_task()
    gates = Study(model, task, ["0", "3"], 1).gates()
    model.eval()
    x, y = task.train.x[:32], task.train.y[:32]
    for n in (0, 7):
        a = model[:2](x[n : n + 1]).detach().requires_grad_(True)
        nn.functional.cross_entropy(model[2:](a), y[n : n + 1]).backward()
        torch.testing.assert_close(gates["0"][n], (a * a.grad).sum((0, 2, 3)).detach(), rtol=1e-4, atol=1e-6)


def test_gradients_are_means_over_batches_also_under_masks():
    model, task = small_mlp(), small_task()
    attach(model[1], Mask(torch.rand(32, 64) > 0.5))
    found = Study(model, task, ["1", "3"], 2).gradients()
    plain = copy.deepcopy(model)
    weight = plain[1].weight.detach()
    twin = small_mlp()
    twin.load_state_dict(
        {"1.weight": weight, "1.bias": plain[1].bias, "3.weight": plain[3].weight, "3.bias": plain[3].bias}
    )
    for x, y in list(task.train)[:2]:
        (nn.functional.cross_entropy(twin(x), y) / 2).backward()
    torch.testing.assert_close(found["1"], twin[1].weight.grad)


def test_inplace_nonlinearities_and_token_layers():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(2), nn.Linear(36, 5))
    x, _ = blobs((1, 8, 8))
    task = Task(
        train=Batches(x, torch.zeros(len(x), 4).long()), valid=Batches(x, x), loss=lambda o, t: o.square().mean()
    )
    study = Study(net, task, ["0", "4"], 1)
    assert (study.activations(everything)["0"] >= 0).all()
    assert study.activations(everything)["4"].shape == (32, 5, 4)  # channels second
    assert study.gates()["4"].shape == (32, 5)


def test_a_site_by_itself_has_no_data_and_no_data_is_said():
    with pytest.raises(MissingNeed, match="score it by prune"):
        _ = Site.of(torch.ones(2, 2)).data
    with pytest.raises(BadData, match="calibration data are empty"):
        Study(small_mlp(), Task(valid=[], train=[], example_inputs=torch.zeros(1, 64)), ["1"], 2).batches()


def test_batches_are_drawn_once_so_that_labels_and_activations_belong_together():
    class Shuffled(Batches):
        def __iter__(self):
            order = torch.randperm(len(self.x))
            return zip(self.x[order].split(self.size), self.y[order].split(self.size), strict=True)

    x, y = blobs((1, 8, 8), noise=0.0)  # a label says what the image is
    task = Task(train=Shuffled(x, y), valid=Batches(x, y))
    study = Study(small_cnn(), task, ["0", "3"], 2)
    labels, seen = study.labels(), study.activations(everything)["3"]
    for label in range(4):
        mine = seen[labels == label]
        torch.testing.assert_close(mine, mine[:1].expand_as(mine))
    assert study.loss() == study.loss()


def test_a_gate_of_zero_is_the_removal_of_a_channel():
    model, task = small_cnn(), small_task()
    with torch.no_grad():
        model(task.train.x)
        model[1].bias.uniform_(-1, 1)
    study = Study(model, task, ["0"], 3)
    whole = study.loss()
    gates = torch.ones(8)
    gates[[1, 6]] = 0
    with study.gated({"0": gates}):
        gated = study.loss()
    assert study.loss() == whole != gated
    channels = channel_groups(model, task.inputs())
    remove_channels(model, channels.chosen({"0": [1, 6]}), channels=channels)
    assert Study(model, task, ["0"], 3).loss() == pytest.approx(gated, rel=1e-5)


def test_what_the_batches_lack_is_said():
    x = torch.randn(8, 64)
    study = Study(small_mlp(), Task(valid=[x], train=[x], loss=lambda o, t: o.sum() * torch.nan), ["1"], 2)
    with pytest.raises(MissingNeed, match="needs labels"):
        study.labels()
    with pytest.raises(BadData, match="loss of the calibration batches is nan"):
        study.loss()
    bare = Study(small_mlp(), Task(valid=[x], train=[x]), ["1"], 2)
    for asked in (bare.loss, bare.gates, bare.gradients):
        with pytest.raises(MissingNeed, match="loss needs labels"):
            asked()


def test_layers_are_known_in_the_order_of_their_calls():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(8, 2), nn.Linear(64, 8)

        def forward(self, x):
            return self.last(self.first(x.flatten(1)).relu())

    study = Study(Backwards(), small_task(), ["last"], 1)
    assert study.order() == ["first", "last"]
    value = torch.tensor([-1.0, 2.0])
    assert torch.equal(study.activated("first", value), value.relu())
    assert torch.equal(study.activated("last", value), value)


class Folded(nn.Module):
    """A layer on what samples hold: positions, windows of positions one after the other, or sequences first."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        if self.how == "windows":
            x = x.unflatten(1, (3, 2)).flatten(0, 1)
        elif self.how == "sequence first":
            x = x.transpose(0, 1)
        x = self.b(self.a(x).relu())
        if self.how == "windows":
            x = x.unflatten(0, (-1, 3)).flatten(1, 2)
        elif self.how == "sequence first":
            x = x.transpose(0, 1)
        return x.mean(1)


@pytest.mark.parametrize("how", ["windows", "sequence first"])
def test_a_sample_is_a_sample_however_layers_hold_its_positions(how):
    x, y = torch.randn(13, 6, 5), torch.randint(0, 3, (13,))
    data = [(x[:8], y[:8]), (x[8:], y[8:])]  # the last batch is smaller
    task, plain, model = Task(train=data, valid=data), Folded("positions"), Folded(how)
    model.load_state_dict(plain.state_dict())
    for score in (fisher, taylor_squared, taylor_activation, zeros, entropy):
        wanted, found = (score(Site("a", one.a, study=Study(one, task, ["a"], 2))) for one in (plain, model))
        torch.testing.assert_close(found, wanted, msg=lambda text, score=score: f"{score.__name__}: {text}")


def test_layers_that_no_forward_pass_shows_stay_and_that_is_said():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head, self.unused = nn.Linear(64, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.a(x.flatten(1)).relu())

    for score in (fisher, taylor_squared, taylor_activation, zeros, entropy):
        model = Aside()
        with recording() as ledger:
            prune(model, small_task(), score=score, grain="filter", prune_ratio=0.5, scope="layer", round_to=1,
                  rounds=1, epochs=0, finetune=0)  # fmt: skip
            assert score(Site("unused", model.unused, study=Study(model, small_task(), ["unused"], 1))).isinf().all()
        assert (model.a.out_features, model.unused.out_features) == (4, 4)
        assert "no forward pass shows" in ledger.skipped["unused"]
