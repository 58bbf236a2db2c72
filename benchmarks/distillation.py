"""The thesis and the locality preserving loss on Fashion-MNIST with few labels: `python benchmarks/distillation.py`.

    python benchmarks/train_base.py resnet32_half_fashion_mnist_seed0 ...   # the teachers
    python benchmarks/distillation.py costs memory crossover
    python benchmarks/distillation.py temperature trials --seeds 100        # choices, on valid
    python benchmarks/distillation.py thesis graphs                         # told on test

An arm is data: a method of the catalogue and its options. All arms of an experiment train the same student for equally
many epochs; those of one seed start from the same weights, see the same labels, and the same batches in the same order
with the same shifts and flips, whatever a method draws for itself. `results/distillation_NAME.json` holds a row a run,
written as soon as it is there. A run that was stopped goes on, and an arm that was changed is measured anew; two
processes may work on different seeds of one experiment.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from run import commit, mean, read
from safetensors import safe_open
from torch import Tensor, nn

from featherweight import FeatherweightError, export, figures, outputs, provenance, save, sources, zoo
from featherweight.catalogue import entry
from featherweight.core.ensemble import Ensemble
from featherweight.core.features import matched
from featherweight.core.features import outputs as shapes_of
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.surgery import taps
from featherweight.core.task import Batch, Task, evaluate
from featherweight.errors import unknown
from featherweight.ingredients.match.locality_preserving import locality
from featherweight.zoo.data import Batches

HERE = Path(__file__).parent
STUDENT = "resnet:depth=8,width=0.5"
TEACHER = "resnet:depth=32,width=0.5"
WEIGHTS = tuple(f"base/resnet32_half_fashion_mnist_seed{seed}.safetensors" for seed in range(3))
FIRST = 0.2  # share of the epochs that a first stage has


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Args:
        method: what the catalogue calls it; None trains on the task's loss alone.
        options: of the method.
        teachers: how many; several stand as an ensemble.
        stage: the option that says how many epochs the first stage has, where there is one.
        smoothing: of the labels.
        times: how many times the epochs of the other arms.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    teachers: int = 1
    stage: str | None = None
    smoothing: float = 0.0
    times: float = 1.0


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared.

    Args:
        title: what it is about.
        arms: by name; the first one is what the others are compared with.
        epochs: of every arm, over the labelled images.
        seeds: one run each of every arm.
        told: the part of the data that results are told on; valid where something is chosen.
        labels: how many labelled images there are, drawn with the seed.
        watched: whether the features are measured at the start of every epoch.
    """

    title: str
    arms: Mapping[str, Arm]
    epochs: float
    seeds: Sequence[int]
    told: str = "test"
    labels: int = 5000
    lr: float = 0.1
    batch_size: int = 128
    student: str = STUDENT
    teacher: str = TEACHER
    weights: Sequence[str] = WEIGHTS
    data: str = "fashion_mnist"
    watched: bool = False


def kd(temperature: float, alpha: float, *, squared: bool = True, teachers: int = 1) -> Arm:
    """`(1 - alpha) H(y, p_S) + alpha t^2 KL(p_T^t || p_S^t)`, or the same without t^2."""
    weight = alpha if squared else alpha / temperature**2
    settings = {"temperature": float(temperature)}
    return Arm("distill", {"labels": 1 - alpha, "weight": weight, "settings": settings}, teachers=teachers)


def locality_arm(graph: str, weight: float, normalise: str = "none", **options: Any) -> Arm:
    settings = {"graph": graph} | ({} if normalise == "none" else {"normalise": normalise})
    return Arm("locality_preserving", {"weight": weight, "settings": settings, **options})


ALONE = Arm()
SWEEP = {
    f"t={t}, alpha={a}, {'t^2' if squared else '1'}": kd(t, a, squared=squared)
    for t in (1, 2, 4, 20)
    for a in (0.5, 0.9)
    for squared in ((True, False) if t > 1 else (True,))
}
TRIALS = {
    **{f"cross_layer_matrix, {w}": Arm("cross_layer_matrix", {"weight": w}) for w in (0.01, 0.1, 1.0, 10.0)},
    **{f"fsp, {lr}": Arm("fsp", {"flow_lr": lr}, stage="flow_epochs") for lr in (1e-4, 1e-3)},
    **{f"locality_preserving, {w}": locality_arm("teacher", w) for w in (1e-5, 1e-4, 1e-3, 1e-2)},
    **{f"locality_preserving, batch_std, {w}": locality_arm("teacher", w, "batch_std") for w in (0.01, 0.1, 1.0)},
}
BEST = kd(2, 0.9)  # of the experiment temperature
EXPERIMENTS: dict[str, Experiment] = {
    "temperature": Experiment(
        "Temperature and weight of kd, with and without t^2", {"alone": ALONE} | SWEEP, 6, (100,), told="valid"
    ),
    "trials": Experiment("Weights of the other methods", {"alone": ALONE} | TRIALS, 6, (100,), told="valid"),
    "thesis": Experiment(
        "The thesis: ResNet-32 to ResNet-8, half width, 5,000 labels",
        {
            "student alone": ALONE,
            "label smoothing": Arm(smoothing=0.1),
            "kd": BEST,
            "fsp": Arm("fsp", {"flow_lr": 1e-4}, stage="flow_epochs"),
            "cross_layer_matrix": Arm("cross_layer_matrix", {"weight": 1.0}),
            "cross_layer_matrix, 0.1": Arm("cross_layer_matrix", {"weight": 0.1}),  # 1.0 lost a seed
            "chou_full": Arm("chou_full", {"feature_lr": 1e-3}, teachers=3, stage="feature_epochs"),
            "student alone, longer": Arm(times=2.5),
        },
        12,
        range(5),
    ),
    "graphs": Experiment(
        "Locality preserving: whose neighbours",
        {
            "student alone": ALONE,
            "kd": BEST,
            "teacher's neighbours": locality_arm("teacher", 1e-4),
            "same label": locality_arm("labels", 1e-4),
            "random": locality_arm("random", 1e-4),
            "student's own": locality_arm("student", 1e-4),
            "teacher's neighbours + kd": locality_arm("teacher", 1e-4, labels=0.1, soft=0.9, temperature=2.0),
        },
        12,
        range(3),
    ),
    "collapse": Experiment(
        "Locality preserving without labels",
        {
            "labels alone": ALONE,
            "labels + locality, 1e-4": locality_arm("teacher", 1e-4),
            "labels + locality, 1e-2": locality_arm("teacher", 1e-2),
            "locality alone, 1e-4": locality_arm("teacher", 1e-4, labels=0.0),
            "locality alone, 1e-2": locality_arm("teacher", 1e-2, labels=0.0),
            "locality alone, batch_std": locality_arm("teacher", 0.1, "batch_std", labels=0.0),
        },
        6,
        (0,),
        told="valid",
        watched=True,
    ),
}


@final
class Stream:
    """Batches in an order, and with shifts and flips, that a seed and the number of the pass alone decide."""

    def __init__(self, batches: Batches, seed: int) -> None:
        self.batches, self.seed, self.passes = batches, seed, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000 * self.seed + self.passes)
            drawn = list(self.batches)
        self.passes += 1
        return iter(drawn)


@cache
def whole(data: str, batch_size: int) -> Task:
    return zoo.task(data, batch_size=batch_size, augment="shift+flip")


def labelled(experiment: Experiment, seed: int) -> Task:
    """The data set with as many labels as the experiment has, drawn with the seed; valid and test are whole."""
    task = whole(experiment.data, experiment.batch_size)
    train = task.train
    assert isinstance(train, Batches)
    kept = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(seed))[: experiment.labels]
    few = Batches(train.x[kept], train.y[kept], batch_size=train.batch_size, shuffle=True, transform=train.transform)
    return replace(task, train=Stream(few, seed))


def network(spec: str, weights: str | None = None) -> nn.Module:
    model = sources.network(spec)
    if weights is not None:
        model = sources.load_weights(model, HERE / weights)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it so


def teacher(experiment: Experiment, count: int) -> nn.Module:
    """The teacher, or an ensemble of the first few."""
    members = [network(experiment.teacher, path).eval() for path in experiment.weights[:count]]
    return Ensemble(members) if count > 1 else members[0]


def run(experiment: Experiment, name: str, seed: int) -> dict[str, Any]:
    """One arm with one seed: what it came to, on the part of the data that the experiment is told on."""
    arm = experiment.arms[name]
    torch.manual_seed(seed)
    student, task = network(experiment.student), labelled(experiment, seed)
    if arm.smoothing:
        task = replace(task, loss=partial(F.cross_entropy, label_smoothing=arm.smoothing))
    if arm.method:
        task = replace(task, teacher=teacher(experiment, arm.teachers))
    seen: list[dict[str, float]] = []
    if experiment.watched:
        task = replace(task, fit=watching(seen))
    provenance.seed_everything(seed, 0)
    started, used = time.perf_counter(), time.process_time()
    try:
        with recording() as ledger:
            train(student, task, arm, experiment)
    except FeatherweightError as error:
        return {"failed": str(error)}
    seconds = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - used}
    seen.append(spread(student, task))
    found = {part: evaluate(student, task, part).value for part in (experiment.told,)}
    return {**found, **seconds, "features": seen, "shares": ledger.tables.get("gradient_shares", [])}


def train(student: nn.Module, task: Task, arm: Arm, experiment: Experiment) -> None:
    epochs = experiment.epochs * arm.times
    common = {"lr": experiment.lr, "optimizer": "sgd"}
    if arm.method is None:
        task.fit(student, task, epochs=epochs, **common)
        return
    first = {arm.stage: round(FIRST * epochs)} if arm.stage else {}
    entry(arm.method)(student, task, epochs=epochs - sum(first.values()), **common, **first, **arm.options)


def watching(seen: list[dict[str, float]]) -> Callable[..., nn.Module]:
    """The training loop, with the spread of the features at the start of every epoch."""

    def watched(model: nn.Module, task: Task, *, epochs: float, **options: Any) -> nn.Module:
        return fit(model, task, epochs=epochs, before_epoch=lambda epoch: seen.append(spread(model, task)), **options)

    return watched


def spread(model: nn.Module, task: Task) -> dict[str, float]:
    """Of the last features of the first 500 images of valid: log10 of the total variance, and the effective rank.

    The effective rank is exp of the entropy of the covariance's eigenvalues, scaled to the sum 1 (Roy and Vetterli).
    """
    batch = next(iter(task.valid))
    (path,) = list(shapes_of(model, task, batch))[-1:]
    was, found = model.training, []
    model.eval()
    with torch.no_grad(), taps(model, [path]) as seen:
        for (images, _), _ in zip(task.valid, range(4), strict=False):
            model(images)
            found.append(seen[path].flatten(1).double())
    model.train(was)
    f = torch.cat(found)
    f = f - f.mean(0)
    values = torch.linalg.eigvalsh(f @ f.T / len(f)).clamp_min(0)
    total = float(values.sum())
    parts = values[values > 0] / total
    rank = math.exp(-float((parts * parts.log()).sum())) if total > 0 else 0.0
    return {"log10_variance": math.log10(max(total, 1e-30)), "effective_rank": rank}


def identity(experiment: Experiment, name: str) -> str:
    """A hash of all that decides the result of an arm."""
    asked = asdict(experiment) | {"arms": asdict(experiment.arms[name]), "seeds": None, "title": None}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=list).encode()).hexdigest()[:16]


def path_of(name: str) -> Path:
    return HERE / "results" / f"distillation_{name}.json"


def rows_of(name: str, experiment: Experiment) -> list[dict[str, Any]]:
    """The runs that are there and still what the experiment asks for."""
    current = {arm: identity(experiment, arm) for arm in experiment.arms}
    rows = read(path_of(name)).get("rows", [])
    return [row for row in rows if current.get(row["arm"]) == row["identity"]]


def keep(name: str, experiment: Experiment, row: dict[str, Any] | None = None) -> None:
    """Adds a run to the results, also beside another process that does, and sums up what is there."""
    with Path(tempfile.gettempdir(), f"distillation_{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [one for one in read(path_of(name)).get("rows", []) if one["arm"] in experiment.arms]
        if row is not None:
            rows = [one for one in rows if one["arm"] != row["arm"] or one["identity"] == row["identity"]]
        order = list(experiment.arms)
        rows = sorted([*rows, *([row] if row else [])], key=lambda one: (one["seed"], order.index(one["arm"])))
        setting = asdict(experiment) | {"seeds": list(experiment.seeds)}
        found = {"title": experiment.title, "experiment": setting, "summary": summary(rows, experiment), "rows": rows}
        outputs.write_json(path_of(name), found | versions())


def summary(rows: list[dict[str, Any]], experiment: Experiment) -> dict[str, Any]:
    """Of every arm the mean, and the mean of its differences to other arms, seed by seed, in points.

    With 95 % intervals: Student's t over the seeds that both have.
    """
    by_arm: dict[str, dict[int, float]] = {}
    for row in rows:
        if experiment.told in row:
            by_arm.setdefault(row["arm"], {})[row["seed"]] = 100 * row[experiment.told]
    found: dict[str, Any] = {}
    for arm, mine in by_arm.items():
        times = [row["processor_seconds"] for row in rows if row["arm"] == arm and "processor_seconds" in row]
        found[arm] = {"result": mean(list(mine.values())), "processor_seconds": mean(times), "over": {}}
        for other, theirs in by_arm.items():
            both = [mine[seed] - theirs[seed] for seed in mine.keys() & theirs.keys()]
            if both and other != arm:
                found[arm]["over"][other] = mean(both)
    return found


def versions() -> dict[str, Any]:
    return {"environment": provenance.environment(), "commit": commit()}


def trained(name: str, seeds: Sequence[int] | None, arms: Sequence[str] | None) -> None:
    """Runs what is missing of an experiment, seed by seed."""
    experiment = EXPERIMENTS[name]
    for seed in experiment.seeds if seeds is None else seeds:
        for arm in experiment.arms if arms is None else arms:
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in rows_of(name, experiment)):
                known = identity(experiment, arm)
                result = measured(known, seed) or run(experiment, arm, seed)
                row = result | {"arm": arm, "seed": seed, "identity": known}
                keep(name, experiment, row)
                print(name, {k: v for k, v in row.items() if k not in ("identity", "shares")}, flush=True)
    keep(name, experiment)


def measured(known: str, seed: int) -> dict[str, Any] | None:
    """The same run where another experiment had it."""
    rows = [row for path in sorted(path_of("*").parent.glob(path_of("*").name)) for row in read(path).get("rows", [])]
    return next((row for row in rows if (row.get("identity"), row.get("seed")) == (known, seed)), None)


# --- what needs no training -----------------------------------------------------------------------------------------


def costs() -> dict[str, Any]:
    """Parameters, MACs, bytes of the bare files and latency of teacher and student."""
    task = zoo.task("fashion_mnist")
    networks = {"teacher": network(TEACHER, WEIGHTS[0]).eval(), "student": network(STUDENT).eval()}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in networks.items():
            plain = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            found = figures.measure(plain, task.inputs())
            bare = save(plain, Path(folder) / f"{name}.fw", bare=True).bytes
            rows[name] = {"params": found["params"], "macs": found["macs"], "bytes": bare}
            export.onnx(plain, f"{folder}/{name}.onnx", example_inputs=task.inputs())
        onnx = {"original": f"{folder}/teacher.onnx", "result": f"{folder}/student.onnx"}
        timed = figures.latency(networks["teacher"], networks["student"], task.inputs(), onnx, seconds=5)
    for path in WEIGHTS:
        with safe_open(HERE / path, "pt") as file:  # as `train_base.py` told it
            rows["teacher"].setdefault("accuracy", []).append({p: float(file.metadata()[p]) for p in ("valid", "test")})
    pairs = matched(networks["student"], networks["teacher"], task, next(iter(task.valid)), "stages")
    rows["student"]["taps"], rows["teacher"]["taps"] = zip(*pairs, strict=True)
    return {"networks": rows, "latency": [asdict(row) for row in timed]}


def memory() -> dict[str, Any]:
    """Weights of what joins two layers: a fully connected bridge, a 1x1 convolution, and locality's, which has none."""
    layers = {
        "these networks' last maps, 7x7x32 to 7x7x32": ((32, 7), (32, 7)),
        "these networks' first maps, 28x28x8 to 28x28x8": ((8, 28), (8, 28)),
        "7x7x2048 to 7x7x1024": ((2048, 7), (1024, 7)),
    }
    m, rows = 128, []
    for name, ((c, s), (d, t)) in layers.items():
        ours, theirs = c * s * s, d * t * t
        weights = {"fully connected": ours * theirs, "1x1": c * d, "locality": 0}
        macs = {"fully connected": m * ours * theirs, "1x1": m * c * d * t * t, "locality": m * m * (ours + theirs)}
        sizes = {key: 4 * value for key, value in weights.items()}
        rows.append({"layers": name, "weights": weights, "bytes": sizes, "macs": macs, "affinities": 4 * m * m})
    return {"batch": m, "rows": rows}


def crossover() -> dict[str, Any]:
    """Processor's milliseconds of a loss and its gradients: locality beside a fully connected hint."""
    rows = []
    for m in (64, 128, 256):
        for d in (256, 512, 1024, 2048, 4096):
            ours, theirs = torch.randn(m, d, requires_grad=True), torch.randn(m, d)
            bridge = nn.Linear(d, d)

            def near(a: Tensor = ours, b: Tensor = theirs) -> Tensor:
                return locality({"x": a}, {"x": b}, None, 0.0)

            def hint(a: Tensor = ours, b: Tensor = theirs, r: nn.Module = bridge) -> Tensor:
                return 0.5 * (r(a) - b).square().sum(1).mean()

            times = {name: fastest(loss) for name, loss in (("locality", near), ("hint", hint))}
            rows.append({"samples": m, "width": d} | times)
            print(rows[-1], flush=True)
    return {"rows": rows}


def fastest(loss: Callable[[], Tensor], rounds: int = 7) -> float:
    """The shortest of some runs forward and backward, in milliseconds of the processor, which others share."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        loss().backward()
        found.append(1000 * (time.process_time() - started))
    return min(found)


PLAIN: dict[str, Callable[[], dict[str, Any]]] = {"costs": costs, "memory": memory, "crossover": crossover}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join([*PLAIN, *EXPERIMENTS]))
    parser.add_argument("--seeds", nargs="+", type=int, help="these alone")
    parser.add_argument("--arms", nargs="+", help="these alone")
    asked = parser.parse_args(argv)
    try:
        for name in asked.names or [*PLAIN, *EXPERIMENTS]:
            if name in PLAIN:
                if not path_of(name).exists():
                    outputs.write_json(path_of(name), {"title": PLAIN[name].__doc__, **PLAIN[name](), **versions()})
            elif name in EXPERIMENTS:
                trained(name, asked.seeds, asked.arms)
            else:
                raise unknown("experiment", name, [*PLAIN, *EXPERIMENTS])
    except FeatherweightError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
