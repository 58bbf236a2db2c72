"""A teacher beside any training: terms by hand, the last call of the network, and a teacher that stays as it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import small_mlp, small_task
from featherweight.core.ledger import recording
from featherweight.core.task import Task
from featherweight.core.taught import taught, under_teacher
from featherweight.errors import MissingNeed

T = 4.0  # the temperature of `softened`


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """`t^2 KL(teacher || student)`, sample by sample."""
    q, log_p = (teacher / T).softmax(1), (student / T).log_softmax(1)
    return T**2 * (q * (q.log() - log_p)).sum(1).mean()


def with_dropout() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4))


def test_loss_and_divergence_have_their_shares() -> None:
    task = small_task(teacher=with_dropout().train())
    model, (x, y) = small_mlp().eval(), next(iter(task.train))
    held, step = copy.deepcopy(task.teacher.state_dict()), taught(task, model, 0.25)
    assert step is not None
    terms = step(model, (x, y), 0.0)
    with torch.no_grad():
        shown, seen = task.teacher[2](x.flatten(1)), model(x)  # the teacher drops nothing
    torch.testing.assert_close(terms["labels"].detach(), 0.75 * F.cross_entropy(seen, y))
    torch.testing.assert_close(terms["teacher"].detach(), 0.25 * divergence(seen, shown))
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in task.teacher.parameters())
    assert all(torch.equal(held[key], value) for key, value in task.teacher.state_dict().items())
    assert task.teacher.training
    assert taught(task, model, 1.0)(model, (x, y), 0.0).keys() == {"teacher"}  # type: ignore[misc]
    assert taught(task, model, 0.0) is None


def kept_step(task: Task, model: nn.Module, **options: Any) -> Any:
    """The step that a training under the teacher would take, and the hook's network beside it."""
    steps = []

    def fit(model: nn.Module, task: Task, *, step: Any, **options: Any) -> nn.Module:
        steps.append((step, step(model, next(iter(task.train)), 0.0)))
        return model

    under_teacher(replace(task, fit=fit), 0.25).fit(model, task, epochs=1, **options)
    return steps[0]


def test_a_training_of_its_own_keeps_its_terms_and_gets_a_third() -> None:
    task = small_task(teacher=with_dropout().train())
    model, (x, _) = small_mlp().eval(), next(iter(task.train))

    def step(network: nn.Module, batch: Any, progress: float) -> dict[str, Tensor]:
        network(2 * batch[0])  # a first look, of which the teacher is not asked
        return {"a": network(batch[0]).square().mean(), "b": torch.ones((), requires_grad=True)}

    _, terms = kept_step(task, model, step=step)
    with torch.no_grad():
        shown, seen = task.teacher[2](x.flatten(1)), model(x)
    assert terms["b"].item() == 0.75
    torch.testing.assert_close(terms["a"].detach(), 0.75 * seen.square().mean())
    torch.testing.assert_close(terms["teacher"].detach(), 0.25 * divergence(seen, shown))
    sum(terms.values()).backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    assert task.teacher.training
    assert not model._forward_hooks
    plain = kept_step(task, model)[1]
    assert plain.keys() == {"loss", "teacher"}


def test_a_step_that_runs_no_whole_network_stays_as_it_is() -> None:
    task, model = small_task(teacher=small_mlp().eval()), small_mlp()
    with recording() as ledger:
        _, terms = kept_step(task, model, step=lambda n, b, p: {"part": n[1](b[0].flatten(1)).mean()})
    torch.testing.assert_close(terms["part"], model[1](next(iter(task.train))[0].flatten(1)).mean())
    assert terms.keys() == {"part"}
    assert ledger.notes == ["a training that does not run the network as a whole has no teacher"]
    with pytest.raises(MissingNeed, match="needs a teacher"):
        taught(small_task(), model, 0.5)
