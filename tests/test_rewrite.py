"""The verb `rewrite`, and the contract of blocks: each in the place of convolutions, in files, ONNX and chains."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import contract
import featherweight as fw
from conftest import small_mlp, small_task
from featherweight.catalogue import entries, entry, fill, takers_of
from featherweight.cli import app
from featherweight.core.forms import Mask, attach
from featherweight.core.ledger import recording
from featherweight.errors import BadOption, CompressionError, MissingNeed, UnknownName
from featherweight.rewrite import rewrite

BLOCKS = sorted(entries("block"))
GROUPED = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in BLOCKS]
SHRINKS = {"group_equivariant_conv": "bits"}  # it has fewer weights, and as many multiplications
CHECKS = [c for c in contract.checks() if c is not contract.check_refuses_a_task_without_its_needs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each block is put in once, whatever number of checks look at it."""
    done: dict[str, contract.Ran] = {}

    def ran(name: str) -> contract.Ran:
        if name not in done:
            block, verb = entries("block")[name], entries("verb")["rewrite"]
            small = {"block": name, "epochs": 1}
            facts = {"small": small, "paper": block.paper, "module": block.module, "defaults": {}}
            model, task = contract.trained()
            before, folder = contract.state(model), tmp_path_factory.mktemp(name)
            result = fw.compress(model, task, "rewrite", out=folder, **small)
            told = replace(verb, **facts, shrinks=frozenset({SHRINKS.get(name, "factors")}))
            done[name] = contract.Ran(told, model, before, task, result, folder)
        return done[name]

    return ran


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", GROUPED)
def test_contract_of_blocks(name, check, runs):
    check(runs(name))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_explained_and_listed(name):
    block = entries("block")[name]
    assert block.paper
    assert block.doc
    assert "Departs from the paper: " in inspect.getdoc(inspect.getmodule(block.function))
    assert all(option.meaning for option in block.options())
    assert fill("block", name) is block.function
    assert takers_of("block") == {"rewrite": "block"}
    shown = CliRunner().invoke(app, ["methods", name])
    assert shown.exit_code == 0
    assert f"block={name}" in shown.stdout
    listed = CliRunner().invoke(app, ["methods", "--json"])
    assert {"id": name, "kind": "block"}.items() <= next(
        r for r in json.loads(listed.stdout) if r["id"] == name
    ).items()
    with pytest.raises(UnknownName, match=f"{name} is a block, no method: rewrite"):
        entry(name, "method")


def test_layers_that_stay_are_told():
    model, task = contract.trained()
    with recording() as told:
        rewrite(model, task, epochs=0)
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[3], nn.Sequential)
    assert "the first convolution" in str(told)
    model, _ = contract.trained()
    attach(model[3], Mask(torch.rand_like(model[3].weight) > 0.5), root=model)
    with recording() as told:
        rewrite(model, task, settings={"block": "B(2)"}, epochs=0)
    assert "zeros no more" in str(told)


def test_a_teacher_may_have_a_share():
    model, task = contract.trained()
    teacher, _ = contract.trained()
    taught = rewrite(
        model, replace(task, teacher=teacher), settings={"block": "G(4)"}, teacher_share=0.5, epochs=4, lr=0.01
    )
    assert fw.evaluate(taught, task).value > 0.4


def test_any_function_may_be_a_block():
    model, task = contract.trained()
    thin = lambda layer: nn.Conv2d(layer.in_channels, layer.out_channels, 1, stride=layer.stride)  # noqa: E731
    assert rewrite(model, task, block=thin, epochs=0)[3].kernel_size == (1, 1)


def test_bad_input():
    model, task = contract.trained()
    with pytest.raises(BadOption, match="no Conv2d layer"):
        rewrite(small_mlp(), task)
    with pytest.raises(UnknownName, match="moonshine_blocks"):
        rewrite(model, task, block="moonshine_block")
    with pytest.raises(UnknownName, match="option of moonshine_blocks"):
        rewrite(model, task, settings={"groups": 2})
    with pytest.raises(BadOption, match="text such as G"):
        rewrite(model, task, settings={"block": "G8B2"})
    with pytest.raises(CompressionError, match="no convolution was rewritten"):
        rewrite(model, task, settings={"block": "S"})
    with pytest.raises(MissingNeed, match="training"):
        rewrite(model, replace(small_task(), train=None))
