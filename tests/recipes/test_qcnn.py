"""The error of the responses never rises, is the true one, and looking products up gives the layer's outputs."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import Batches, small_task
from featherweight.catalogue import entry
from featherweight.core.capture import layer_io
from featherweight.core.fit import fit
from featherweight.core.forms import Codes, Mask, Product, attach, bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.reconstruct import Moments, layer_rows
from featherweight.core.site import Site
from featherweight.core.task import Task
from featherweight.core.vectors import blocks, chosen, cluster_vectors, columns_axis, matrix_of
from featherweight.errors import BadData, CompressionError
from featherweight.recipes.qcnn import Responses, improved

qcnn = entry("qcnn")


def wide_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 4),
    )


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    task = small_task()
    return fit(wide_cnn(), task, epochs=4, lr=3e-3).eval(), task


def product(site: Site, words: int, dim: int) -> tuple[Tensor, Tensor]:
    return cluster_vectors(blocks(matrix_of(site.weight, columns_axis(site)), dim), words)


def weight_of(site: Site, codebooks: Tensor, index: Tensor) -> Tensor:
    return Codes(index, Product(codebooks, columns_axis(site)), tuple(site.weight.shape)).decode()


@pytest.mark.parametrize(("path", "dim"), [("2", 4), ("7", 8)])
def test_the_error_falls_with_every_sweep_and_is_that_of_the_rows(trained, path, dim):
    model, task = trained
    site = Site(path, model.get_submodule(path))
    rows = list(layer_rows(model, path, task, task.train))
    x, y = (torch.cat(part) for part in zip(*rows, strict=True))
    codebooks, index, errors = improved(site, Moments.of(rows), *product(site, 8, dim), 4)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]
    weight = weight_of(site, codebooks, index).flatten(1)
    reached = (y - x @ weight.T - site.module.bias.detach()).square().mean(0).sum() / y.var(0, unbiased=False).sum()
    assert errors[-1] == pytest.approx(float(reached), rel=1e-6)


def test_words_are_at_the_minimum_and_every_step_lowers_the_error(trained):
    model, task = trained
    site = Site("2", model[2])
    found = Responses.of(site, Moments.of(layer_rows(model, "2", task, task.train)), *product(site, 6, 4))
    last = found.error()
    for m in range(4):
        found.solve(m)
        fall = found.slope[:, :, found.span(m)]
        used = F.one_hot(found.index[:, :, m].long(), 6).double()
        assert torch.einsum("opk,opd->kd", used, fall).abs().max() < 1e-6 * found.target.abs().max()
        for place in range(9):
            assert found.error() <= last + 1e-12
            last = found.error()
            found.assign(m, place)
        torch.testing.assert_close(
            found.now, chosen(found.codebooks, found.index.flatten(0, 1)).transpose(0, 1).reshape(found.now.shape)
        )


def looked_up(x: Tensor, layer: nn.Module, codes: Codes) -> Tensor:
    """A layer's outputs from the products of its inputs with codewords, K for each sub-space, looked up and added."""
    books, index = codes.rule.codebooks, codes.symbols.long()
    if isinstance(layer, nn.Linear):
        table = torch.einsum("nmd,mkd->nmk", x.unflatten(1, (len(books), -1)), books)
        return sum(table[:, m, index[:, m]] for m in range(len(books))) + layer.bias
    table = torch.einsum(
        "nmdhw,mkd->nmkhw", x.unflatten(1, (len(books), -1)), books
    )  # before padding: zeros stay zeros
    height, width = layer.kernel_size
    index = index.view(layer.out_channels, height, width, len(books))
    size = layer(x).shape[2:]
    out = layer.bias.view(1, -1, 1, 1).expand(len(x), -1, *size).clone()
    padded, step = F.pad(table, [layer.padding[1]] * 2 + [layer.padding[0]] * 2), layer.stride
    for a, b, m in itertools.product(range(height), range(width), range(len(books))):
        seen = padded[:, m, :, a : a + size[0] * step[0] : step[0], b : b + size[1] * step[1] : step[1]]
        out += seen[:, index[:, a, b, m], : size[0], : size[1]]
    return out


@pytest.mark.parametrize("path", ["2", "4", "7"])
def test_looking_products_up_gives_what_the_rebuilt_weights_give(trained, path):
    model, task = copy.deepcopy(trained[0]), trained[1]
    qcnn(model, task, where=path, sweeps=1, calibration_batches=1)
    layer = bake(model).get_submodule(path)
    codes = codes_of(layer)
    assert isinstance(codes.rule, Product)
    x = next(iter(layer_io(model, path, task, task.valid)))[0]
    with torch.no_grad():
        torch.testing.assert_close(looked_up(x, layer, codes), layer(x), rtol=1e-4, atol=1e-5)


def gap(model: nn.Module, original: nn.Module, path: str, task: Task) -> float:
    pairs = layer_io(model, path, task, task.train, original=original)
    got = layer_io(model, path, task, task.train)
    return sum(float((a[1] - b[1]).square().sum()) for a, b in zip(got, pairs, strict=True))


def test_error_correction_repairs_what_earlier_layers_lost(trained):
    model, task = trained
    options = {"fc_bits": 2, "conv_bits": 2, "where": ["2", "4", "7"], "calibration_batches": 3, "sweeps": 2}
    lost = {}
    for correct in (True, False):
        net = bake(qcnn(copy.deepcopy(model), task, correct=correct, **options))
        lost[correct] = gap(net, model, "7", task)
    assert lost[True] < 0.9 * lost[False]


def test_responses_are_nearer_than_by_k_means_of_the_same_size(trained):
    model, task = trained
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    qcnn(ours, task, where="7", fc_bits=3, fc_dim=4, sweeps=2)
    entry("gong_pq")(theirs, task, where="7", index_bits=3, dim=4)
    assert gap(ours, model, "7", task) < 0.5 * gap(theirs, model, "7", task)
    assert codes_of(bake(ours)[7]).rule.codebooks.shape == codes_of(bake(theirs)[7]).rule.codebooks.shape


def test_layers_that_cannot_pay_or_hold_zeros_are_said_and_masks_are_kept(trained):
    model, task = copy.deepcopy(trained[0]), trained[1]
    keep = torch.rand(64, 512) > 0.5
    attach(model[7], Mask(keep))
    with recording() as ledger:
        qcnn(model, task, sweeps=1, calibration_batches=1)
    assert "would cost 50% of its weights" in ledger.skipped["9"]
    assert bool((bake(model)[7].weight[~keep] == 0).all())
    assert any(re.match(r"7: .*bits a weight with the codebooks$", one) for one in ledger.notes)  # by its weights alone
    with pytest.raises(CompressionError, match="pass more codebook_share"):
        qcnn(copy.deepcopy(trained[0]), task, codebook_share=0.001)


def test_constant_and_empty_calibration_data(trained):
    model, task = trained
    x = torch.zeros(32, 1, 8, 8)
    constant = Task(train=task.train, valid=task.valid, calibration=Batches(x, torch.zeros(32).long()))
    net = bake(qcnn(copy.deepcopy(model), constant, sweeps=1))
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x), rtol=1e-2, atol=1e-2)
    empty = Task(train=task.train, valid=task.valid, calibration=[])
    with pytest.raises(BadData):
        qcnn(copy.deepcopy(model), empty)


def test_the_ridge_keeps_what_few_samples_leave_undetermined(trained):
    """From 32 rows of 512 inputs: outputs for other inputs are nearer with it."""
    model, task = trained
    few = Task(train=task.train, valid=task.valid, calibration=[next(iter(task.train))])
    lost = {}
    for ridge in (0.0, 0.1):
        net = bake(qcnn(copy.deepcopy(model), few, where="7", sweeps=2, ridge=ridge))
        got = layer_io(net, "7", task, task.valid)
        wanted = layer_io(model, "7", task, task.valid)
        lost[ridge] = sum(float((a[1] - b[1]).square().sum()) for a, b in zip(got, wanted, strict=True))
    assert lost[0.1] < 0.9 * lost[0.0]
