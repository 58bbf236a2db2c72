"""Furlanello et al. 2018: what the two forms keep of the teacher, and that each generation starts anew."""

import pytest
import torch
import torch.nn.functional as F

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import evaluate
from featherweight.ingredients.match.dark_knowledge import permute_others, permuted, weighted_by_confidence
from matches import on_logits, watched


def test_permuting_keeps_the_largest_its_place_and_the_multiset():
    p = torch.randn(200, 6).softmax(1)
    q = permute_others(p)
    assert torch.equal(p.argmax(1), q.argmax(1))
    assert torch.equal(p.amax(1), q.amax(1))
    assert torch.equal(p.sort(1).values, q.sort(1).values)
    moved = (p != q).sum(1)
    assert (moved > 0).float().mean() > 0.9
    hits = torch.stack([permute_others(torch.tensor([[0.1, 0.6, 0.2, 0.3]]))[0] for _ in range(600)])
    torch.testing.assert_close(hits[:, [0, 2, 3]].mean(0), torch.full((3,), 0.2), rtol=0, atol=0.02)


def test_permuted_loss_is_zero_where_the_others_are_equal():
    z = torch.tensor([[3.0, 1.0, 1.0], [0.0, 0.0, 2.0]])
    assert abs(float(on_logits(permuted, z, z))) < 1e-6
    assert float(on_logits(permuted, -z, z)) > 0.1


def test_confidence_weights_add_up_to_1():
    ours, theirs, y = torch.randn(5, 4), torch.randn(5, 4), torch.arange(5) % 4
    value = weighted_by_confidence({"": ours}, {"": theirs}, (None, y), 0.0)
    w = theirs.softmax(1).amax(1)
    each = F.cross_entropy(ours, y, reduction="none")
    torch.testing.assert_close(value, (w * each).sum() / w.sum())
    sure = weighted_by_confidence({"": ours}, {"": torch.zeros(5, 4)}, (None, y), 0.0)
    torch.testing.assert_close(sure, F.cross_entropy(ours, y))


@pytest.mark.parametrize(("form", "terms"), [("kd", {"labels", "kd"}), ("confidence", {"confidence"})])
def test_generations_start_anew_and_learn_from_the_one_before(form, terms):
    steps = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(steps))
    start = small_mlp()
    held = start[1].weight.detach().clone()
    model = entry("born_again")(start, task, generations=2, form=form)
    assert len(steps) == 2
    assert not torch.equal(held, model[1].weight)
    batch = next(iter(task.train))
    assert steps[0][0](model, batch, 0.0).keys() == terms


@pytest.mark.parametrize("form", ["kd", "permuted", "confidence"])
def test_learns_in_every_form(form):
    task = small_task(teacher=fit(small_cnn(), small_task(), epochs=6, lr=0.01))
    model = entry("born_again")(small_mlp(), task, generations=2, form=form, epochs=8, lr=0.01)
    assert evaluate(model, task).value >= 0.9
