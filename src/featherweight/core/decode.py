"""What a network that writes sequences would write: beam search with any network, and how like a reference it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Next = Callable[[Tensor], Tensor]
"""`prefixes (n, length) -> log-probabilities of the next word (n, words)`; rows keep their order and their source."""


def beam_search(
    following: Next, start: Tensor, *, beams: int, length: int, end: int, pad: int, penalty: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The `beams` most probable sequences found of each source, best first: words (sources, beams, length), scores.

    All prefixes are extended by every word and the best kept, until all have ended. A hypothesis that has ended stays
    among them with its score and is padded, so that with as many beams as there are sequences the search is exact. The
    score is the log-probability, end included, divided by (number of words) ** penalty. What has not ended after
    `length` words is cut there. Prefixes are read from their beginning at every step; nothing is cached.

    Args:
        following: of sources x beams rows, those of a source beside one another.
        start: first word of every source, (sources,).
        beams: K.
        length: at most so many words behind the first, `end` among them.
        end, pad: the words that end and that pad.
        penalty: 0 is the sequence's probability, which favours short ones; 1 its mean over words.
    """
    n, rows = len(start), torch.arange(len(start), device=start.device)[:, None]
    words = start[:, None, None].expand(n, beams, 1)
    total = torch.full((n, beams), -torch.inf, device=start.device)
    total[:, 0] = 0  # at first all are the same prefix: one counts
    for _ in range(length):
        ended = (words[:, :, 1:] == end).any(2)
        if bool(ended.all()):
            break
        steps = following(words.flatten(0, 1)).float().view(n, beams, -1)
        stay = torch.full_like(steps, -torch.inf)
        stay[:, :, pad] = 0
        scores = total[:, :, None] + torch.where(ended[:, :, None], stay, steps)
        counted = (words[:, :, 1:] != pad).sum(2) + (~ended).long()
        ranked = scores / counted[:, :, None].clamp_min(1) ** penalty
        best = ranked.flatten(1).topk(beams, dim=1).indices
        before, word = best // steps.shape[2], best % steps.shape[2]
        total = scores.flatten(1).gather(1, best)
        words = torch.cat([words[rows, before], word[:, :, None]], 2)
    written = torch.nn.functional.pad(words[:, :, 1:], (0, length - words.shape[2] + 1), value=pad)
    total = total / (written != pad).sum(2).clamp_min(1) ** penalty
    order = total.argsort(dim=1, descending=True, stable=True)
    return written[rows, order], total.gather(1, order)


def sentence_bleu(written: Sequence[int], reference: Sequence[int], longest: int = 4) -> float:
    """How like a reference a sequence is, 0..1: n-grams in common, n = 1..4, times a penalty for being shorter.

    Counts of n-grams above 1 are raised by one, above and below the line. Source: Lin and Och, ORANGE, COLING 2004.

    >>> sentence_bleu([5, 6, 7, 8], [5, 6, 7, 8])
    1.0
    >>> round(sentence_bleu([5, 6, 7], [5, 6, 8, 7]), 4)  # exp(1 - 4/3) * (1 * 2/3 * 1/2 * 1) ** (1/4)
    0.5444
    """
    if not written or not reference:
        return float(not written and not reference)
    logs = 0.0
    for n in range(1, longest + 1):
        ours, theirs = _grams(written, n), _grams(reference, n)
        common, more = sum((ours & theirs).values()), int(n > 1)
        if common + more == 0:
            return 0.0
        logs += math.log((common + more) / (sum(ours.values()) + more)) / longest
    return math.exp(logs + min(0.0, 1 - len(reference) / len(written)))


def _grams(words: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
