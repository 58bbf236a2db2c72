"""Wang et al. 2018: the assistant sees distributions, not samples; it is dropped, and equal features fool it."""

import pytest
import torch

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.adversary import Discriminator, from_teacher
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.errors import UnknownName
from matches import watched


def test_features_at_the_wrong_samples_have_the_same_loss():
    judge, f = Discriminator(5), torch.randn(16, 5)
    mixed = f[torch.randperm(16)]
    torch.testing.assert_close(from_teacher(judge(mixed)[0], 1.0), from_teacher(judge(f)[0], 1.0))


def test_equal_features_cannot_be_told_apart_and_others_can():
    def accuracy(real, fake):
        judge = Discriminator(4, hidden=(32,))
        optimizer = torch.optim.Adam(judge.parameters(), lr=0.02)
        for _ in range(80):
            optimizer.zero_grad()
            (from_teacher(judge(real)[0], 1.0) + from_teacher(judge(fake)[0], 0.0)).backward()
            optimizer.step()
        right = torch.cat([judge(real)[0] > 0, judge(fake)[0] <= 0])
        return float(right.float().mean())

    f = torch.randn(64, 4)
    assert accuracy(f, f[torch.randperm(64)]) == 0.5
    assert accuracy(f, f + 3) > 0.95


def test_terms_and_parameters_in_training_only():
    steps = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(steps))
    with recording() as ledger:
        student = entry("portable_gan")(small_mlp(), task)
    adapter = 32 * 16
    judge = 16 * 128 + 128 + 128 * 64 + 64 + 64 + 1
    assert any(f"discriminator of 2 and 7; {adapter + judge:,} parameters" in text for text in ledger.notes)
    step, params = steps[0]
    terms = step(student, next(iter(task.train)), 0.0)
    assert terms.keys() == {"labels", "assistant"}
    assert len(params) == 5
    assert torch.autograd.grad(terms["assistant"], params[0])[0].abs().sum() > 0


def test_learns_and_knows_its_layers():
    task = small_task()
    teacher = fit(small_cnn(), task, epochs=6, lr=0.01)
    student = entry("portable_gan")(small_mlp(), small_task(teacher=teacher), epochs=6, lr=0.01)
    assert evaluate(student, task).value >= 0.9
    with pytest.raises(UnknownName, match="unknown layer of the teacher 'x'"):
        entry("portable_gan")(small_mlp(), small_task(teacher=teacher), hint="x")
