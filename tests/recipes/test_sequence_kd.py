"""Kim and Rush 2016: beams against all sequences of a small grammar, what each level of distillation does to it."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import Writer, small_mlp, small_task, writing_task
from featherweight.catalogue import entry
from featherweight.core.decode import beam_search, sentence_bleu
from featherweight.core.ledger import recording
from featherweight.core.task import Task
from featherweight.errors import BadData, BadOption, MissingNeed
from featherweight.recipes.sequence_kd import (
    IGNORED,
    Written,
    decoded,
    nearest,
    negative_log_likelihood,
    taught_step,
    word_kd,
)
from matches import watched

WORDS, LENGTH, SOURCES, END = 6, 3, 8, 2  # 0 pads, 1 starts, 2 ends


class Table(nn.Module):
    """The scores of the next word are looked up by the source and all words before it."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.scores = nn.Embedding(SOURCES * WORDS ** (LENGTH + 1), WORDS)
        with torch.no_grad():
            self.scores.weight.mul_(spread)
            self.scores.weight[:, :2] = -20  # never pads or starts

    def forward(self, source, prefix):
        powers = WORDS ** torch.arange(prefix.shape[1])
        return self.scores(source * WORDS ** (LENGTH + 1) + (prefix * powers).cumsum(1))


def corpus() -> torch.Tensor:
    return torch.arange(SOURCES)[:, None]


def sequences():
    """All that can be written: ended, or cut after LENGTH words."""
    for count in range(LENGTH + 1):
        for words in itertools.product((3, 4, 5), repeat=count):
            yield words if count == LENGTH else (*words, END)


def log_probabilities(model) -> dict[tuple[int, ...], torch.Tensor]:
    """Of every sequence, for every source, word by word."""
    found = {}
    for words in sequences():
        total = torch.zeros(SOURCES)
        for j, word in enumerate(words):
            prefix = torch.tensor([[1, *words[:j]]]).expand(SOURCES, -1)
            total = total + model(corpus(), prefix)[:, -1].log_softmax(1)[:, word]
        found[words] = total.detach()
    return found


def divergence(teacher, student) -> float:
    q, p = log_probabilities(teacher), log_probabilities(student)
    return float(sum(q[w].exp() * (q[w] - p[w]) for w in q).mean())


def search(model, beams: int, penalty: float = 0.0):
    def following(prefix):
        return model(corpus().repeat_interleave(beams, 0), prefix)[:, -1].log_softmax(1)

    with torch.no_grad():
        start = torch.ones(SOURCES, dtype=torch.long)
        return beam_search(following, start, beams=beams, length=LENGTH, end=END, pad=0, penalty=penalty)


def greedy(model) -> list[tuple[int, ...]]:
    written = []
    for source in corpus():
        words = []
        while len(words) < LENGTH and END not in words:
            words.append(int(model(source[None], torch.tensor([[1, *words]]))[0, -1].argmax()))
        written.append(tuple(words))
    return written


def stripped(rows) -> list[tuple[int, ...]]:
    return [tuple(w for w in row if w) for row in rows.tolist()]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_with_beams_for_all_sequences_the_search_is_exact(penalty):
    teacher = Table(1.5)
    words, scores = search(teacher, 60, penalty)
    every = log_probabilities(teacher)
    for s in range(SOURCES):
        ranked = sorted(every, key=lambda w: -float(every[w][s]) / len(w) ** penalty)
        assert stripped(words[s, :5]) == ranked[:5]
        wanted = torch.stack([every[w][s] / len(w) ** penalty for w in ranked[:5]])
        torch.testing.assert_close(scores[s, :5], wanted, rtol=1e-4, atol=1e-5)


def test_one_beam_is_greedy_and_more_find_what_is_more_probable():
    teacher = Table(1.5)
    one, five = search(teacher, 1), search(teacher, 5)
    assert stripped(one[0][:, 0]) == greedy(teacher)
    assert (five[1][:, 0] >= one[1][:, 0] - 1e-6).all()
    assert stripped(five[0][:, 0]) != greedy(teacher)
    assert (five[1][:, :-1] >= five[1][:, 1:]).all()


def given(labels=None, **options) -> Task:
    """One batch of all sources."""
    prefix = torch.ones(SOURCES, 1, dtype=torch.long)
    batch = (corpus(), prefix, None)
    if labels is not None:
        batch = (corpus(), torch.cat([prefix, labels[:, :-1]], 1), labels)
    return Task(train=[batch], valid=[], **options)


def drawn(teacher, count: int) -> torch.Tensor:
    """Sequences of the teacher's distribution, padded, (count, sources, LENGTH)."""
    words = torch.ones(count, SOURCES, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(LENGTH):
            scores = teacher(corpus().repeat(count, 1), words.flatten(0, 1))[:, -1]
            after = torch.multinomial(scores.softmax(1), 1).view(count, SOURCES, 1)
            words = torch.cat([words, after.masked_fill((words[..., 1:] == END).any(2, keepdim=True), 0)], 2)
            words[..., -1] = words[..., -1].masked_fill(words[..., -2] == 0, 0)
    return words[..., 1:]


def test_sequence_level_learns_the_mode_alone_and_its_student_needs_no_beam():
    teacher, student = Table(1.5), Table(0.1)
    before = divergence(teacher, student)
    entry("sequence_kd")(
        student, given(teacher=teacher), longest=LENGTH, epochs=60, finetune=0, lr=0.3
    )  # no labels: the sources are enough
    best = search(teacher, 5)[0][:, 0]
    every = log_probabilities(student)
    likelihood = torch.stack([every[words][s] for s, words in enumerate(stripped(best))])
    assert float(-likelihood.mean()) < 0.05
    assert divergence(teacher, student) > before
    assert greedy(student) == stripped(search(student, 5)[0][:, 0]) == stripped(best)


def test_word_level_on_prefixes_of_the_teacher_brings_the_distributions_together():
    teacher, student = Table(1.5), Table(0.1)
    before = divergence(teacher, student)
    batches = [given(words).train[0] for words in drawn(teacher, 40)]
    task = Task(train=batches, valid=[], teacher=teacher)
    entry("sequence_kd")(student, task, targets="gold", alpha=1.0, epochs=0, finetune=3, lr=0.1)
    assert divergence(teacher, student) < 0.2 * before


def test_batches_of_padding_alone_teach_nothing():
    logits = torch.randn(2, 3, WORDS, requires_grad=True)
    nothing = torch.full((2, 3), IGNORED)
    loss = negative_log_likelihood(logits, nothing) + word_kd(logits, logits, nothing != IGNORED)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_a_certain_teacher_is_the_likelihood_of_its_words():
    labels = torch.randint(WORDS, (4, 5))
    certain = 1e4 * F.one_hot(labels, WORDS).float()
    student = torch.randn(4, 5, WORDS)
    counted = torch.ones(4, 5, dtype=torch.bool)
    torch.testing.assert_close(word_kd(student, certain, counted), negative_log_likelihood(student, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_word_level_loss(dtype):
    ours, theirs = (torch.randn(4, 5, WORDS).to(dtype).requires_grad_() for _ in range(2))
    counted = torch.rand(4, 5) < 0.6
    loss = word_kd(ours, theirs, counted)
    slow = [
        -(t.float().softmax(0) * s.float().log_softmax(0)).sum()
        for s, t in zip(ours[counted], theirs[counted], strict=True)
    ]
    torch.testing.assert_close(loss, sum(slow) / len(slow))
    loss.backward()
    assert theirs.grad is None
    assert torch.isfinite(ours.grad).all()
    assert ours.grad[~counted].eq(0).all()
    order = torch.randperm(4)
    torch.testing.assert_close(word_kd(ours[order], theirs[order], counted[order]), loss)
    entropy = word_kd(theirs, theirs, counted)
    assert float(entropy.detach()) < float(loss.detach())
    own = -(theirs.float().softmax(-1) * theirs.float().log_softmax(-1)).sum(-1)[counted].mean()
    torch.testing.assert_close(entropy, own)


def test_both_terms_are_mixed_and_padding_is_left_out():
    steps = []
    task = writing_task(teacher=Writer().eval(), fit=watched(steps))
    student = Writer().eval()
    source, prefix, labels = task.train[0]
    labels = labels.clone()
    labels[:, 3] = 0
    task = replace(task, train=[(source, prefix, labels)])
    entry("sequence_kd")(student, task, targets="gold", alpha=0.25, epochs=0)
    (step, _), batch = steps[0], ((source, prefix), {}, labels.masked_fill(labels == 0, IGNORED))
    with torch.no_grad():
        terms = step(student, batch, 0.0)
        p, q = student(source, prefix)[:, :3].log_softmax(2), task.teacher(source, prefix)[:, :3].softmax(2)
        likelihood = p.gather(2, labels[:, :3, None]).mean()
    torch.testing.assert_close(terms["sequence"], -0.75 * likelihood)
    torch.testing.assert_close(terms["words"], -0.25 * (q * p).sum(2).mean())
    assert taught_step(task.teacher, task, 0.0)(student, (source, prefix, labels), 0.0).keys() == {"sequence"}


def test_bleu_by_hand_and_the_nearest_of_the_beams():
    assert sentence_bleu([4, 5, 6, 7, 8], [4, 5, 6, 7, 8]) == 1.0
    assert sentence_bleu([9], [4, 5]) == 0.0
    wanted = (3 / 4 * (1 + 1) / (3 + 1) * 1 / 3 * 1 / 2) ** 0.25  # 4 5 | 7: three words, one pair in common
    assert sentence_bleu([4, 5, 9, 7], [4, 5, 6, 7]) == pytest.approx(wanted)
    assert sentence_bleu([4, 5], [4, 5, 6, 7]) == pytest.approx(math.exp(-1))
    one = Written((corpus(), torch.ones(1, 4)), {}, torch.tensor([[4, 5, 6, 2]]))
    beams = torch.tensor([[[4, 7, 2, 0], [4, 5, 2, 0], [6, 6, 6, 2]]])
    assert nearest(one, beams, 0).tolist() == [[4, 5, 2, 0]]


def test_the_stages_follow_one_another_and_the_teacher_stays_as_it_was():
    teacher = Writer()
    held, stages = copy.deepcopy(teacher.state_dict()), []

    def keep(model, task, **options):
        stages.append((options["label"], options["lr"], [labels for _, _, labels in task.train]))
        return model

    with recording() as ledger:
        entry("sequence_kd")(Writer(), writing_task(teacher=teacher, fit=keep), lr=0.1)
    assert [(label, pytest.approx(lr)) for label, lr, _ in stages] == [("Seq-KD", 0.1), ("interpolation", 0.01)]
    assert any("the teacher wrote 96 sequences" in text for text in ledger.notes)
    assert all(len(labels) == 32 for _, _, batches in stages for labels in batches)
    assert all(torch.equal(held[k], v) for k, v in teacher.state_dict().items())
    assert teacher.training


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_each_stage_learns_the_sequences_that_it_says(penalty):
    teacher, stages = Table(1.5), {}
    beams = search(teacher, 5, penalty)[0]
    gold = F.pad(beams[:, 2], (0, 1))  # what the teacher writes third: it is itself the nearest

    def keep(model, task, **options):
        ((_, _, labels),) = task.train
        stages[options["label"]] = [tuple(w for w in row if w != IGNORED) for row in labels.tolist()]
        return model

    task = given(gold, teacher=teacher, fit=keep)
    for targets in ("interpolation", "beam", "gold"):
        entry("sequence_kd")(Table(0.1), task, targets=targets, longest=LENGTH, penalty=penalty)
    first, third = stripped(beams[:, 0]), stripped(beams[:, 2])
    assert stages == {"Seq-KD": first, "interpolation": third, "beam": first, "gold": third}
    assert first != third
    assert first != stripped(search(teacher, 5, 2.0 - penalty)[0][:, 0])


def test_the_teacher_writes_half_as_much_again_as_the_labels_and_what_is_cut_is_counted():
    class Endless(Table):
        def forward(self, source, prefix):
            longest.append(prefix.shape[1])
            scores = super().forward(source, prefix % 2 + 3)
            ends = 40.0 * (source[:, :1, None] > 5).expand(-1, scores.shape[1], 1)  # two of eight end at once
            return torch.cat([scores[..., :2], ends - 20, scores[..., 3:]], 2)

    longest: list[int] = []
    gold = torch.full((SOURCES, 2), 3)
    with recording() as ledger:
        keep = given(gold, teacher=Endless(1.0), fit=lambda model, task, **options: model)
        entry("sequence_kd")(Table(0.1), keep, finetune=0)
    assert max(longest) == 1 + int(1.5 * 2), "the first word, and three more before the last"
    assert "6 of them had not ended after 4 words and are cut there" in ledger.notes


@pytest.mark.filterwarnings("ignore")  # transformers warns of its own deprecations
def test_transformers_write_what_their_own_search_writes():
    import transformers

    transformers.logging.set_verbosity_error()

    def t5(width):
        config = transformers.T5Config(
            vocab_size=20, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
            eos_token_id=1, pad_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).eval()

    teacher, student = t5(16), t5(8)
    with torch.no_grad():
        teacher.lm_head.weight.normal_(0, 1)
    ids = torch.randint(2, 20, (3, 5))
    mask = torch.tensor([[1] * 5, [1] * 5, [1, 1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.zeros(3, 1, dtype=torch.long)}
    task = Task(
        train=[batch], valid=[], teacher=teacher, split=lambda b: (*b, None) if isinstance(b, tuple) else ((), b, None)
    )
    one = Written((), batch, None)
    (mine,) = decoded(teacher, task, [one], beams=3, penalty=0.0, length=6, end=1, pad=0)
    theirs = teacher.generate(
        input_ids=ids, attention_mask=mask, num_beams=3, length_penalty=0.0, max_new_tokens=6, early_stopping="never",
        do_sample=False,
    )[:, 1:]  # fmt: skip
    assert torch.equal(F.pad(theirs, (0, 6 - theirs.shape[1])), mine[:, 0])
    before = copy.deepcopy(student.state_dict())
    task = Task(train=[batch], valid=[], teacher=teacher)
    entry("sequence_kd")(student, task, end_token=1, longest=6, targets="beam", epochs=1, finetune=1)
    assert any(not torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_bad_input():
    run, task = entry("sequence_kd"), writing_task(teacher=Writer())
    with pytest.raises(BadData, match="choose kd"):
        run(small_mlp(), small_task(teacher=small_mlp()))
    bare = replace(task, train=[(*batch[:2], None) for batch in task.train])
    with pytest.raises(MissingNeed, match="pass targets='beam'"):
        run(Writer(), bare)
    with pytest.raises(BadOption, match="scores 12 words, and 12 is none of them"):
        run(Writer(), task, end_token=12)
    with pytest.raises(BadOption, match="never learn to end"):
        run(Writer(), task, end_token=2, pad_token=2)
    with pytest.raises(BadOption, match="both must score the same words"):
        run(Writer(13), task, epochs=0, targets="gold")
    with pytest.raises(BadData, match="the training data are empty"):
        run(Writer(), replace(task, train=[]))
    flat = nn.Bilinear(3, 4, 5)
    with pytest.raises(BadData, match=r"puts out \(32, 5\) for prefixes \(32, 4\)"):
        run(Writer(), replace(task, teacher=Flat(flat)))


class Flat(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, source, prefix):
        return self.inner(source.float(), prefix.float())
