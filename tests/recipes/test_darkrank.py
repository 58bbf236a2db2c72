"""Chen et al. 2018: probabilities of orders, the soft form zero iff score differences agree, the hard one is not."""

import math

import pytest
import torch

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.errors import BadOption
from featherweight.ingredients.match.darkrank import all_orders, log_probability, query_scores, ranking
from matches import loss, rotation


def test_probabilities_of_all_orders_add_up_to_1():
    scores = torch.randn(3, 4, dtype=torch.float64)
    orders = all_orders(scores)
    assert orders.shape == (3, math.factorial(4))
    torch.testing.assert_close(orders.exp().sum(1), torch.ones(3, dtype=torch.float64))
    e = scores[0].exp()
    by_hand = e[0] / e.sum() * e[1] / e[1:].sum() * e[2] / e[2:].sum()
    torch.testing.assert_close(log_probability(scores[0]).exp(), by_hand)
    torch.testing.assert_close(log_probability(scores + 5), log_probability(scores))


def test_soft_is_zero_at_equality_and_hard_is_the_improbability_of_the_teachers_order():
    f = torch.randn(6, 5, dtype=torch.float64)
    assert abs(float(loss(ranking, f, f, form="soft"))) < 1e-12
    assert float(loss(ranking, torch.randn_like(f), f, form="soft")) > 0.01
    scores = query_scores(f, 3.0, 3.0, True).topk(4).values
    assert float(loss(ranking, f, f)) == pytest.approx(float(-log_probability(scores).mean()))
    assert float(loss(ranking, f, f)) > 0.01


def test_hard_vanishes_for_a_widely_separated_order_alone():
    on_a_line = torch.tensor([[0.0], [1.0], [3.0], [7.0], [15.0]])
    wide = loss(ranking, 100 * on_a_line, on_a_line, unit=False)
    assert float(wide) < 1e-6
    assert float(loss(ranking, -(on_a_line**0.5), on_a_line, unit=False)) > float(wide)
    assert float(loss(ranking, on_a_line.flip(0) ** 2, on_a_line, unit=False)) > 10


def test_rotation_and_translation_do_not_matter():
    f, t = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    moved = f @ rotation(5) + torch.randn(5).double()
    for form in ("hard", "soft"):
        kwargs = {"form": form, "unit": False, "alpha": 0.1}
        assert float(loss(ranking, moved, t, **kwargs)) == pytest.approx(float(loss(ranking, f, t, **kwargs)))


def test_lists_too_long_for_all_orders():
    with pytest.raises(BadOption, match="nearest=6: must be a whole number from 2 to 5"):
        entry("darkrank")(small_cnn(), small_task(teacher=small_cnn()), settings={"nearest": 6})
