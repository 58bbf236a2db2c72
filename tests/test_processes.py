"""Several processes train like one: with the batch of all, or with what belongs to each."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core import processes
from featherweight.core.fit import fit
from featherweight.core.task import Task

HERE = Path(__file__).parent
SGD = {"optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9), "lr": 0.05, "epochs": 2}


def without_norms() -> nn.Sequential:
    """A network in which samples of a batch do not meet: batch norms see the batch of their own process."""
    return nn.Sequential(*[m for m in small_cnn() if not isinstance(m, nn.BatchNorm2d)])


def task_of(size: int) -> Task:
    task = small_task()
    return replace(task, train=Batches(task.train.x, task.train.y, size), teacher=without_norms().eval())


def plain(task: Task) -> nn.Module:
    return fit(without_norms(), task, **SGD)


def kd(task: Task) -> nn.Module:
    return entry("kd")(without_norms(), task, **SGD)


def fitnets(task: Task) -> nn.Module:
    """A stage that runs the network in part, with a regressor beside it, then one with two terms."""
    return entry("fitnets")(without_norms(), task, hint_epochs=1, hint_lr=0.05, **SGD)


def dml(task: Task) -> nn.Module:
    return entry("dml")(small_mlp(), task, **SGD)


def alone(task: Task) -> nn.Module:
    return entry("dml")(small_mlp(), task, update="simultaneous", spread="networks", **SGD)


def codistillation(task: Task) -> nn.Module:
    return entry("codistillation")(small_mlp(), task, exchange=2, burn_in=0.2, **SGD)


TOGETHER = (plain, kd, fitnets, dml)
"""Trainings that divide the batches: two processes with 16 samples are one with 32."""
EACH = (alone, codistillation)
"""Trainings in which each process has its own network: two processes with 16 samples are one with 16."""


def trained(way, size: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    task = task_of(size)
    torch.manual_seed(1)
    return [p.detach() for p in way(task).parameters()]


def launched(*args: str, count: int = 2) -> list[str]:
    """Starts processes as `accelerate launch` does, and returns what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    runs = [
        subprocess.Popen(
            [sys.executable, *args],
            env={**env, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE,
        )
        for i in range(count)
    ]
    told = [run.communicate(timeout=240) for run in runs]
    assert [run.returncode for run in runs] == [0] * count, "\n".join(error for _, error in told)
    return [out for out, _ in told]


def test_two_processes_train_like_one(tmp_path):
    launched("-c", f"import test_processes; test_processes.of_one_process({str(tmp_path)!r})")
    made = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for way in (*TOGETHER, *EACH):
        reference = trained(way, 32 if way in TOGETHER else 16)
        name = way.__name__
        for first, second, wanted in zip(made[0][name], made[1][name], reference, strict=True):
            assert torch.equal(first, second), f"{name}: both processes hold one network"
            torch.testing.assert_close(
                first, wanted, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
            )
    norms = [run["norms"] for run in made]
    assert all(torch.equal(a, b) for a, b in zip(*norms, strict=True)), "statistics are those of both"
    assert made[0]["draws"] == made[1]["draws"]
    assert made[0]["mean"] == made[1]["mean"] == [1.0, 0.5], "a gradient that one process lacks counts as nothing"


def of_one_process(folder: str) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    assert processes.count() == 2
    made = {way.__name__: trained(way, 16) for way in (*TOGETHER, *EACH)}
    torch.manual_seed(processes.index())
    network = small_cnn()
    fit(network, small_task(), epochs=1)
    made["norms"] = [t.float() for t in network.state_dict().values()]
    made["draws"] = torch.rand(3).tolist()
    weights = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
    weights[0].grad = torch.tensor(2.0 * processes.index())
    weights[1].grad = torch.tensor(1.0) if processes.index() else None
    processes.mean_gradients(weights)
    assert weights[2].grad is None
    made["mean"] = [float(w.grad) for w in weights[:2]]
    torch.save(made, Path(folder) / f"{processes.index()}.pt")
    torch.distributed.destroy_process_group()


OWN = f"{HERE / 'conftest.py'}:"
CHAIN = ["--method", "magnitude_iterative:sparsity=0.5,rounds=1,epochs=1", "--method", "kd:epochs=1,teacher_cache="]


@pytest.mark.slow
def test_the_command_line_under_the_launcher_writes_once_and_resumes(tmp_path):
    """Every process comes to the end, one of them has written and spoken, and the result verifies."""
    call = ["compress", OWN + "small_mlp", "--data", OWN + "small_task", "--train", "1", "--seed", "3"]
    call += [
        *CHAIN[:3],
        CHAIN[3] + str(tmp_path / "teacher"),
        "--until",
        "latency<=0.001x",
        "--out",
        str(tmp_path / "run"),
    ]
    call += ["--teacher", "original"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        "-m",
        "featherweight.cli",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for more in ([], ["--resume"]):
        made = subprocess.run(
            [*launch, *call, *more], capture_output=True, text=True, timeout=400, env=env, check=False
        )
        assert "the budget was not reached (latency" in made.stderr, made.stderr
        assert made.stdout.count("written to") == 1, made.stdout
        report = json.loads((tmp_path / "run/report.json").read_text())
        assert [stage["method"] for stage in report["stages"]] == ["magnitude_iterative", "kd"]
        assert ("resuming after 2 of 2 methods" in made.stderr) is bool(more)
    assert not list((tmp_path / "run").glob(".tmp*"))
    verified = subprocess.run(
        [sys.executable, "-m", "featherweight.cli", "verify", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert verified.returncode == 0, verified.stderr
