"""Distillation that cannot work says so in one sentence, before anything is trained."""

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.task import evaluate
from featherweight.distill import distill
from featherweight.errors import BadData, BadOption
from featherweight.ingredients.match.feature_distance import distance


class Spare(nn.Module):
    """One of its layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.head = nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.used(x.flatten(1)))


class Tokens(nn.Module):
    """An image as so many tokens of so many numbers."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.up, self.head = nn.Linear(64 // count, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x.view(len(x), self.count, -1)).mean(1))


def test_a_layer_that_is_never_called_is_named_with_those_that_are():
    task = small_task(teacher=Spare())
    for pair in (("spare", "used"), ("used", "spare")):
        with pytest.raises(BadOption, match=r"layer spare is there, but the network does not call it: .* such as used"):
            distill(Spare(), task, match="relations", pairs=[pair], epochs=1)


def test_shapes_that_no_adapter_joins():
    task = small_task(teacher=Tokens(8, 12))
    with pytest.raises(BadOption, match=r"layer up, \(32, 4, 8\), with the teacher's layer up, \(32, 8, 12\), and no"):
        distill(Tokens(4, 8), task, match="attention_maps", pairs=[("up", "up")], epochs=1)


def test_tokens_of_other_numbers_are_pooled():
    ours, theirs = torch.randn(3, 4, 6), torch.randn(3, 8, 6)
    pooled = theirs.view(3, 4, 2, 6).mean(2)
    torch.testing.assert_close(distance(ours, theirs), (ours - pooled).square().mean())
    task = small_task(teacher=Tokens(8, 12))
    distill(Tokens(4, 8), task, match="feature_distance", pairs=[("up", "up")], labels=1, weight=1, epochs=0.4)


def test_a_teacher_that_says_nothing_finite_is_told_from_a_loss_that_is_not():
    teacher, task = small_mlp(), small_task()
    with torch.no_grad():
        teacher[1].weight[0, 0] = torch.nan
    for match, what in (("softened", "the teacher puts out"), ("relations", "the teacher's layer 2 puts out")):
        student = small_mlp()
        held = copy.deepcopy(student.state_dict())
        with pytest.raises(BadData, match=f"{what} values that are not finite"):
            distill(student, small_task(teacher=teacher), match=match, epochs=1)
        assert all(torch.equal(held[k], v) for k, v in student.state_dict().items())
    assert evaluate(small_mlp(), task)


def test_a_teacher_that_cannot_read_the_batches():
    other = nn.Sequential(nn.Flatten(), nn.Linear(32, 4))
    with pytest.raises(BadData, match=r"the teacher fails on the student's batches \(mat1 .*teacher_split"):
        distill(small_mlp(), small_task(teacher=other), epochs=1)
    half = small_mlp().to(torch.bfloat16)
    with pytest.raises(BadData, match="the teacher fails on the student's batches"):
        distill(small_mlp(), small_task(teacher=half), epochs=1)


def test_a_teacher_without_weights():
    for method in ("kd", "born_again", "bert_to_bilstm", "sequence_kd"):
        with pytest.raises(BadOption, match="load them before it teaches"):
            entry(method)(small_mlp(), small_task(teacher=small_mlp().to("meta")))


def test_a_teacher_in_training_mode_teaches_as_it_will_be_used_and_stays_in_it():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    learned = []
    for training in (True, False):
        torch.manual_seed(0)
        told = copy.deepcopy(teacher).train(training)
        learned.append(distill(small_mlp(), small_task(teacher=told), epochs=1).state_dict())
        assert told.training is training
        assert torch.equal(told[2].running_mean, teacher[2].running_mean)
    assert all(torch.equal(learned[0][key], learned[1][key]) for key in learned[0])


def test_maps_against_vectors():
    with pytest.raises(BadOption, match="both maps, or both vectors"):
        distill(small_cnn(), small_task(teacher=small_mlp()), match="feature_distance", pairs=[("2", "1")], epochs=1)
