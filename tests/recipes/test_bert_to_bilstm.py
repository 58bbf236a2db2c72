"""Tang et al. 2019: sentences changed as often as said, one teacher with pieces of its own, logits of both the same."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import Batches, Sentences, small_cnn, small_task, token_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import Task, evaluate
from featherweight.core.words import Pieces, Vocabulary, changed, induced_classes, packed, sentences
from featherweight.errors import BadData, BadOption, MissingNeed
from featherweight.zoo.text import BiLstm
from matches import watched

VOCABULARY = Vocabulary(pad=0, mask=1, special=(2, 3))
CLASSES = torch.tensor([0, 0, 0, 0, *[1] * 6, *[2] * 10])
COUNTS = torch.tensor([0, 0, 0, 0, *[6] * 5, 0, *range(10, 20)])


def sentence(n: int = 4000) -> torch.Tensor:
    """A sentence between two marks, one of its words of class 2, padded; many times."""
    return torch.tensor([[2, 4, 5, 6, 12, 7, 8, 3, 0, 0]]).expand(n, -1)


def change(ids, **how):
    return changed(ids, VOCABULARY, COUNTS, CLASSES, **{"mask": 0.0, "swap": 0.0, "ngram": 0.0, "longest": 5, **how})


def test_words_are_hidden_or_swapped_as_often_as_said_and_nothing_else_changes():
    ids = sentence()
    assert torch.equal(change(ids), ids)
    made = change(ids, mask=0.1, swap=0.3)
    words = VOCABULARY.words(ids)
    assert torch.equal(made[~words], ids[~words])
    hidden = (made == 1) & words
    assert float(hidden.sum() / words.sum()) == pytest.approx(0.1, abs=0.01)
    swapped = (made[:, 4] != 1).float().mean()
    assert float(swapped) == pytest.approx(0.9, abs=0.02)
    assert torch.equal(CLASSES[made[words & ~hidden]], CLASSES[ids[words & ~hidden]])


def test_swapped_words_are_drawn_from_their_class_as_often_as_they_stand_in_the_data():
    drawn = change(sentence(), swap=1.0)
    of_one = torch.bincount(drawn[:, 4], minlength=20)
    assert int(of_one[:10].sum()) == 0
    torch.testing.assert_close(of_one[10:] / 4000, COUNTS[10:] / COUNTS[10:].sum(), atol=0.025, rtol=0)
    assert int((drawn[:, 1] == 9).sum()) == 0  # of the class, but nowhere in the data


def test_an_ngram_is_one_to_five_neighbours_between_the_marks():
    made = change(sentence(), ngram=1.0)
    lengths = VOCABULARY.words(made).sum(1)
    for length, share in zip(range(1, 6), (lengths == torch.arange(1, 6)[:, None]).float().mean(1), strict=True):
        assert float(share) == pytest.approx(0.2, abs=0.03), length
    text = "2 4 5 6 12 7 8 3"
    for row in made[:200].tolist():
        kept = [str(word) for word in row if word]
        assert kept[0] == "2"
        assert kept[-1] == "3"
        assert " ".join(kept[1:-1]) in text
        assert row[len(kept) :] == [0] * (10 - len(kept))
    some = change(sentence(), ngram=0.25)
    assert float((VOCABULARY.words(some).sum(1) < 6).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert change(torch.zeros(3, 4, dtype=torch.long), mask=0.5, swap=0.5, ngram=1.0).eq(0).all()


def test_induced_classes_are_those_of_a_grammar():
    draws = torch.Generator().manual_seed(2)
    words = [torch.randint(4 + 10 * k, 14 + 10 * k, (3000,), generator=draws) for k in range(3)]
    found = induced_classes(torch.stack(words, 1), VOCABULARY, 34, 3)[4:].view(3, 10)
    assert (found == found[:, :1]).all()
    assert len(found[:, 0].unique()) == 3


def test_frequent_and_rare_words_of_a_class_go_together_and_words_that_are_never_seen_have_none():
    """Neighbours count in proportion: Zipf's law would else set the frequent words apart."""
    draws = torch.Generator().manual_seed(2)
    often = 1 / torch.arange(1.0, 11) ** 1.5
    words = [4 + 10 * k + torch.multinomial(often, 6000, replacement=True, generator=draws) for k in range(3)]
    found = induced_classes(torch.stack(words, 1), VOCABULARY, 60, 3)
    assert (found[4:34].view(3, 10) == found[4:34:10, None]).all()
    assert len(found[4:34:10].unique()) == 3
    assert (found[34:] == 0).all()


def test_words_outside_the_attention_mask_are_padding_to_the_networks_too():
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "labels": torch.tensor([0, 1]),
    }
    found, _ = sentences(Task(train=[batch], valid=[]), [batch], 0, "this", "that")
    assert found.parts[0].tolist() == [[5, 6, 7, 0], [9, 5, 0, 0]]
    _, given, _ = replace(found, fixed=False).batch(torch.tensor([1, 0]))
    assert given["input_ids"].tolist() == [[9, 5, 0], [5, 6, 7]]
    assert given["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_pieces_are_looked_up_and_cut():
    table = torch.tensor([[0, 0], [9, 0], [5, 6], [7, 0]])

    def seen(input_ids, attention_mask):
        return input_ids, attention_mask

    class Seen(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return seen(input_ids, attention_mask)

    reader = Pieces(Seen(), table, front=(1,), back=(2,), length=6)
    ids, mask = reader(torch.tensor([[2, 3, 0], [1, 0, 0]]))
    assert ids.tolist() == [[1, 5, 6, 7, 2], [1, 9, 2, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert reader(torch.tensor([[2, 2, 2, 3]]))[0].tolist() == [[1, 5, 6, 5, 6, 2]]
    assert reader(torch.tensor([[2, 3]]), torch.tensor([[1, 0]]))[0].tolist() == [[1, 5, 6, 2]]
    assert packed(torch.tensor([[1, 2]]), torch.tensor([[False, False]]), 0).tolist() == [[0, 0]]


def test_padding_changes_nothing_in_the_bilstm():
    model = BiLstm(50, 3).eval()
    whole = torch.tensor([[4, 7, 9, 5]])
    torch.testing.assert_close(model(F.pad(whole, (0, 3))), model(whole))
    ahead, back = model.ahead(model.embedding(whole))[0][:, -1], model.back(model.embedding(whole.flip(1)))[0][:, -1]
    torch.testing.assert_close(model(whole), model.head(model.inner(torch.cat([ahead, back], 1)).relu()))


def test_minimises_the_labels_and_the_squared_distance_of_logits():
    steps, given = [], token_task()
    teacher = Sentences().eval()
    fits = watched(steps)
    data = []

    def keep(model, task, **options):
        data.append(task.train)
        return fits(model, task, **options)

    task = replace(given, teacher=teacher, fit=keep)
    student = Sentences(width=8).eval()
    entry("bert_to_bilstm")(student, task, alpha=0.3, copies=3)
    assert len(data[0].parts[0]) == 4 * 96
    assert torch.equal(data[0].parts[0][:96], given.train.x)
    assert torch.equal(data[0].beside[0][:96], given.train.y)
    batch = next(iter(data[0]))
    (ids,), _, (labels, _) = batch
    with torch.no_grad():
        z, shown = student(ids), teacher(ids)
        terms = steps[0][0](student, batch, 0.0)
        wanted = 0.7 * (z - shown).square().sum(1).mean()
        torch.testing.assert_close(terms["logits"], wanted)
        torch.testing.assert_close(terms["labels"], 0.3 * F.cross_entropy(z, labels))
        same = steps[0][0](teacher, batch, 0.0)
    assert float(same["logits"]) == 0
    with torch.no_grad():
        made = data[0].parts[0][96:]
        assert torch.equal(data[0].beside[0][96:], teacher(made).argmax(1))


def bert():
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=4,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def taught():
    """A small BERT that has learned sentences of three to six words, as dictionaries."""
    torch.manual_seed(0)
    plain = token_task(n=256)
    x = torch.cat([plain.train.x, plain.valid.x]).clamp_min(1)
    x[::3, 5] = 0
    y = torch.cat([plain.train.y, plain.valid.y])
    batches = [{"input_ids": a, "attention_mask": (a != 0).long(), "labels": b} for a, b in Batches(x, y)]
    task = Task(train=batches[:6], valid=batches[6:])
    return fit(bert(), task, epochs=20, lr=1e-2).eval(), task


def test_a_bilstm_learns_from_bert_without_labels(taught):
    teacher, task = taught
    held = copy.deepcopy(teacher.state_dict())
    bare = [{key: value for key, value in batch.items() if key != "labels"} for batch in task.train]
    student = BiLstm(60, 4, width=16, hidden=12, inner=12)
    before = evaluate(student, task).value
    learned = entry("bert_to_bilstm")(student, replace(task, train=bare, teacher=teacher), copies=4, epochs=5, lr=2e-2)
    assert evaluate(teacher, task).value > 0.75
    assert evaluate(learned, task).value > max(0.6, before + 0.2)
    assert all(torch.equal(held[k], v) for k, v in teacher.state_dict().items())
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_pairs_change_in_turn():
    ids = torch.randint(4, 20, (6, 5))
    steps, data = [], []

    class Pairs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = Sentences(20)

        def forward(self, a, b):
            return self.one(a) - self.one(b)

    def keep(model, task, **options):
        data.append(task.train)
        return watched(steps)(model, task, **options)

    task = Task(train=[(ids, ids, torch.zeros(6).long())], valid=[], teacher=Pairs(), fit=keep)
    entry("bert_to_bilstm")(Pairs(), task, copies=3, mask=1.0, swap=0.0, ngram=0.0)
    first, second = (part.view(4, 6, 5) for part in data[0].parts)
    assert [bool((one == 1).all()) for one in first] == [False, True, False, True]
    assert [bool((one == 1).all()) for one in second] == [False, False, True, True]


def test_words_change_as_the_options_say():
    data = []

    def keep(model, task, **options):
        data.append(task.train.parts[0][96:])
        return model

    given = token_task()
    task, classes = replace(given, teacher=Sentences(72), fit=keep), [word % 4 for word in range(72)]
    words = {"pad_token": 70, "mask_token": 71, "copies": 1, "mask": 0.0, "swap": 0.0, "ngram": 0.0}
    for how in ({"swap": 1.0, "word_classes": classes}, {"ngram": 1.0, "longest": 2}):
        entry("bert_to_bilstm")(Sentences(72), task, **{**words, **how})
    swapped, cut = data
    assert torch.equal(swapped % 4, given.train.x % 4)
    assert float((swapped == given.train.x).float().mean()) < 0.3
    assert set((cut != 70).sum(1).tolist()) == {1, 2}


def test_bad_input():
    task = replace(token_task(), teacher=Sentences())
    run = entry("bert_to_bilstm")
    with pytest.raises(BadOption, match="together at most 1"):
        run(Sentences(), task, mask=0.6, swap=0.6)
    with pytest.raises(BadOption, match="both must score the same classes"):
        run(Sentences(classes=5), task, copies=0, epochs=1)
    with pytest.raises(BadData, match=r"not torch.float32 \(32, 1, 8, 8\): choose logit_regression"):
        run(small_cnn(), small_task(teacher=small_cnn()))
    with pytest.raises(MissingNeed, match="alpha > 0 needs labels"):
        run(Sentences(), replace(task, train=[(x,) for x, _ in task.train]), alpha=0.5)
    with pytest.raises(BadData, match="word_classes has 5 entries, words have numbers up to 59"):
        run(Sentences(), task, word_classes=[0] * 5)
    for networks, name in (((Sentences(60), Sentences(72)), "model"), ((Sentences(72), Sentences(60)), "teacher")):
        with pytest.raises(BadOption, match=f"mask_token=70 is none of the words that the {name} knows"):
            run(networks[0], replace(task, teacher=networks[1]), mask_token=70)
        run(networks[0], replace(task, teacher=networks[1]), mask_token=70, mask=0.0, copies=1, epochs=0)
    words = torch.nn.Sequential(torch.nn.Embedding(60, 4))
    with pytest.raises(BadOption, match="choose sequence_kd"):
        run(Sentences(), replace(task, teacher=words))
