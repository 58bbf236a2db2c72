"""Networks that write sequences: a student learns what its teacher would write, then the teacher's words one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive, Share, Whole
from featherweight.catalogue import recipe
from featherweight.core.decode import beam_search, sentence_bleu
from featherweight.core.features import exact
from featherweight.core.fit import Optimizers, Step
from featherweight.core.ledger import note
from featherweight.core.progress import track
from featherweight.core.task import (
    IGNORED,
    Batch,
    Task,
    cross_entropy,
    device_of,
    eval_mode,
    prediction,
    run,
    to_device,
)
from featherweight.core.taught import teacher_of
from featherweight.errors import BadData, BadOption, MissingNeed

PREFIX = "decoder_input_ids"


@final
@dataclass(frozen=True)
class Written:
    """One batch of sequences to learn: how the network is called, and its labels (batch, length), -100 not counted."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None

    @property
    def prefix(self) -> Tensor:
        """What the decoder has written before each word: the input of that name, or the last argument."""
        return self.kwargs[PREFIX] if PREFIX in self.kwargs else self.args[-1]

    def given(self, prefix: Tensor) -> Batch:
        """The same sources with other prefixes, as many times as there are prefixes for each."""
        times = len(prefix) // len(self.prefix)
        if PREFIX in self.kwargs:
            kwargs = {k: prefix if k == PREFIX else _repeated(v, times) for k, v in self.kwargs.items()}
            return tuple(_repeated(a, times) for a in self.args), kwargs
        return (*(_repeated(a, times) for a in self.args[:-1]), prefix), dict(self.kwargs)


def _repeated(value: Any, times: int) -> Any:
    return value.repeat_interleave(times, 0) if isinstance(value, Tensor) and value.dim() else value


@final
class InMemory:
    """Batches in a new order at every pass."""

    def __init__(self, batches: Sequence[Written]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for index in torch.randperm(len(self.batches)).tolist():
            one = self.batches[index]
            yield one.args, one.kwargs, one.labels


def tells_ends(options: Mapping[str, Any]) -> None:
    """Refuses one word that ends and pads: padding is not learned, so no sequence would ever end."""
    if options["end_token"] == options["pad_token"]:
        raise BadOption(
            f"end_token and pad_token are both {options['end_token']}: padding does not count, so the student would "
            "never learn to end; pass another pad_token, and pad the labels with it or with -100"
        )


@recipe(
    paper="Kim and Rush, EMNLP 2016, arXiv:1606.07947",
    family="distill",
    needs={"train", "teacher"},
    small={"beams": 2, "epochs": 2, "finetune": 1},
    rules=(tells_ends,),
)
def sequence_kd(
    model: nn.Module,
    task: Task,
    *,
    beams: Count = 5,
    penalty: Amount = 0.0,
    longest: Count | None = None,
    end_token: Whole = 2,
    pad_token: Whole = 0,
    epochs: Amount = 10,
    finetune: Amount = 2,
    targets: Literal["gold", "beam", "interpolation"] = "interpolation",
    alpha: Share = 0.5,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Seq-KD, `-log p(beam search of q)`, for `epochs`; then `(1 - alpha) NLL + alpha word-KD` for `finetune`.

    Word-KD is `-sum_j sum_v q(v | s, t_<j) log p(v | s, t_<j)`, the mean over words. The second stage learns the
    corpus ("gold"), what the teacher writes ("beam"), or of its beams the one that is most like the corpus by smoothed
    sentence BLEU ("interpolation"). epochs=0 with targets="gold" is word-level distillation alone, finetune=0
    sequence-level distillation alone, which needs no labels. The teacher writes once, before the training.

    Networks take the source and what was written before each word, and put out scores (batch, length, words): batches
    are (source, prefix, labels), or dictionaries with `decoder_input_ids` and `labels`. A prefix is the labels moved by
    one behind the word that starts; where labels are None it may be that word alone. Labels of -100, and of
    `pad_token`, do not count.
    Source: Sequence-Level Knowledge Distillation, sec. 3.

    Departs from the paper: losses are means over words, not sums over sentences; the paper tries word-level terms in
    either stage, here they are in the second; its beam's treatment of length is not told, here it is an option; Adam.

    Args:
        beams: K.
        penalty: a hypothesis' log-probability is divided by its number of words to this power.
        longest: words that the teacher may write; as many as the longest labels and half as many again when left out.
        end_token: the word that ends.
        pad_token: the word that pads.
        epochs: passes over what the teacher writes.
        finetune: passes of the second stage.
        targets: what the second stage learns.
        alpha: share of word-KD in it.
        lr: learning rate of the first stage, a tenth of it in the second, if both are there.
        optimizer: as in `fit`.

    Raises:
        BadData: the batches or what the networks put out are not as above.
        BadOption: teacher and student score other words; or end_token or pad_token is none of them, or they are one.
        MissingNeed: the targets need labels, and there are none.
    """
    teacher = teacher_of(model, task, "sequence_kd", same_inputs=True)
    corpus = [opened(task, batch, pad_token) for batch in task.train or ()]
    if finetune and targets != "beam":
        _ = [known(one) for one in corpus]
    for network in (teacher, model):
        check(network, corpus, max(end_token, pad_token))
    reading = replace(task, split=lambda batch: (*batch, None) if len(batch) == 2 else batch)

    stages: list[tuple[str, Sequence[Written], float, float, float]] = []
    if epochs or targets != "gold":
        most = longest or 1 + int(1.5 * max(one.prefix.shape[1] for one in corpus))
        written = decoded(teacher, reading, corpus, beams=beams, penalty=penalty, length=most, end=end_token,
                          pad=pad_token)  # fmt: skip
        best = [rewritten(one, beam[:, 0], pad_token) for one, beam in zip(corpus, written, strict=True)]
        stages.append(("Seq-KD", best, epochs, 0.0, lr))
    if finetune:
        if targets == "interpolation":
            data = [
                rewritten(one, nearest(one, beam, pad_token), pad_token)
                for one, beam in zip(corpus, written, strict=True)
            ]
        else:
            data = corpus if targets == "gold" else best
        stages.append((targets, data, finetune, alpha, lr / 10 if epochs else lr))
    for label, batches, passes, share, rate in stages:
        step = taught_step(teacher, reading, share)
        learning = replace(reading, train=InMemory(batches))
        task.fit(model, learning, epochs=passes, lr=rate, optimizer=optimizer, step=step, label=label)
    return model


def opened(task: Task, batch: Batch, pad: int) -> Written:
    """A batch, its labels of padding made -100.

    Raises:
        BadData: it has no prefix, or labels of another shape.
    """
    args, kwargs, labels = task.split(batch)
    prefix = kwargs.get(PREFIX, args[-1] if len(args) > 1 and not kwargs else None)
    whole = isinstance(prefix, Tensor) and prefix.dim() == 2 and not prefix.is_floating_point()
    if prefix is None or not whole or (labels is not None and labels.shape != prefix.shape):
        told = ", ".join(str(tuple(v.shape)) for v in (*args, *kwargs.values(), labels) if isinstance(v, Tensor))
        raise BadData(
            f"sequence_kd needs batches of (source, prefix, labels) or with {PREFIX}, prefix and labels whole numbers "
            f"of one shape (batch, length), not {told}: choose kd"
        )
    return Written(args, kwargs, None if labels is None else labels.masked_fill(labels == pad, IGNORED))


def known(one: Written) -> Tensor:
    """The labels of a batch.

    Raises:
        MissingNeed: it has none.
    """
    if one.labels is None:
        raise MissingNeed("the corpus has no labels to learn: yield (source, prefix, labels), or pass targets='beam'")
    return one.labels


def check(network: nn.Module, corpus: Sequence[Written], word: int) -> None:
    """Refuses a network that does not score words at every place of the prefix.

    Raises:
        BadData: there are no batches, or it puts out something else.
        BadOption: the word that ends or pads is none of these.
    """
    if not corpus:
        raise BadData("the training data are empty: at least one batch is needed")
    one = corpus[0]
    with eval_mode(network):
        args, kwargs = to_device((one.args, one.kwargs), device_of(network))
        found = tuple(prediction(network(*args, **kwargs)).shape)
    if len(found) != 3 or found[:2] != tuple(one.prefix.shape):
        raise BadData(
            f"the network puts out {found} for prefixes {tuple(one.prefix.shape)}: expected scores (batch, length, "
            "words); choose kd for classes of whole inputs"
        )
    if word >= found[2]:
        raise BadOption(
            f"the network scores {found[2]} words, and {word} is none of them: pass end_token and pad_token"
        )


def decoded(
    teacher: nn.Module,
    task: Task,
    corpus: Sequence[Written],
    *,
    beams: int,
    penalty: float,
    length: int,
    end: int,
    pad: int,
) -> list[Tensor]:
    """What the teacher would write for every batch's sources, (sources, beams, length) each, best first."""
    written = []
    with eval_mode(teacher):
        for one in track(corpus, "decode", len(corpus)):

            def following(prefix: Tensor, one: Written = one) -> Tensor:
                output, _ = run(teacher, task, one.given(prefix))
                return exact(prediction(output)[:, -1]).log_softmax(1)

            start = one.prefix[:, 0].to(device_of(teacher))
            found, _ = beam_search(following, start, beams=beams, length=length, end=end, pad=pad, penalty=penalty)
            written.append(found.to(one.prefix.device))
    best = torch.cat([found[:, 0] for found in written])
    cut = int((~(best == end).any(1)).sum())
    note(f"the teacher wrote {len(best):,} sequences, {int((best != pad).sum()) / len(best):.1f} words each")
    if cut:
        note(f"{cut} of them had not ended after {length} words and are cut there")
    return written


def rewritten(one: Written, words: Tensor, pad: int) -> Written:
    """The same sources with other words (batch, length) to learn, as long as the longest of them."""
    words = words[:, : max(1, int((words != pad).sum(1).max()))]
    prefix = torch.cat([one.prefix[:, :1], words[:, :-1]], 1)
    args, kwargs = one.given(prefix)
    return Written(args, kwargs, words.masked_fill(words == pad, IGNORED))


def nearest(one: Written, beams: Tensor, pad: int) -> Tensor:
    """Of the hypotheses (batch, beams, length) of each source the one most like the corpus, (batch, length)."""
    picked = []
    for gold, hypotheses in zip(known(one), beams, strict=True):
        reference = gold[gold != IGNORED].tolist()
        likeness = [sentence_bleu(words[words != pad].tolist(), reference) for words in hypotheses]
        picked.append(hypotheses[max(range(len(likeness)), key=likeness.__getitem__)])
    return torch.stack(picked)


def taught_step(teacher: nn.Module, task: Task, alpha: float) -> Step:
    """`(1 - alpha) NLL + alpha word-KD` as two named terms; what has no share is left out."""

    def step(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, labels = run(student, task, batch)
        ours, terms = prediction(output), {}
        if alpha < 1:
            terms["sequence"] = (1 - alpha) * negative_log_likelihood(ours, labels)
        if alpha:
            with eval_mode(teacher):
                shown = to_device(prediction(run(teacher, task, batch)[0]), ours.device)
            terms["words"] = alpha * word_kd(ours, shown, labels != IGNORED)
        return terms

    return step


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over words of `-log p(label)`; logits (batch, length, words), labels (batch, length)."""
    return cross_entropy(exact(logits).flatten(0, 1), labels.flatten())


def word_kd(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """The mean over the counted places of `-sum_v q(v) log p(v)`, from logits (batch, length, words) of both.

    Raises:
        BadOption: they do not score the same words.

    >>> z = torch.tensor([[[0.0, 0.0], [9.0, 9.0]]])
    >>> round(float(word_kd(z, z, torch.tensor([[True, False]]))), 4)  # log 2
    0.6931
    """
    if student.shape != teacher.shape:
        raise BadOption(
            f"the student's scores {tuple(student.shape)} do not fit the teacher's {tuple(teacher.shape)}: both must "
            "score the same words"
        )
    losses = -(exact(teacher).detach().softmax(-1) * exact(student).log_softmax(-1)).sum(-1)
    return losses[counted].sum() / counted.sum().clamp_min(1)
