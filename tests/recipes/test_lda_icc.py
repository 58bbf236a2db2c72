"""Tian et al. 2017: units that tell classes apart stay, and of the layers before what these look at; backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import Batches, small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.task import Task, evaluate
from featherweight.errors import MissingNeed
from featherweight.ingredients.score.discrimination import (
    arriving,
    discrimination,
    intraclass_correlation,
    within_class_correlation,
)

lda = entry("lda_icc")
NOW = {"epochs": 0, "finetune": 0, "round_to": 1}


def test_known_discriminative_units_are_found():
    labels = torch.arange(600) % 3
    values = torch.randn(600, 40)
    planted = torch.tensor([3, 11, 17, 30])
    values[:, planted] += 2.0 * torch.nn.functional.one_hot(labels, 3).float()[:, [0, 1, 2, 0]]
    found = intraclass_correlation(values, labels)
    assert set(found.topk(4).indices.tolist()) == set(planted.tolist())
    assert found[planted].min() > 0.3
    assert found.min() >= 0
    assert found.max() <= 1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_two_classes_have_the_two_class_formula(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(50, 2, generator=generator).double() + torch.arange(50)[:, None] % 2
    a, b = values[::2], values[1::2]
    between = ((a.mean(0) - b.mean(0)) / 2) ** 2  # of two means of equal weight
    within = (a.var(0, unbiased=False) + b.var(0, unbiased=False)) / 2
    torch.testing.assert_close(intraclass_correlation(values, torch.arange(50) % 2), between / (between + within))


def test_equal_class_means_are_nothing_and_correlation_within_classes_is_told():
    values = torch.tensor([[0.0, 1], [2, 0], [2, 1], [0, 0]])
    assert intraclass_correlation(values, torch.tensor([0, 0, 1, 1])).tolist() == [0, 0]
    spread = torch.randn(100, 1)
    assert within_class_correlation(torch.cat([spread, -spread + 5, torch.randn(100, 1)], 1),
                                    torch.arange(100) % 2) == pytest.approx(1, abs=1e-5)  # fmt: skip


def traced_network():
    """The first unit of the last convolution tells the classes apart, and looks at map 2 of the first only."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight.fill_(0.1)
        model[3].weight.fill_(0.0)
        model[3].weight[0, 2] = 1.0
        model[3].weight[0, 1] = -0.5  # what inhibits it is not what it fires for
        model[3].weight[1, 0] = 1.0
        model[3].weight[2, 3] = 1.0
    return model


def test_what_arrives_is_what_the_kept_units_fire_for():
    x = torch.rand(64, 1, 8, 8)
    y = torch.arange(64) % 2
    model = traced_network()
    with torch.no_grad():
        model[3].weight[1:] = 0  # only the first is left
    arrived = arriving(Study(model, Task(valid=Batches(x, y), train=Batches(x, y)), ["0", "3"], 2))
    assert list(arrived) == ["0"]
    assert (arrived["0"] > 0).tolist() == [False, False, True, False]


def test_the_deconvolution_by_hand():
    """A unit fires at one place: its value goes back through its filter and is rectified, open or shut the ReLU."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 3, bias=False), nn.ReLU(),
                          nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2, 2))  # fmt: skip
    x, y = torch.randn(1, 1, 3, 3), torch.zeros(1).long()  # the last map has a single position
    fires = model[:4](x).detach()
    back = nn.functional.conv_transpose2d(
        fires, model[2].weight.detach()
    ).relu()  # at places where the ReLU was shut too
    arrived = arriving(Study(model, Task(valid=[(x, y)], train=[(x, y)]), ["0"], 1))["0"]
    torch.testing.assert_close(arrived, back.sum((0, 2, 3)).double())
    assert fires.any()


def test_the_last_convolution_goes_first_then_what_it_does_not_look_at():
    model, x = traced_network(), torch.rand(64, 1, 8, 8)
    y = torch.arange(64) % 2
    x[y == 1] += 1.0  # all maps see it, the weights say who passes it on
    with torch.no_grad():
        model[0].weight[0] = -0.1  # unit 1 of the last never fires; unit 2 fires as noise
        model[3].weight[0, 1] = 0.0
        model[3].weight[2, 3] = 0.001
        model[3].weight[2, 3, 0, 0] = 0.0
    widths = []

    def watched(model, task, **options):
        widths.append((model[0].out_channels, model[3].out_channels))
        return model

    task = Task(valid=Batches(x, y), train=Batches(x, y), fit=watched)
    lda(model, task, prune_ratio={"3": 0.34, "0": 0.5}, epochs=2, finetune=0, round_to=1)
    assert widths == [(4, 2), (2, 2)], "backward"
    assert model[3].weight.detach().abs().sum((2, 3)).count_nonzero() == 2, "units 0 and 2 with the maps they look at"


def test_icc_ranks_the_last_convolution_of_a_trained_network_and_it_recovers():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2)
    study = Study(model, task, ["3"], 3)
    scores = discrimination(Site("3", model[3], study=study))
    fires = model.eval()[:6](task.train.x).detach().amax((2, 3))
    torch.testing.assert_close(scores, intraclass_correlation(fires, task.train.y))
    before = evaluate(model, task).value
    with recording() as ledger:
        lda(model, task, prune_ratio=0.5, epochs=2, finetune=8, lr=1e-2, optimizer="adam", round_to=1)
    assert (model[0].out_channels, model[3].out_channels) == (4, 8)
    assert evaluate(model, task).value >= before - 0.1
    assert not any("layer pattern" in text for text in ledger.notes)


def test_labels_are_needed():
    x = torch.randn(32, 1, 8, 8)
    with pytest.raises(MissingNeed, match="needs labels"):
        lda(small_cnn(), Task(valid=[x], train=[x]), **NOW)
