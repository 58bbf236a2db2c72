"""A large text network into a small recurrent one: logits of whole sentences are matched, on many changed sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive, Share, Whole
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.task import Batch, Task, eval_mode, loss_of, prediction, run
from featherweight.core.taught import teacher_of
from featherweight.core.words import Sentences, Vocabulary, changed, induced_classes, sentences
from featherweight.errors import BadData, BadOption, MissingNeed
from featherweight.ingredients.match.logit_regression import squared_logits


@recipe(
    paper="Tang et al., 2019, arXiv:1903.12136",
    family="distill",
    needs={"train", "teacher"},
    small={"alpha": 0.5, "copies": 2, "epochs": 2},
)
def bert_to_bilstm(
    model: nn.Module,
    task: Task,
    *,
    alpha: Share = 0.0,
    copies: Whole = 20,
    mask: Share = 0.1,
    swap: Share = 0.1,
    ngram: Share = 0.25,
    longest: Count = 5,
    pad_token: Whole = 0,
    mask_token: Whole = 1,
    special_tokens: Sequence[int] = (),
    word_classes: Sequence[int] | None = None,
    induced: Count = 30,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains on `alpha H(y, p_S) + (1 - alpha) ||z_S - z_T||^2`, on the sentences and `copies` changed ones of each.

    Batches hold numbers of words, (batch, length) or `input_ids` with `attention_mask`; teacher and student are called
    with the same ones, and only what they put out is compared, so that they share no layer. A teacher with a tokeniser
    of its own reads them through `core.words.Pieces`. Words of a changed sentence are hidden, swapped for others of
    their class, or all but a few in a row left out; y is there what the teacher prefers. Of pairs of sentences the
    first, the second, or both change, in turn. The teacher is asked once, before the training.
    Source: Distilling Task-Specific Knowledge from BERT into Simple Neural Networks.

    Departs from the paper: constants are from memory; a word has one class wherever it stands, where the paper tags
    parts of speech in the sentence, and without `word_classes` these are induced from neighbouring words; Adam, where
    the paper has AdaDelta; the student is whatever network is given. Tasks with token_type_ids pass their pairs as
    (first, second, label) instead.

    Args:
        alpha: share of the labels; 0 needs none.
        copies: changed sentences for each; 0 learns from the sentences as they are.
        mask: probability that a word is hidden.
        swap: probability that it becomes another of its class.
        ngram: probability that a changed sentence keeps 1 to `longest` words in a row.
        longest: see ngram.
        pad_token: the number that pads; it stands behind a sentence.
        mask_token: the number of a hidden word: the student's unknown word, the teacher's mask.
        special_tokens: further numbers that are no words and are left alone.
        word_classes: the class (part of speech) of every number; induced when left out.
        induced: how many classes are induced.
        epochs: passes over all sentences.
        lr: learning rate.
        optimizer: as in `fit`.

    Raises:
        BadData: the inputs are not numbers of words; or a number that has no class.
        BadOption: a word cannot be hidden and swapped; a network does not know mask_token; teacher and student score
            other classes.
        MissingNeed: labels have a share, and there are none.
    """
    if mask + swap > 1:
        raise BadOption(f"mask={mask} and swap={swap} exclude each other in a word: together at most 1")
    teacher = teacher_of(model, task, "bert_to_bilstm", same_inputs=True)
    found, targets = sentences(task, task.train or (), pad_token, "bert_to_bilstm", "choose logit_regression")
    if alpha and any(target is None for target in targets):
        raise MissingNeed(
            "alpha > 0 needs labels, which the batches do not have: yield (sentences, labels), or alpha=0"
        )

    vocabulary = Vocabulary(pad_token, mask_token, tuple(special_tokens))
    reading = replace(task, split=lambda batch: batch)
    for name, network in (("teacher", teacher), ("model", model)) if copies and mask else ():
        check_mask(name, network, reading, found, vocabulary)
    made = augmented(found.parts, vocabulary, copies, word_classes, induced, mask=mask, swap=swap, ngram=ngram,
                     longest=longest) if copies else []  # fmt: skip
    parts = tuple(torch.cat([part, *(copy[i] for copy in made)]) for i, part in enumerate(found.parts))
    count = len(found.parts[0])
    note(f"{len(parts[0]) - count:,} sentences made from {count:,}; the teacher scores them all once")

    logits = answers(teacher, reading, replace(found, parts=parts))
    labels = preferred(targets, logits) if alpha else logits[:, :0]
    data = replace(found, parts=parts, beside=(labels, logits))

    def step(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, (label, shown) = run(student, reading, batch)
        seen = prediction(output)
        terms = {"logits": (1 - alpha) * 2 * squared_logits({"": seen}, {"": shown}, batch, progress)}
        return {"labels": alpha * loss_of(task, output, label), **terms} if alpha else terms

    return task.fit(model, replace(reading, train=data), epochs=epochs, lr=lr, optimizer=optimizer, step=step)


def check_mask(name: str, network: nn.Module, task: Task, found: Sentences, vocabulary: Vocabulary) -> None:
    """Refuses a word for hidden ones that a network has no place for.

    Raises:
        BadOption: it reads the first sentence, but not with its words hidden.
    """
    hidden = tuple(part[:1].masked_fill(vocabulary.words(part[:1]), vocabulary.mask) for part in found.parts)
    one = torch.zeros(1, dtype=torch.long)
    with eval_mode(network):
        run(network, task, found.batch(one))
        try:
            run(network, task, replace(found, parts=hidden).batch(one))
        except IndexError:
            raise BadOption(
                f"mask_token={vocabulary.mask} is none of the words that the {name} knows: pass the number of its "
                "unknown or hidden word, or mask=0"
            ) from None


def augmented(
    parts: Sequence[Tensor],
    vocabulary: Vocabulary,
    copies: int,
    word_classes: Sequence[int] | None,
    induced: int,
    **how: Any,
) -> list[list[Tensor]]:
    """Changed copies of single sentences (n, length), or of pairs: the first, the second and both change in turn.

    Raises:
        BadData: a word has no class.
    """
    size = 1 + max(vocabulary.mask, *(int(part.max()) for part in parts))
    if word_classes is not None and len(word_classes) < size:
        raise BadData(
            f"word_classes has {len(word_classes)} entries, words have numbers up to {size - 1}: pass them all"
        )
    if word_classes is not None and min(word_classes) < 0:
        raise BadData(f"word_classes has a class {min(word_classes)}: number the classes from 0")
    every = torch.cat([part[vocabulary.words(part)] for part in parts])
    counts = torch.bincount(every, minlength=size)
    if word_classes is not None:
        classes = torch.tensor(list(word_classes[:size]))
    else:
        width = max(part.shape[1] for part in parts)
        rows = [nn.functional.pad(part, (0, width - part.shape[1]), value=vocabulary.pad) for part in parts]
        classes = induced_classes(torch.cat(rows), vocabulary, size, induced)
    turns = [(True,)] if len(parts) == 1 else [(True, False), (False, True), (True, True)]
    return [
        [changed(part, vocabulary, counts, classes, **how) if change else part
         for part, change in zip(parts, turns[k % len(turns)], strict=True)]
        for k in range(copies)
    ]  # fmt: skip


def answers(teacher: nn.Module, task: Task, data: Sentences) -> Tensor:
    """The teacher's logits of all sentences, (n, classes).

    Raises:
        BadOption: it does not put out one row for a sentence.
    """
    with eval_mode(teacher):
        shown = torch.cat([prediction(run(teacher, task, batch)[0]).cpu() for batch in data.in_order()])
    if shown.dim() > 2 or len(shown) != len(data.parts[0]):
        raise BadOption(
            f"the teacher puts out {tuple(shown.shape)} for {len(data.parts[0])} sentences: expected one row of scores "
            "for each; choose sequence_kd for scores of words"
        )
    return shown


def preferred(targets: Sequence[Tensor], logits: Tensor) -> Tensor:
    """The labels of the sentences, and behind them, for the changed ones, the classes that the teacher scores highest.

    Raises:
        BadData: the labels are no classes.
    """
    own = torch.cat([target.cpu() for target in targets])
    if own.dim() != 1 or own.is_floating_point() or logits.dim() < 2:
        raise BadData("alpha > 0 needs one class for each sentence: pass alpha=0 for other labels")
    return torch.cat([own, logits[len(own) :].argmax(1)])
