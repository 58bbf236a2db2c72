"""DarkRank: the samples of a batch are ranked by their distance to a query as the teacher ranks them.

Source: Chen, Wang and Zhang, DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer, AAAI
2018, arXiv:1707.01220.
Departs from the paper: any task's loss beside it, not a metric-learning one, and no sampler of same-identity pairs;
every sample of the batch is a query; the hard form ranks the nearest samples, where the official code ranks all;
features are scaled to norm 1 so that the scores' scale does not depend on the network (a setting).
"""

from __future__ import annotations

from itertools import permutations
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from featherweight.allowed import Positive
from featherweight.catalogue import ingredient, method
from featherweight.core.features import Taps, paired, squared_distances, vectors


@ingredient("match", where="last", samples=3)
def ranking(
    student: Taps,
    teacher: Taps,
    batch: Any,
    progress: float,
    *,
    form: Literal["hard", "soft"] = "hard",
    alpha: Positive = 3.0,
    beta: Positive = 3.0,
    nearest: Annotated[int, Interval(ge=2, le=5)] = 4,
    unit: bool = True,
) -> Tensor:
    """Plackett-Luce ranking of the samples nearest to each query in the teacher's eyes, the mean over queries.

    Scores are `S = -alpha ||f_i - q||^beta`. Hard: `-log P(teacher's order | S_S)`. Soft: KL of the probabilities of
    all orders, `sum_pi P_T(pi) log P_T(pi) / P_S(pi)`.

    Args:
        form: hard or soft.
        alpha, beta: of the score.
        nearest: how many samples are ranked; all their orders are looked at in the soft form.
        unit: features have norm 1.
    """
    total = next(iter(student.values())).new_zeros((), dtype=torch.float32)
    for ours, theirs in paired(student, teacher):
        s, t = (query_scores(f, alpha, beta, unit) for f in (ours, theirs))
        order = t.topk(min(nearest, len(t) - 1), dim=1).indices  # a query's score of itself is -inf
        s, t = s.gather(1, order), t.gather(1, order)
        if form == "hard":
            total = total - log_probability(s).mean()
        else:
            p, q = (all_orders(scores).log_softmax(1) for scores in (t, s))
            total = total + (p.exp() * (p - q)).sum(1).mean()
    return total


def query_scores(features: Tensor, alpha: float, beta: float, unit: bool) -> Tensor:
    """`-alpha ||f_i - q||^beta` of every sample i for every query q, (queries, samples); -inf of a query itself."""
    f = F.normalize(vectors(features), dim=1) if unit else vectors(features)
    found = -alpha * squared_distances(f).clamp_min(1e-12).pow(beta / 2)
    return found.masked_fill(torch.eye(len(f), dtype=torch.bool, device=f.device), -torch.inf)


def log_probability(scores: Tensor) -> Tensor:
    """`log P(pi) = sum_i S(pi_i) - log sum_{k >= i} exp S(pi_k)` of scores in the order pi, (..., m), by row.

    >>> [round(float(log_probability(torch.tensor(s)).exp()), 3) for s in ([0.0, 0.0, 0.0], [9.0, 0.0, -9.0])]
    [0.167, 1.0]
    """
    return (scores - scores.flip(-1).logcumsumexp(-1).flip(-1)).sum(-1)


def all_orders(scores: Tensor) -> Tensor:
    """The log-probability of every order of the scores (queries, m), (queries, m!)."""
    orders = torch.tensor(list(permutations(range(scores.shape[1]))), device=scores.device)
    return log_probability(scores[:, orders])


darkrank = method(
    "distill",
    match=ranking,
    labels=1.0,
    weight=1.0,
    paper="Chen, Wang and Zhang, AAAI 2018, arXiv:1707.01220",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
