"""The thesis's stages: features alone for the layers up to them, then outputs and labels from there."""

import copy

import torch

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from matches import watched


def test_stages_and_what_they_train():
    steps = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(steps))
    student = entry("chou_full")(small_cnn(), task)
    (features, trunk), (outputs, whole) = steps
    batch = next(iter(task.train))
    assert features(student, batch, 0.0).keys() == {"cross-layer"}
    assert outputs(student, batch, 0.0).keys() == {"labels", "kl"}
    assert {id(p) for p in trunk} == {id(p) for p in student[:6].parameters()}
    assert {id(p) for p in whole} == {id(p) for p in student.parameters()}


def test_joint_plan_has_everything_at_once():
    steps = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(steps))
    student = entry("chou_full")(small_cnn(), task, plan="joint")
    assert len(steps) == 1
    assert steps[0][0](student, next(iter(task.train)), 0.0).keys() == {"labels", "cross-layer", "kl"}


def test_stage_2_starts_where_stage_1_ended_with_an_optimizer_of_its_own():
    starts, optimizers = [], []

    def watching(model, task, **options):
        starts.append(copy.deepcopy(model.state_dict()))
        fit(model, task, **options)
        starts.append(copy.deepcopy(model.state_dict()))
        return model

    def adam(params, lr):
        optimizers.append(torch.optim.Adam(params, lr=lr))
        return optimizers[-1]

    task = small_task(teacher=small_cnn().eval(), fit=watching)
    entry("chou_full")(small_cnn(), task, feature_epochs=1, epochs=1, optimizer=adam)
    before, end_of_1, start_of_2, _ = starts
    assert all(torch.equal(end_of_1[k], v) for k, v in start_of_2.items())
    assert not torch.equal(before["0.weight"], end_of_1["0.weight"])
    assert torch.equal(before["8.weight"], end_of_1["8.weight"]), "stage 1 leaves the head alone"
    assert len(optimizers) == 2
