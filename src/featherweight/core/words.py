"""Sentences as numbers of words: gathered from batches, changed word by word, read as pieces by another network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.core.task import Batch, Task
from featherweight.errors import BadData

NAMES = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Vocabulary:
    """What numbers of words mean: the one that pads, the one for a hidden word, those that are no words either."""

    pad: int = 0
    mask: int = 1
    special: tuple[int, ...] = ()

    def words(self, ids: Tensor) -> Tensor:
        """Which entries of ids are words, of the same shape."""
        others = torch.tensor([self.pad, *self.special], device=ids.device)
        return ~torch.isin(ids, others)


@final
@dataclass(frozen=True)
class Sentences:
    """Sentences in memory, batch by batch in a new order at every pass: `((arguments), {by name}, what belongs to it)`.

    Args:
        parts: one (n, length) for each argument of the network: single sentences, or pairs of them.
        beside: further tensors (n, ...), such as labels.
        names: the network's names for its input: none, "input_ids", and "attention_mask" beside it.
        pad: the number that pads.
        size: of a batch.
        fixed: keep the length; otherwise a batch is as long as its longest sentence.
    """

    parts: tuple[Tensor, ...]
    beside: tuple[Tensor, ...]
    names: tuple[str, ...]
    pad: int
    size: int
    fixed: bool

    def __len__(self) -> int:
        return (len(self.parts[0]) + self.size - 1) // self.size

    def __iter__(self) -> Iterator[Batch]:
        yield from (self.batch(index) for index in torch.randperm(len(self.parts[0])).split(self.size))

    def in_order(self) -> Iterator[Batch]:
        """All batches, the sentences as they came."""
        yield from (self.batch(index) for index in torch.arange(len(self.parts[0])).split(self.size))

    def batch(self, index: Tensor) -> Batch:
        parts = tuple(self.trimmed(part[index]) for part in self.parts)
        beside = tuple(one[index] for one in self.beside)
        if not self.names:
            return parts, {}, beside
        given = (parts[0], (parts[0] != self.pad).long())
        return (), dict(zip(self.names, given, strict=False)), beside

    def trimmed(self, ids: Tensor) -> Tensor:
        filled = (ids != self.pad).any(0).nonzero()
        return ids if self.fixed or not len(filled) else ids[:, : int(filled[-1]) + 1]


def sentences(task: Task, batches: Iterable[Batch], pad: int, method: str, cure: str) -> tuple[Sentences, list[Any]]:
    """All sentences of a task's batches, and the batches' targets.

    Raises:
        BadData: the inputs are not numbers of words, (batch, length) each; `method` wants them, `cure` does not.
    """
    columns: list[list[Tensor]] = []
    targets: list[Any] = []
    names: tuple[str, ...] = ()
    for batch in batches:
        args, kwargs, target = task.split(batch)
        given = [kwargs.get(NAMES[0]), *args] if kwargs else [*args]
        names = tuple(name for name in NAMES if name in kwargs)
        known = len(args) == 0 and set(kwargs) <= set(NAMES) if kwargs else True
        if not 1 <= len(given) <= 2 or not known or not all(_is_sentence(one) for one in given):
            told = ", ".join(_told(one) for one in [*args, *kwargs.values()])
            raise BadData(
                f"{method} changes the words of sentences and needs batches of their numbers, (batch, length) each or "
                f"input_ids and attention_mask, not {told}: {cure}"
            )
        if "attention_mask" in kwargs:
            given = [torch.where(kwargs["attention_mask"] > 0, given[0], pad)]
        columns.append([one.cpu() for one in given])
        targets.append(target)
    if not columns:
        raise BadData("the training data are empty: at least one batch is needed")
    widths = {tuple(one.shape[1] for one in column) for column in columns}
    parts = tuple(_stacked([column[i] for column in columns], pad) for i in range(len(columns[0])))
    size = max(len(column[0]) for column in columns)
    return Sentences(parts, (), names, pad, size, len(widths) == 1), targets


def _is_sentence(value: Any) -> bool:
    whole = isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool
    return whole and value.dim() == 2


def _told(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _stacked(rows: Sequence[Tensor], pad: int) -> Tensor:
    longest = max(one.shape[1] for one in rows)
    return torch.cat([nn.functional.pad(one, (0, longest - one.shape[1]), value=pad) for one in rows])


def changed(
    ids: Tensor,
    vocabulary: Vocabulary,
    counts: Tensor,
    classes: Tensor,
    *,
    mask: float,
    swap: float,
    ngram: float,
    longest: int,
) -> Tensor:
    """Sentences (n, length) anew: words hidden or swapped, some sentences cut down to a few words in a row.

    Every word is hidden with probability `mask`, or else with probability `swap` becomes another of its class, drawn as
    often as that stands in the data; they exclude each other. Then of a sentence, with probability `ngram`, only 1 to
    `longest` neighbouring words are left, moved to the front. Source: Tang et al., 2019, arXiv:1903.12136, sec. 3.3.

    Args:
        ids: numbers of words.
        vocabulary: which of them are words.
        counts: how often each stands in the data, (words,).
        classes: the class of each, (words,).

    >>> v = Vocabulary(pad=0, mask=1)
    >>> changed(torch.tensor([[5, 6, 0]]), v, torch.ones(7), torch.zeros(7), mask=1, swap=0, ngram=0, longest=5)
    tensor([[1, 1, 0]])
    """
    draw, words = torch.rand(ids.shape), vocabulary.words(ids)
    swapped = words & (draw >= mask) & (draw < mask + swap)
    made = torch.where(words & (draw < mask), vocabulary.mask, ids)
    of_place = classes[ids]
    for one in of_place[swapped].unique():
        places = swapped & (of_place == one)
        made[places] = torch.multinomial((counts * (classes == one)).double(), int(places.sum()), replacement=True)
    return _cut(made, words, torch.rand(len(ids)) < ngram, longest, vocabulary.pad)


def _cut(ids: Tensor, words: Tensor, chosen: Tensor, longest: int, pad: int) -> Tensor:
    """The chosen rows with 1 to `longest` words in a row, and whatever is no word; what is left moves to the front."""
    count = words.sum(1)
    n = torch.minimum(torch.randint(1, longest + 1, count.shape), count)
    start = (torch.rand(count.shape) * (count - n + 1)).long()
    place = words.long().cumsum(1) - 1
    inside = (place >= start[:, None]) & (place < (start + n)[:, None])
    keep = torch.where(chosen[:, None] & words, inside, ids != pad)
    return packed(ids, keep, pad)


def packed(ids: Tensor, keep: Tensor, pad: int) -> Tensor:
    """What is kept of every row, moved to the front in its order; the rest is padding.

    >>> packed(torch.tensor([[5, 6, 7]]), torch.tensor([[True, False, True]]), 0)
    tensor([[5, 7, 0]])
    """
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    return torch.where(keep.gather(1, order), ids.gather(1, order), pad)


def induced_classes(ids: Tensor, vocabulary: Vocabulary, size: int, count: int, frequent: int = 500) -> Tensor:
    """Classes of words by their neighbours, (size,): words that stand beside the same words go together.

    Counts of the most frequent words directly before and behind, their square roots normed, the 50 leading directions,
    k-means. A stand-in for parts of speech where there is no tagger; words that are never seen have the class 0.
    Source: Schuetze, Distributional part-of-speech tagging, EACL 1995.
    """
    from sklearn.cluster import KMeans

    words = vocabulary.words(ids)
    counts = torch.bincount(ids[words], minlength=size)
    top = counts.argsort(descending=True, stable=True)[:frequent]
    column = torch.full((size,), -1).index_put((top,), torch.arange(len(top)))
    both = words[:, 1:] & words[:, :-1]
    before, behind = ids[:, :-1][both], ids[:, 1:][both]
    beside = torch.zeros(size, 2 * len(top))
    for word, neighbour, offset in ((behind, before, 0), (before, behind, len(top))):
        known = column[neighbour] >= 0
        ones = torch.ones(int(known.sum()))
        beside.index_put_((word[known], column[neighbour[known]] + offset), ones, accumulate=True)
    seen = (beside.sum(1) > 0).nonzero().flatten()
    found = torch.zeros(size, dtype=torch.long)
    if len(seen) > count:
        rows = nn.functional.normalize(beside[seen].sqrt(), dim=1)
        u, s, _ = torch.svd_lowrank(rows, min(50, *rows.shape))
        found[seen] = torch.from_numpy(KMeans(count, n_init=1, random_state=0).fit_predict((u * s).numpy())).long()
    return found


@final
class Pieces(nn.Module):
    """A network that reads pieces of words, called with numbers of words: each word is looked up in a table.

    So a teacher and a student with tokenisers of their own read the same batches, and the same changed words.

    Args:
        network: takes `input_ids` and `attention_mask`.
        table: the pieces of each word, (words, most pieces), `pad` behind them; a row of `pad` for the word that pads.
        pad: the piece that pads.
        front, back: pieces before and behind every sentence.
        length: what is longer loses its end.
    """

    def __init__(
        self,
        network: nn.Module,
        table: Tensor,
        *,
        pad: int = 0,
        front: Sequence[int] = (),
        back: Sequence[int] = (),
        length: int = 512,
    ) -> None:
        super().__init__()
        self.network, self.pad, self.length = network, pad, length
        self.register_buffer("table", table)
        self.front, self.back = list(front), list(back)

    def pieces(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Numbers of words (batch, length) as numbers of pieces (batch, other length)."""
        found = self.get_buffer("table")[ids]
        if attention_mask is not None:
            found = found.masked_fill(attention_mask[..., None] == 0, self.pad)
        flat = found.flatten(1)
        inner = packed(flat, flat != self.pad, self.pad)[:, : self.length - len(self.front) - len(self.back)]
        ends = [inner.new_tensor(end).expand(len(ids), -1) for end in (self.front, self.back)]
        whole = torch.cat([ends[0], inner, ends[1]], 1)
        kept = packed(whole, whole != self.pad, self.pad)
        return kept[:, : max(1, int((kept != self.pad).sum(1).max()))]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """The network's output; words that the mask leaves out are not read."""
        ids = self.pieces(input_ids, attention_mask)
        return self.network(input_ids=ids, attention_mask=(ids != self.pad).long())
