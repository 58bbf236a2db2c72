"""Gupta et al. 2016: pairs carry what one modality's network knows to another's; shuffled pairs carry nothing."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, MissingNeed, UnknownName
from featherweight.ingredients.match.feature_distance import feature_distance
from matches import rotation, taps, watched
from scenes import Named, classifier, digits, edges, looks_at


def test_formula_by_hand():
    ours, theirs = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert float(feature_distance(taps(ours), taps(theirs), None, 0.0)) == (4 + 9) / 4
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    pooled = torch.tensor([[2.5, 4.5], [10.5, 12.5]]).view(1, 1, 2, 2)
    assert float(feature_distance(taps(maps, ours), taps(pooled + 3, theirs), None, 0.0)) == 9 + (4 + 9) / 4
    assert float(feature_distance(taps(maps), taps(maps), None, 0.0)) == 0


def plain_sgd(params, lr):
    return torch.optim.SGD(params, lr=lr)


def linear():
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def paired_task(a, b, y, **options):
    data = Named(size=64, image=a, depth=b, labels=y)
    return Task(train=data, valid=data, split=looks_at("depth"), teacher_split=looks_at("image"), **options)


def test_an_invertible_map_between_modalities_is_undone_and_shuffled_pairs_are_not():
    a, y = torch.randn(64, 6), torch.arange(64) % 3
    b = a @ (rotation(6, torch.float32) * torch.tensor([0.6, 0.7, 0.8, 0.9, 1.0, 1.1]))
    teacher, left = linear().eval(), []
    for pairs in (b, b[torch.randperm(64)]):
        task = paired_task(a, pairs, y, teacher=teacher)
        student = entry("cross_modal_transfer")(
            linear(), task, guided="0", hint="0", transfer_epochs=50, transfer_lr=1.5, epochs=0, optimizer=plain_sgd
        )
        with torch.no_grad():
            left.append(float((student[0](pairs) - teacher[0](a)).square().mean() / teacher[0](a).var()))
    assert left[0] < 1e-3
    assert left[1] > 0.5


def test_the_teachers_classifier_stands_on_features_learned_from_pairs_alone():
    x, y = digits()
    teacher = fit(classifier(), Task(train=Batches(x[:400], y[:400]), valid=Batches(x[:1], y[:1])), epochs=6, lr=0.01)
    start, found = classifier(), {}
    start[-1] = copy.deepcopy(teacher[-1])
    for name, order in {"pairs": torch.arange(400), "shuffled pairs": torch.randperm(400)}.items():
        task = Task(
            train=Named(depth=edges(x[:400]), image=x[order]),  # no labels
            valid=Named(size=320, depth=edges(x[400:]), labels=y[400:]),
            teacher=teacher,
            split=looks_at("depth"),
            teacher_split=looks_at("image"),
        )
        student = entry("cross_modal_transfer")(
            copy.deepcopy(start), task, transfer_epochs=15, transfer_lr=0.01, epochs=0
        )
        found[name] = evaluate(student, task).value
    assert found["pairs"] > found["shuffled pairs"] + 0.2


def test_stage_1_trains_up_to_the_guided_layer_without_labels_and_stage_2_everything():
    steps, x = [], digits()[0][:32]
    batch = {"image": x, "depth": edges(x)}
    task = Task(
        train=[{**batch, "labels": torch.arange(32) % 4}],
        calibration=[batch],
        valid=[batch],
        teacher=classifier(width=12).eval(),
        split=looks_at("depth"),
        teacher_split=looks_at("image"),
        fit=watched(steps),
    )
    student = entry("cross_modal_transfer")(classifier(), task)
    (step, params), (plain, everything) = steps
    assert plain is None
    assert {id(p) for p in everything} == {id(p) for p in student.parameters()}
    assert {id(p) for p in params[:-1]} == {id(p) for p in student[:4].parameters()}
    assert params[-1].shape == (24, 16, 1, 1)  # t
    loss = step(student, batch, 0.0)
    with torch.no_grad():
        guess = nn.functional.conv2d(student[:4](batch["depth"]), params[-1])
        wanted = (guess - task.teacher[:4](x)).square().mean()
    torch.testing.assert_close(sum(loss.values()).detach(), wanted)


def test_teacher_stays_as_it_was():
    teacher = small_cnn().train()
    held = copy.deepcopy(teacher.state_dict())
    entry("cross_modal_transfer")(small_cnn(), small_task(teacher=teacher), transfer_epochs=1, epochs=1)
    assert all(torch.equal(held[k], v) for k, v in teacher.state_dict().items())
    assert teacher.training


def test_bad_input():
    task = small_task(teacher=small_cnn())
    with pytest.raises(UnknownName, match="layer of the teacher '33'"):
        entry("cross_modal_transfer")(small_cnn(), task, hint="33")
    with pytest.raises(BadOption, match="both maps, or both vectors"):
        entry("cross_modal_transfer")(small_cnn(), task, hint="5", guided="7")
    steps = []
    unlabelled = replace(task, train=[(torch.randn(8, 1, 8, 8),)], fit=watched(steps))
    with pytest.raises(MissingNeed, match="labels"):
        entry("cross_modal_transfer")(small_cnn(), unlabelled, transfer_epochs=1)
    assert not steps, "found before stage 1"
    entry("cross_modal_transfer")(small_cnn(), unlabelled, transfer_epochs=1, epochs=0)
    assert len(steps) == 2, "without stage 2 no label is needed"
