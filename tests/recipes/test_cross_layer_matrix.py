"""The thesis's matrices: FSP's where pairs, pooling and weights are FSP's, and one for every two layers."""

import pytest
import torch

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.ingredients.match.gram_matrices import gram, gram_matrices, layer_pairs
from matches import loss, watched


def maps(*channels, size=4):
    return [torch.randn(2, c, size, size, dtype=torch.float64) for c in channels]


def test_consecutive_pairs_weighted_by_their_size_are_fsp():
    ours, theirs = maps(3, 4, 5), maps(3, 4, 5)
    by_hand = sum(
        (gram(ours[i], ours[i + 1]) - gram(theirs[i], theirs[i + 1])).square().mean((1, 2)).mean() * sizes
        for i, sizes in ((0, 12), (1, 20))
    )
    torch.testing.assert_close(loss(gram_matrices, ours, theirs), by_hand)
    alone = [loss(gram_matrices, ours[i : i + 2], theirs[i : i + 2], scale="mean") for i in (0, 1)]
    torch.testing.assert_close(loss(gram_matrices, ours, theirs), 12 * alone[0] + 20 * alone[1])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_number_of_matrices(count):
    assert len(layer_pairs(count, "all")) == count * (count - 1) // 2
    assert len(layer_pairs(count, "self")) == count * (count + 1) // 2
    assert sorted(layer_pairs(count, "consecutive") + layer_pairs(count, "skip")) == layer_pairs(count, "all")


def test_positions_do_not_matter():
    ours, theirs = maps(3, 4, 5), maps(3, 4, 5)
    for between in ("all", "skip", "self"):
        value = loss(gram_matrices, ours, theirs, between=between)
        torch.testing.assert_close(
            loss(gram_matrices, [f.rot90(1, (2, 3)) for f in ours], theirs, between=between), value
        )
        assert float(loss(gram_matrices, ours, ours, between=between)) == 0


def test_all_pairs_are_learned_beside_the_labels():
    steps = []
    task = small_task(teacher=small_cnn().eval(), fit=watched(steps))
    student = small_cnn().eval()
    entry("cross_layer_matrix")(student, task)
    x, y = next(iter(task.train))
    terms = steps[0][0](student, (x, y), 0.0)
    assert terms.keys() == {"labels", "gram_matrices"}
    sides = [[m[:1](x), m[:3](x), m[:6](x)] for m in (student, task.teacher)]
    wanted = sum(
        (gram(sides[0][i], sides[0][j]) - gram(sides[1][i], sides[1][j])).square().mean()
        for i, j in ((0, 1), (0, 2), (1, 2))
    )
    torch.testing.assert_close(terms["gram_matrices"], wanted)
