"""A teacher beside every training of a chain, and a student alone: in Python, in recipes and as flags."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import featherweight as fw
from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.cli import app
from featherweight.core.forms import bake
from featherweight.core.ledger import recording
from featherweight.core.taught import under_teacher
from featherweight.errors import BadOption, FeatherweightError
from featherweight.ingredients.match.softened import softened

OWN = f"{Path(__file__).parent / 'conftest.py'}:"
PLAIN = {"measure": False, "onnx": False}
FILES = {"model": OWN + "small_mlp", "data": OWN + "small_task", "train": 1, **PLAIN}
AFTER = ("kd", {"epochs": 1, "lr": 0.01})


def taught(share: float, step=None):
    """The terms that a training under a teacher minimises on the first batch, with model, teacher and batch."""
    found = []

    def once(model, task, **options):
        found.append(options["step"](model, next(iter(task.train)), 0.0))
        return model

    model, teacher = small_mlp(), small_cnn().eval()
    task = under_teacher(small_task(teacher=teacher, fit=once), share)
    task.fit(model, task, epochs=1, **({"step": step} if step else {}))
    assert not model._forward_hooks, "nothing of it stays on the model"
    return found[0], model, teacher, next(iter(task.train))


def test_the_teacher_has_its_share_of_the_loss():
    terms, model, teacher, (x, y) = taught(0.75)
    torch.testing.assert_close(terms["loss"], 0.25 * F.cross_entropy(model(x), y))
    torch.testing.assert_close(terms["teacher"], 0.75 * softened({"": model(x)}, {"": teacher(x)}, None, 0.0))
    sum(terms.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_other_terms_keep_their_proportions_and_the_teacher_sees_what_the_model_saw():
    def step(net, batch, progress):
        return {"loss": F.cross_entropy(net(batch[0] + 1), batch[1]), "penalty": net[1].weight.abs().sum()}

    terms, model, teacher, (x, y) = taught(0.5, step)
    torch.testing.assert_close(terms["loss"], 0.5 * F.cross_entropy(model(x + 1), y))
    torch.testing.assert_close(terms["penalty"], 0.5 * model[1].weight.abs().sum())
    torch.testing.assert_close(terms["teacher"], 0.5 * softened({"": model(x + 1)}, {"": teacher(x + 1)}, None, 0.0))


def test_a_step_that_does_not_run_the_network_stays_and_that_is_said():
    with recording() as ledger:
        terms, *_ = taught(0.5, lambda net, batch, progress: {"norm": net[1].weight.square().sum()})
    assert terms.keys() == {"norm"}
    assert ledger.notes == ["a training that does not run the network as a whole has no teacher"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("magnitude_iterative", {"sparsity": 0.8, "rounds": 1, "epochs": 1, "finetune": 1}),
        ("network_slimming", {"prune_ratio": 0.4, "epochs": 1, "finetune": 1}),
        ("dorefa", {"weight_bits": 2, "act_bits": 4, "epochs": 1}),
        ("kmeans_share", {"weight_bits": 2, "epochs": 1}),
        ("tucker2_vbmf", {"epochs": 1}),
    ],
)
def test_a_chain_under_its_original_keeps_what_it_reached(trained, method, options):
    """With a teacher beside it a method learned otherwise; what it made smaller is as small after a distillation."""
    original, task = trained
    task = replace(task, teacher=original)
    options = {key: value for key, value in options.items() if key in {o.name for o in fw.methods()[method].options()}}
    made = []
    for given in (task, under_teacher(task, 0.9)):
        torch.manual_seed(3)
        with recording() as ledger:
            made.append(entry(method)(copy.deepcopy(original), given, **options))
    assert all("teacher" in row["terms"] for row in ledger.tables["gradient_shares"])
    alone, under = made
    assert differ(bake(alone), bake(copy.deepcopy(under)))
    reached = held(under)
    weights = copy.deepcopy(bake(copy.deepcopy(under)).state_dict())
    entry("kd")(under, task, epochs=1, lr=0.01)
    assert held(under) == reached
    after = bake(under).state_dict()
    assert any(not torch.equal(weights[name], after[name]) for name in weights), "and yet it learned"


def differ(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return any(x.shape != y.shape or not torch.equal(x, y) for x, y in pairs)


def held(model: torch.nn.Module) -> list[tuple[object, ...]]:
    """What pruning, sharing, quantization and factorization leave behind: shapes, zeros, distinct values of weights."""
    weights = [p for p in bake(copy.deepcopy(model)).parameters() if p.dim() > 1]
    return [(tuple(w.shape), int((w == 0).sum()), min(int(w.unique().numel()), 17)) for w in weights]


def test_teacher_original_is_said_alike_in_recipes_and_flags(tmp_path):
    chain = [{"method": "magnitude_iterative", "options": {"sparsity": 0.5, "rounds": 1, "epochs": 1}}]
    made = fw.run({**FILES, "teacher": "original", "chain": chain, "out": tmp_path / "a"})
    assert "teacher: original" in made.recipe
    assert "every training has a teacher, with 90% of the loss" in made.report["stages"][0]["notes"]
    assert all("teacher" in row["terms"] for row in made.report["stages"][0]["tables"]["gradient_shares"])
    lines = [f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in FILES.items()]
    lines += ["teacher: original", "chain:", "  - method: magnitude_iterative"]
    (tmp_path / "r.yaml").write_text("\n".join([*lines, "    options: {sparsity: 0.5, rounds: 1, epochs: 1}\n"]))
    flags = ["compress", FILES["model"], "--data", FILES["data"], "--train", "1", "--no-measure", "--no-onnx"]
    flags += ["--method", "magnitude_iterative:sparsity=0.5,rounds=1,epochs=1", "--teacher", "original"]
    for args, out in (
        (["run", str(tmp_path / "r.yaml")], "b"),
        (flags, "c"),
        ([*flags, "--teacher-share", "0.0"], "d"),
    ):
        told = CliRunner().invoke(app, [*args, "--out", str(tmp_path / out), "--quiet"])
        assert told.exit_code == 0, told.output
    files = [(tmp_path / out / "model.fw").read_bytes() for out in "abc"]
    assert files[0] == files[1] == files[2]


def test_a_student_alone_is_trained(tmp_path):
    flags = ["compress", FILES["model"], "--data", FILES["data"], "--train", "1", "--no-measure", "--no-onnx"]
    flags += ["--student", OWN + "small_stack", "--quiet"]
    told = CliRunner().invoke(app, [*flags, "--out", str(tmp_path / "a")])
    assert told.exit_code == 0, told.output
    again = fw.run({**FILES, "student": OWN + "small_stack", "chain": ["kd"], "out": tmp_path / "b"})
    assert (tmp_path / "a/model.fw").read_bytes() == (tmp_path / "b/model.fw").read_bytes()
    assert [stage["method"] for stage in again.report["stages"]] == ["kd"]
    model, task, student = small_cnn(), small_task(), small_mlp()
    result = fw.compress(model, task, student=student, **PLAIN)
    assert differ(student, result.model)
    with pytest.raises(BadOption, match="there is no method"):
        fw.compress(model, task)
    with pytest.raises(FeatherweightError, match="chain is missing"):
        fw.run(FILES)


def test_what_does_not_go_together():
    other = small_task(classes=7, teacher=small_mlp(7).eval())
    four = replace(other, train=small_task().train, valid=small_task().valid)
    with pytest.raises(BadOption, match="both must score the same classes"):
        fw.compress(small_mlp(), four, "magnitude_iterative", sparsity=0.5, epochs=1, teacher_share=0.5, **PLAIN)
    with pytest.raises(BadOption, match=r"teacher_share=1\.0: must be a fraction in"):
        fw.compress(small_mlp(), small_task(), "int8", teacher_share=1.0)
    with pytest.raises(BadOption, match="teacher=original has those of the model"):
        fw.run({**FILES, "teacher": "original", "teacher_weights": "w.safetensors", "chain": ["int8"]})
    numbers = Batches(torch.randn(32, 64), torch.randn(32, 1))
    regression = fw.Task(
        train=numbers, valid=numbers, loss=F.mse_loss, metric=fw.Metric("error", aggregate=lambda o, t: 0.0)
    )
    with pytest.raises(BadOption, match="at least two classes"):
        fw.compress(small_mlp(1), regression, "magnitude_iterative", epochs=1, teacher_share=0.5, **PLAIN)
