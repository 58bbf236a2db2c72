"""Statistics of batch norms that are taken again: never from nothing."""

import pytest
import torch
from torch import Tensor, nn

from conftest import small_cnn, small_task
from featherweight.core.norms import settle_norms
from featherweight.core.task import Task
from featherweight.errors import BadData


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def test_empty_calibration_is_refused_and_the_statistics_stay() -> None:
    model, task = small_cnn(), small_task()
    model.train()(torch.randn(16, 1, 8, 8) + 3)
    before = statistics(model.eval())
    with pytest.raises(BadData, match="calibration data are empty"):
        settle_norms(model, Task(valid=task.valid, calibration=[]))
    assert all(map(torch.equal, before, statistics(model)))
    assert not any(module.training for module in model.modules())


class Idle(nn.Module):
    """A network with a norm that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused = small_cnn(), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_a_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    model, task = Idle().eval(), small_task()
    model.unused.running_mean.fill_(7.0)
    before = model.body[1].running_mean.clone()
    settle_norms(model, task)
    assert torch.equal(model.unused.running_mean, torch.full((4,), 7.0))
    assert not torch.equal(model.body[1].running_mean, before)
