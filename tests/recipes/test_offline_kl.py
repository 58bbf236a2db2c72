"""The thesis's divergence: distillation at temperature 1 with equal weights."""

import copy

import torch
import torch.nn.functional as F

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from matches import watched


def test_loss_is_the_labels_and_the_divergence_from_the_teacher():
    steps = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(steps))
    student = entry("offline_kl")(small_mlp(), task)
    x, y = next(iter(task.train))
    p, q = task.teacher(x).softmax(1), student(x).softmax(1)
    wanted = F.cross_entropy(student(x), y) + (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(sum(steps[0][0](student, (x, y), 0.0).values()), wanted, rtol=1e-4, atol=1e-6)


def test_it_is_kd_at_temperature_1():
    task, start = small_task(teacher=small_cnn()), small_mlp()
    sgd = {"optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr), "epochs": 1}
    offline = entry("offline_kl")(copy.deepcopy(start), task, lr=0.05, **sgd)
    half = entry("kd")(copy.deepcopy(start), task, temperature=1.0, alpha=0.5, lr=0.1, **sgd)
    for a, b in zip(offline.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
