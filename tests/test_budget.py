"""Budgets are read in the user's units and judged in base units."""

import pytest

from featherweight.budget import parse
from featherweight.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "quantity", "value", "relative"),
    [
        ("size<=1MB", "size", 1e6, False),
        ("size <= 0.1x", "size", 0.1, True),
        ("size<=2KiB", "size", 2048, False),
        ("latency<=5ms", "latency", 5, False),
        ("latency<=0.5x", "latency", 0.5, True),
        ("macs<=2M", "macs", 2e6, False),
        ("params<=100k", "params", 1e5, False),
        ("drop<=0.5pt", "drop", 0.5, False),
        ("size<=1e3B", "size", 1000, False),
    ],
)
def test_reads_what_users_write(text, quantity, value, relative):
    (limit,) = parse(text)
    assert (limit.quantity, limit.value, limit.relative) == (quantity, value, relative)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("size", "expected QUANTITY<=NUMBER UNIT"),
        ("size>=1MB", "expected QUANTITY<=NUMBER UNIT"),
        ("sise<=1MB", "did you mean 'size'"),
        ("size<=1parsec", "size is given in b, kb, mb"),
        ("drop<=0.5x", "drop is given in pt"),
        ("latency<=5", "latency is given in us, ms, s"),
        ("size<=1MB,", "expected QUANTITY<=NUMBER UNIT"),
    ],
)
def test_refuses_the_rest_in_one_sentence(text, expected):
    with pytest.raises(BudgetError, match=expected):
        parse(text)


def test_judges_relative_and_absolute_limits():
    original = {"size": 1000.0, "drop": 0.0}
    tenth, drop = parse("size<=0.1x,drop<=0.5pt")
    assert tenth.holds({"size": 100.0}, original)
    assert not tenth.holds({"size": 100.1}, original)
    assert tenth.excess({"size": 200.0}, original) == pytest.approx(2.0)
    assert tenth.told({"size": 200.0}, original) == "size is 0.2x, size<=0.1x was asked"
    assert drop.holds({"drop": -3.0}, original)
    assert drop.holds({"drop": 0.5}, original)
    assert not drop.holds({"drop": 0.51}, original)
