"""Train the base networks that the benchmarks start from: `python benchmarks/train_base.py [NAME ...]`.

Every recipe below becomes `benchmarks/base/<name>.safetensors`, with the recipe, the accuracy and the versions in the
file's metadata, and one row of `benchmarks/base/README.md`. What is there already is left alone, so a run that was
stopped goes on with the first network that is missing. Choices between recipes are made on valid; test is told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from featherweight import zoo
from featherweight.core.fit import fit
from featherweight.core.task import evaluate
from featherweight.errors import unknown

BASE = Path(__file__).parent / "base"


@dataclass(frozen=True)
class Recipe:
    """How one base network is trained: SGD with Nesterov momentum 0.9 and weight decay 5e-4, cosine to zero."""

    network: str
    data: str
    epochs: int
    lr: float
    seed: int = 0
    batch_size: int = 128
    augment: str | None = None
    channels_last: bool = False


def lenets(network: str, epochs: int, lr: float, *, channels_last: bool = False) -> dict[str, Recipe]:
    """Three seeds of a network on MNIST, without augmentation, as the pruning papers' baselines."""
    return {
        f"{network}_mnist_seed{seed}": Recipe(network, "mnist", epochs, lr, seed=seed, channels_last=channels_last)
        for seed in range(3)
    }


RECIPES = {
    "resnet20_half_fashion_mnist": Recipe(
        "resnet20_half", "fashion_mnist", epochs=16, lr=0.1, augment="shift+flip", channels_last=True
    ),
    **lenets("lenet300", epochs=40, lr=0.1),
    **lenets("lenet5", epochs=25, lr=0.05, channels_last=True),
    "vgg_fashion_mnist": Recipe("vgg", "fashion_mnist", epochs=6, lr=0.1, augment="shift+flip", channels_last=True),
    "resnet20_fashion_mnist": Recipe(
        "resnet20", "fashion_mnist", epochs=6, lr=0.1, augment="shift+flip", channels_last=True
    ),
    "mobilenet_v2_fashion_mnist": Recipe(
        "mobilenet_v2:halvings=3", "fashion_mnist", epochs=5, lr=0.1, augment="shift+flip", channels_last=True
    ),
    **{  # the teachers of `distillation.py`
        f"resnet32_half_fashion_mnist_seed{seed}": Recipe(
            "resnet:depth=32,width=0.5",
            "fashion_mnist",
            epochs=3,
            lr=0.1,
            seed=seed,
            augment="shift+flip",
            channels_last=True,
        )
        for seed in range(3)
    },
}


def train(name: str, recipe: Recipe) -> None:
    """Train one network and write its file, whole or not at all."""
    torch.manual_seed(recipe.seed)
    task = zoo.task(recipe.data, batch_size=recipe.batch_size, augment=recipe.augment)
    model = zoo.build(recipe.network)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it so
    started = time.perf_counter()

    def tell(epoch: int) -> None:
        taken = time.perf_counter() - started
        print(
            f"{name}: epoch {epoch}/{recipe.epochs}, {taken:.0f} s, valid {evaluate(model, task).value:.4f}", flush=True
        )

    fit(model, task, epochs=recipe.epochs, lr=recipe.lr, optimizer="sgd", before_epoch=tell, label=name)
    write(name, recipe, model, {
        "recipe": json.dumps(asdict(recipe)),
        "valid": f"{evaluate(model, task, 'valid').value:.4f}",
        "test": f"{evaluate(model, task, 'test').value:.4f}",
        "seconds": f"{time.perf_counter() - started:.0f}",
        "threads": str(torch.get_num_threads()),
        "commit": _commit(),
        "torch": torch.__version__,
    })  # fmt: skip


def write(name: str, recipe: Recipe, model: nn.Module, facts: dict[str, str]) -> None:
    """Write weights and facts through a temporary name."""
    partial = BASE / f".{name}.partial"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, partial, metadata=facts)
    partial.replace(BASE / f"{name}.safetensors")


def describe() -> str:
    """README.md of the base networks, from the metadata of the files that are there."""
    rows = []
    for path in sorted(BASE.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            facts = file.metadata()
        r = Recipe(**json.loads(facts["recipe"]))
        rows.append(
            f"| `{path.stem}` | `{r.network}` | {r.data} | {float(facts['valid']):.2%} | {float(facts['test']):.2%} "
            f"| {1 - float(facts['test']):.2%} | {r.epochs} | {r.lr} | {r.batch_size} | {r.augment or 'none'} "
            f"| {'channels last' if r.channels_last else 'plain'} | {r.seed} | {facts['seconds']} | {facts['threads']} "
            f"| {facts['torch']} | {facts['commit']} |"
        )
    return README + "\n".join(rows) + "\n"


README = """# Base networks

What the benchmarks compress. Trained once by

    make data
    OMP_NUM_THREADS=1 python benchmarks/train_base.py

which leaves alone what is here: delete a file to train it again, or name it to train no other. All are trained by
`featherweight.fit` with SGD (Nesterov momentum 0.9, weight decay 5e-4), the learning rate falling to zero along a
cosine; valid is 5,000 images held out of the 60,000, test is the test file of 10,000. The weights of the last epoch are
kept; none were chosen by test. The same facts are in the metadata of every file. Written by the script, not by hand.

Seconds are wall clock on a machine that others shared. Commit is the checkout's head when the file was written; the
first files were trained while the training loop was still being written, so training one again gives a network as good,
not the same bytes.

Load one with `zoo.build(network).load_state_dict(safetensors.torch.load_file(path))`.

| file | network | data | valid | test | test error | epochs | lr | batch | augmentation | memory | seed | seconds | threads | torch | commit |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501  # a table row cannot be broken


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=BASE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="which recipes; all when left out")
    names = parser.parse_args(argv).names or list(RECIPES)
    os.environ.setdefault("FEATHERWEIGHT_DATA", str(BASE.parents[1] / "data"))
    BASE.mkdir(exist_ok=True)
    for name in names:
        if name not in RECIPES:
            raise unknown("recipe", name, RECIPES)
        if not (BASE / f"{name}.safetensors").exists():
            train(name, RECIPES[name])
            (BASE / "README.md").write_text(describe(), encoding="utf-8")


if __name__ == "__main__":
    main()
