"""Low displacement rank: pairs of operators are undone exactly, classic matrices have the rank they should."""

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import small_mlp, small_task
from featherweight.core.cost import cost
from featherweight.core.structured import from_dense
from featherweight.core.structures import made, near
from featherweight.recipes.ldr_general import WORDS
from structured_layers import check_counts, check_product, check_structure

NAMES = sorted(WORDS)
SIZES = (1, 2, 4, 9, 14)  # of 4, 9 and 14 a Stein equation of Y and Y would have no solution


def shift(n: int, f: float) -> torch.Tensor:
    z = torch.zeros(n, n).double()
    for i in range(n):
        z[(i + 1) % n, i] = 1 if i + 1 < n else f
    return z


def tridiagonal(n: int, last: float) -> torch.Tensor:
    y = shift(n, 0) + shift(n, 0).T
    y[0, 0] += 1
    y[-1, -1] += last
    return y


def displaced(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """The displacement by operators written out as matrices."""
    n = len(matrix)
    i = torch.arange(n).double()
    nodes = ((2 * i + 1) * torch.pi / (2 * n)).cos()
    if name == "toeplitz_hankel":
        return tridiagonal(n, 1) @ matrix - matrix @ tridiagonal(n, -1)
    a, b = {
        "toeplitz": (shift(n, 1), shift(n, -1).T),
        "hankel": (shift(n, 1), shift(n, -1)),
        "vandermonde": (nodes.diag(), shift(n, 0)),
        "cauchy": ((i + 1).diag(), (1 / (i + 1.5)).diag()),
    }[name]
    return matrix - a @ matrix @ b


def test_it_is_a_sound_layer(tmp_path):
    check_structure((WORDS["hankel"], 2), tmp_path, kinds=("tall", "conv"))


@pytest.mark.parametrize("name", NAMES)
def test_its_product_and_gradients_are_those_of_its_matrix(name):
    dense = nn.Linear(11, 6)
    layer = from_dense(dense, (WORDS[name], 2))
    check_product(dense, layer)
    check_counts(layer)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", SIZES)
def test_the_displacement_of_what_is_made_is_the_product_of_the_factors(name, n):
    structure = made((WORDS[name], min(2, n)), n, n)
    free = {key: torch.randn(shape).double() for key, shape in structure.shapes().items()}
    matrix, wanted = structure.matrix(free), (free["left"].mT @ free["right"])[0]
    torch.testing.assert_close(displaced(name, matrix), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(structure.displace(matrix[None])[0], displaced(name, matrix), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(9, 9), (4, 11), (15, 5)])
def test_the_full_rank_gives_any_matrix_back(name, shape):
    structure = made((WORDS[name], min(shape)), *shape)
    matrix = torch.randn(shape).double()
    torch.testing.assert_close(structure.matrix(structure.project(matrix)), matrix, rtol=1e-8, atol=1e-8)


def classic(name: str, n: int) -> tuple[torch.Tensor, int]:
    """A matrix that the class is named after, and its displacement rank."""
    i, (t, u) = torch.arange(n), torch.randn(2, 2 * n - 1).double()
    toeplitz, hankel = t[i[:, None] - i + n - 1], u[i[:, None] + i]
    nodes = ((2 * i.double() + 1) * torch.pi / (2 * n)).cos()
    return {
        "toeplitz": (toeplitz, 2),
        "hankel": (hankel, 2),
        "vandermonde": (nodes[:, None] ** (n - 1 - i), 1),
        "cauchy": (1 / (1 - (i[:, None].double() + 1) / (i + 1.5)), 1),
        "toeplitz_hankel": (toeplitz + hankel, 4),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_classic_matrices_have_the_rank_of_their_class(name):
    matrix, rank = classic(name, 10)
    assert int(torch.linalg.matrix_rank(displaced(name, matrix), rtol=1e-10)) == rank
    structure = made((WORDS[name], rank), 10, 10)
    torch.testing.assert_close(structure.matrix(structure.project(matrix)), matrix, rtol=1e-7, atol=1e-7)


def test_a_stein_equation_of_two_equal_tridiagonals_holds_no_sums_of_toeplitz_and_hankel():
    """Why another pair is used for them: the displacement is full, and at some sizes there is no way back."""
    y = shift(10, 0) + shift(10, 0).T
    matrix, _ = classic("toeplitz_hankel", 10)
    assert int(torch.linalg.matrix_rank(matrix - y @ matrix @ y, rtol=1e-10)) == 10
    for n, singular in ((8, True), (9, True), (10, False)):  # n + 1 is a multiple of 3, of 5, of neither
        values = torch.linalg.eigvalsh(shift(n, 0) + shift(n, 0).T)
        assert (float((1 - torch.outer(values, values)).abs().min()) < 1e-12) == singular


@pytest.mark.parametrize("name", NAMES)
def test_more_rank_comes_nearer(name):
    matrix = torch.randn(12, 12)
    lost = []
    for rank in (1, 3, 6, 12):
        structure = made((WORDS[name], rank), 12, 12)
        lost.append(float((structure.matrix(near(structure, matrix, 60)) - matrix).norm() / matrix.norm()))
    assert lost == sorted(lost, reverse=True)
    assert lost[0] < 1
    assert lost[-1] < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name):
    structure = made((WORDS[name], 2), 4, 7)
    free = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in structure.shapes().values()]
    assert torch.autograd.gradcheck(lambda g, h: structure.matrix({"left": g, "right": h}), free)


def test_the_work_of_making_the_weight_is_counted():
    layer, x = from_dense(nn.Linear(64, 32), (WORDS["cauchy"], 2)), torch.randn(5, 64)
    making = 2 * (2 * 32**2 + 32**2)  # two squares: g h^T at rank two, a division each entry
    assert cost(nn.Sequential(layer), x).macs == round(64 * 32 + making / 5)


@pytest.mark.parametrize("name", ["hankel", "toeplitz_hankel"])
def test_a_trained_perceptron_is_still_right(name):
    model, task = small_mlp(), small_task()
    fw.fit(model, task, epochs=8, lr=1e-2)
    options = {"operators": name, "rank": 2, "epochs": 8, "lr": 1e-2}
    result = fw.compress(model, task, "ldr_general", onnx=False, measure=False, **options)
    assert result.model[1].structure == (WORDS[name], 2)
    assert result.report["result"]["metric"] > 0.9
