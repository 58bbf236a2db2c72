"""The smallest LeNets: training whose budget is the size of the file, `python benchmarks/smallest.py [ROW ...]`.

Every row is a size in bytes and an error on MNIST's test set that a bare file of this size is to stay below, on three
seeds. A network with LeNet-5's graph and fewer units is trained in float for a few epochs, then with its integers and
the bits of their code in the loss (`entropy_penalized`); LeNet-300-100 starts from `base/`, and is only rounded
(`smallest`) where it has no epochs. A share of the loss may be a teacher's, LeNet-5 of full width. Images are the
55,000 of the training part, some of them deformed a little: rotated, scaled, sheared, shifted and bent, in a fixed set
of copies whose teacher's scores are taken once. Choices were made on the 5,000 of valid. The file is written, read back
into a fresh network, and that is tested once. A row and seed that is in `results/smallest.json` is left alone;
`--again` measures it anew.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from convpool import fast_forward
from run import commit, read
from safetensors.torch import load_file
from torch import Tensor, nn

import featherweight as fw
from featherweight import outputs, provenance, zoo
from featherweight.core import progress
from featherweight.core.forms import bake
from featherweight.core.task import Task, evaluate
from featherweight.recipes.entropy_penalized import entropy_penalized
from featherweight.recipes.smallest import smallest
from featherweight.zoo.networks import lenet5, lenet300

HERE = Path(__file__).parent
RESULT = HERE / "results" / "smallest.json"
COPIES, TEMPERATURE = 10, 3.0
SEEDS = (0, 1, 2)
TITLE = "The smallest LeNets on MNIST: bare files, `python benchmarks/smallest.py`"


@dataclass(frozen=True)
class Row:
    """What a file is to be, and how it is trained. `deformed` is the share of images that are drawn from the copies.

    `taught` is the share of the loss that is the divergence from the teacher at temperature 3.
    """

    network: str
    widths: tuple[int, ...]
    file_bytes: int
    error: float
    epochs: float
    source: str
    deformed: float = 0.8
    taught: float = 0.5
    lr: float = 0.08
    rate: float = 5e-5
    levels: float = 2.0
    batch_size: int = 128
    float_epochs: float = 3


LENET5 = {
    "lenet5_3030": Row("lenet5", (8, 16, 32), 3030, 0.69, 14, "Havasi et al. 2019 (MIRACLE)"),
    "lenet5_1520": Row("lenet5", (6, 12, 24), 1520, 0.96, 14, "Havasi et al. 2019 (MIRACLE)"),
    "lenet5_860": Row("lenet5", (6, 12, 24), 860, 0.80, 14, "goal: 2,000 times smaller"),
    "lenet5_430": Row("lenet5", (6, 12, 24), 430, 1.00, 14, "goal: 4,000 times smaller"),
}
LENET300 = {
    "lenet300_8560": Row("lenet300", (300, 100), 8560, 1.9, 0, "published", deformed=0.0),
    "lenet300_2100": Row("lenet300", (300, 100), 2100, 1.9, 30, "goal: 500 times smaller", deformed=0.5),
}
ROWS = LENET5 | LENET300


# --- images and a teacher ---------------------------------------------------------------------------------------------


def deform(x: Tensor, draw: torch.Generator) -> Tensor:
    """Images (n, 1, 28, 28): rotated by up to 7 degrees, scaled by 6 %, sheared by 0.07, shifted by a pixel, bent."""
    n = len(x)

    def within(most: float) -> Tensor:
        return (torch.rand(n, generator=draw) * 2 - 1) * most

    turn, wide, high, shear = within(math.radians(7)), 1 + within(0.06), 1 + within(0.06), within(0.07)
    first = torch.stack([turn.cos() / wide, (shear - turn.sin()) / wide, within(1 / 14)], 1)
    second = torch.stack([turn.sin() / high, turn.cos() / high, within(1 / 14)], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), [n, 1, 28, 28], align_corners=False)
    bent = torch.randn(n, 2, 4, 4, generator=draw) * 0.4 / 14
    grid = grid + F.interpolate(bent, 28, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, align_corners=False)


def copies() -> tuple[Tensor, Tensor]:
    """Images (copies, n, 1, 28, 28) uint8, the first of them as they are, and labels (n,)."""
    train = zoo.task("mnist").train
    draw = torch.Generator().manual_seed(123)
    made = [train.x]
    for _ in range(COPIES - 1):
        parts = [deform(part.float(), draw).round().clamp(0, 255).to(torch.uint8) for part in train.x.split(5000)]
        made.append(torch.cat(parts))
    return torch.stack(made), train.y


def normalised(x: Tensor) -> Tensor:
    return (x.float() / 255 - 0.1307) / 0.3081


@dataclass
class Shown:
    """Batches of images, each with its label and the teacher's ten scores as a target of eleven numbers."""

    x: Tensor
    y: Tensor
    scores: Tensor | None
    deformed: float
    batch_size: int

    def __len__(self) -> int:
        return math.ceil(len(self.y) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.y)).split(self.batch_size):
            drawn = torch.randint(len(self.x), (len(index),))
            which = torch.where(torch.rand(len(index)) < self.deformed, drawn, 0)
            x, y = normalised(self.x[which, index]), self.y[index]
            yield x, y if self.scores is None else torch.cat([y[:, None].float(), self.scores[which, index].float()], 1)


def beside(taught: float, output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, and in its place for a share the divergence from the teacher at temperature 3, times nine."""
    labels, scores = target[:, 0].long(), target[:, 1:]
    loss = F.cross_entropy(output, labels)
    if not taught:
        return loss
    wanted = F.log_softmax(scores / TEMPERATURE, 1)
    gap = F.kl_div(F.log_softmax(output / TEMPERATURE, 1), wanted, reduction="batchmean", log_target=True)
    return (1 - taught) * loss + taught * TEMPERATURE**2 * gap


def teacher(x: Tensor, y: Tensor) -> Tensor:
    """The scores (copies, n, 10) of LeNet-5, trained on for seven epochs on all copies; kept in `cache/`."""
    kept = HERE / "cache" / "smallest_teacher.pt"
    if kept.exists():
        return torch.load(kept)
    torch.manual_seed(0)
    model = zoo.build("lenet5")
    model.load_state_dict(load_file(HERE / "base" / "lenet5_mnist_seed0.safetensors"))
    model = model.to(memory_format=torch.channels_last)
    fw.fit(
        model,
        replace(zoo.task("mnist"), train=Shown(x, y, None, 1.0, 128)),
        epochs=7,
        lr=0.02,
        optimizer="sgd",
        label="teacher",
    )
    progress.say(f"teacher: {evaluate(model, zoo.task('mnist')).value:.2%} on valid")
    with torch.no_grad():
        scores = torch.stack([torch.cat([model(normalised(p)) for p in one.split(1000)]) for one in x])
    kept.parent.mkdir(exist_ok=True)
    torch.save(scores.half(), kept)
    return scores.half()


# --- one file ---------------------------------------------------------------------------------------------------------


def network(row: Row) -> nn.Module:
    return lenet5(widths=row.widths) if row.network == "lenet5" else lenet300(hidden=row.widths)


def one(name: str, row: Row, seed: int, data: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Trains and writes one file; what it is read back as is tested once."""
    start, task = time.time(), zoo.task("mnist")
    torch.manual_seed(seed)
    model = network(row)
    if row.network == "lenet5":
        model.forward = partial(fast_forward, model)  # type: ignore[method-assign]
    train = Shown(*data, row.deformed, row.batch_size)
    shown = Task(train=train, valid=task.valid, calibration=task.calibration, loss=partial(beside, row.taught))
    if row.network == "lenet5":
        fw.fit(model, shown, epochs=row.float_epochs, lr=4e-3, label="float")
    else:
        model.load_state_dict(load_file(HERE / "base" / f"lenet300_mnist_seed{seed}.safetensors"))
    in_float, within = evaluate(model, task), f"size<={row.file_bytes}B"
    if row.epochs:
        options = {"epochs": row.epochs, "lr": row.lr, "rate": row.rate, "levels": row.levels}
        entropy_penalized(model, shown, within=within, **options)
    else:
        model = smallest(model, task, within=within)
    bake(model)
    model.__dict__.pop("forward", None)
    path = HERE / "cache" / f"{name}_seed{seed}.fw"
    size = fw.save(model, path, bare=True, coder="context_mixing").bytes
    again = fw.load(path, into=network(row))
    valid, test = evaluate(again, task), evaluate(again, replace(task, valid=task.test))
    return {
        "row": name, "seed": seed, "asked": asdict(row), "bytes": path.stat().st_size, "written": size,
        "float_valid_error": 100 * (1 - in_float.value), "valid_error": 100 * (1 - valid.value),
        "test_error": 100 * (1 - test.value), "holds": path.stat().st_size <= row.file_bytes
        and 100 * (1 - test.value) <= row.error + 1e-9, "seconds": round(time.time() - start), "commit": commit(),
    }  # fmt: skip


def tabled(row: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a result."""
    asked = row["asked"]
    units = "-".join(str(width) for width in asked["widths"])
    errors = {f"{part} error, %": round(row[f"{part}_error"], 2) for part in ("valid", "test")}
    wanted = {"at most bytes": asked["file_bytes"], "at most error, %": asked["error"], "of": asked["source"]}
    held = {"both hold": "yes" if row["holds"] else "no", "epochs": asked["epochs"], "seconds": row["seconds"]}
    return {
        "network": f"{asked['network']}, {units}",
        "seed": row["seed"],
        **wanted,
        "bytes": row["bytes"],
        **errors,
        **held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all when left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    given = parser.parse_args()
    if unknown := set(given.rows) - set(ROWS):
        parser.error(f"{', '.join(sorted(unknown))}: choose rows of {', '.join(ROWS)}")
    torch.set_num_threads(1)
    with progress.showing(True):
        x, y = copies()
        data = (x, y, teacher(x, y))
        for name in given.rows or ROWS:
            for seed in given.seeds:
                result = read(RESULT) or {"rows": []}
                before = [r for r in result["rows"] if (r["row"], r["seed"]) == (name, seed)]
                if before and not given.again:
                    continue
                row = one(name, ROWS[name], seed, data)
                progress.say(f"{name}, seed {seed}: {row['bytes']} bytes, valid {row['valid_error']:.2f} % wrong")
                result = read(RESULT) or {"rows": []}
                rows = [r for r in result["rows"] if (r["row"], r["seed"]) != (name, seed)]
                rows = sorted([*rows, row], key=lambda r: (r["row"], r["seed"]))
                told = {"title": TITLE, "table": [tabled(r) for r in rows], "rows": rows}
                outputs.write_json(RESULT, told | {"environment": provenance.environment()})


if __name__ == "__main__":
    main()
