"""The thesis as a whole: a narrow student under three teachers, of whom nothing stays in it."""

import copy

from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.ensemble import Ensemble
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate


def test_three_teachers_and_a_narrow_student():
    task = small_task()
    teachers = Ensemble([fit(small_cnn(), task, epochs=6, lr=0.01) for _ in range(3)])
    student = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    count = sum(p.numel() for p in student.parameters())
    alone = fit(copy.deepcopy(student), task, epochs=3, lr=0.01)
    with recording() as ledger:
        taught = entry("chou_full")(
            student, small_task(teacher=teachers), feature_epochs=3, feature_lr=0.01, epochs=3, lr=0.01
        )
    assert sum(p.numel() for p in taught.parameters()) == count
    assert any("adapters have 160 parameters, in training only" in text for text in ledger.notes)  # 4x8 + 4x8 + 6x16
    assert evaluate(taught, task).value >= evaluate(alone, task).value
