"""What is said of a model before any work is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.core.examine import examine
from featherweight.core.wired import Wired

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 5 * grads[0]


class Odd(nn.Module):
    """Everything at once: an own gradient, a branch on data, integers, extra state, a buffer outside the state dict."""

    def __init__(self, *, branch: bool = False, own: bool = False) -> None:
        super().__init__()
        self.line = nn.Linear(6, 4)
        self.branch, self.own = branch, own

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and x.sum() > 1e9:
            return x
        return self.line(Double.apply(x) if self.own else x)


def test_an_ordinary_model_has_no_remarks() -> None:
    assert examine(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), X) == []


def test_hooks_are_told_by_name() -> None:
    model = Odd()
    model.line.register_forward_hook(lambda module, args, output: output + 1)
    (remark,) = examine(model, X)
    assert remark.startswith("hooks at line:")
    # and what is told is true: the file without the class computes what the hook does
    assert torch.allclose(fw.wire(model, X)(X), model(X))


def test_buffers_outside_the_state_dict_are_told_by_name() -> None:
    model = Odd()
    model.register_buffer("table", torch.ones(3), persistent=False)
    (remark,) = examine(model, X)
    assert "table" in remark
    assert "not in the state dict" in remark


def test_parameters_that_are_no_floats_are_told_by_name() -> None:
    model = Odd()
    model.line.register_parameter("order", nn.Parameter(torch.arange(3), requires_grad=False))
    (remark,) = examine(model, X)
    assert "line.order" in remark


def test_own_gradients_are_told_by_name_and_the_trace_differentiates_the_forward_pass() -> None:
    model = Odd(own=True)
    (remark,) = examine(model, X)
    assert "Double" in remark
    grads = []
    for net in (model, fw.wire(model, X)):
        x = X.clone().requires_grad_()
        net(x).sum().backward()
        grads.append(x.grad)
    assert torch.allclose(grads[0], 2.5 * grads[1])
    assert torch.autograd.Function.apply.__qualname__.startswith("Function")  # put back


def test_a_branch_on_data_is_told_before_anything_is_written(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = Odd(branch=True)
    (remark,) = examine(model, X)
    assert remark.startswith("no channels")
    batches = [(X, torch.tensor([0, 1, 2, 3]))]
    task = fw.Task(valid=batches, train=batches)
    result = fw.compress(model, task, "kmeans_share", weight_bits=2, epochs=0, out=tmp_path / "run", show=True)
    told = capsys.readouterr().err
    assert told.index("no channels") < told.index("kmeans_share")
    assert result.report["remarks"] == [remark]
    assert not result.report["file"]["class_free"]


class Fixed(nn.Module):
    """A network whose code holds a width that no attribute says: its class cannot follow a removal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(6, 16, 1), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x[:, :, None])).relu()
        return self.last(x.view(-1, 16))


def test_channels_go_without_the_class_where_its_code_would_not_follow(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Fixed().eval()
    batches = [(X, torch.tensor([0, 1, 2, 3]))]
    task = fw.Task(valid=batches, train=batches)
    options = {"prune_ratio": 0.5, "epochs": 1, "finetune": 1, "round_to": 1}
    with pytest.raises(fw.FeatherweightError, match="none of 0 channels"):
        fw.compress(model, task, "network_slimming", **options)
    result = fw.compress(model, task, "network_slimming", without_class=True, out=tmp_path / "run", **options)
    assert isinstance(result.model, Wired)
    assert result.model.get_submodule("first").out_channels == 8
    assert result.report["file"] == {"class_free": True, "largest_difference": 0.0}
    assert torch.equal(fw.load(tmp_path / "run" / "model.fw")(X), result.model(X))
    assert model.first.out_channels == 16
