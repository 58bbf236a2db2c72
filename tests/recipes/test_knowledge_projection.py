"""Zhang et al. 2017: a planted pair of layers is found, by a search that only gets smaller and that a seed repeats."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.errors import BadOption
from featherweight.recipes.knowledge_projection import Projection, spread


def searched(student, teacher, **options):
    torch.manual_seed(7)
    with recording() as ledger:
        model = entry("knowledge_projection")(student, small_task(teacher=teacher), **options)
    chosen = next(text for text in ledger.notes if "guides the student's layer" in text)
    return model, chosen, ledger.tables["knowledge_projection"]


def test_planted_pair_is_found_round_by_round_and_again():
    teacher = fit(small_cnn(), small_task(), epochs=6, lr=0.01).eval()
    student = copy.deepcopy(teacher)  # its layer 5 is a linear map, the identity, of the teacher's
    options = {"layers": 2, "search_epochs": 4, "lr": 0.02, "epochs": 0}
    model, chosen, rounds = searched(student, teacher, **options)
    again = searched(copy.deepcopy(teacher), teacher, **options)
    assert [len(r) for r in rounds] == [4, 2]
    assert set(rounds[1]) < set(rounds[0])
    assert rounds[0]["5 <- 5"] == min(loss for pair, loss in rounds[0].items() if pair.startswith("5"))
    assert (chosen, rounds) == again[1:]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), teacher.parameters(), strict=True)), "no epochs"


@pytest.mark.parametrize("direction", ["t2s", "s2t"])
def test_projection_by_hand(direction):
    ours, theirs = torch.randn(3, 4, 4, 4), torch.randn(3, 6, 8, 8)
    match = Projection("a", "b", ours, theirs, direction)
    wide, narrow = (theirs, ours) if direction == "t2s" else (ours, theirs)
    assert match.project.weight.shape[:2] == (narrow.shape[1], wide.shape[1])
    logits, y = torch.eye(3), torch.tensor([0, 1, 0])
    value = match({"a": ours}, {"b": theirs, "": logits}, (None, y), 0.0)
    pooled = nn.functional.adaptive_avg_pool2d(theirs, 4)
    gaps = match.project(pooled) - ours if direction == "t2s" else match.project(ours) - pooled
    torch.testing.assert_close(value, gaps.square().mean())
    match.gated = True
    gated = match({"a": ours}, {"b": theirs, "": logits}, (None, y), 0.0)
    torch.testing.assert_close(gated, gaps.square().flatten(1).mean(1)[:2].sum() / 3)


def test_candidates_are_spread_over_the_network():
    assert spread(list("abcdefghi"), 3) == ["c", "f", "i"]
    assert spread(list("ab"), 5) == ["a", "b"]


def test_learns_and_drops_the_projection():
    teacher = fit(small_cnn(), small_task(), epochs=6, lr=0.01).eval()
    thin = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    names = list(thin.state_dict())
    model, _, _ = searched(thin, teacher, layers=2, search_epochs=1, epochs=5, lr=0.01)
    assert list(model.state_dict()) == names
    assert evaluate(model, small_task()).value >= 0.9


def test_layers_that_cannot_be_joined():
    with pytest.raises(BadOption, match="maps for maps and vectors for vectors"):
        searched(small_mlp(), small_cnn())
