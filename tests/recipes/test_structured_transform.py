"""Structured transforms: the formula inverts the displacement, and Toeplitz matrices have rank two."""

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.displacements import Displaced, ToeplitzLike
from featherweight.core.structured import StructuredLinear, from_dense
from featherweight.core.structures import Structure, near
from featherweight.errors import BadOption, CompressionError
from structured_layers import check_structure


def krylov(f: float, v: torch.Tensor) -> torch.Tensor:
    """`Z_f(v)`, column by column from the definition."""
    columns = [v]
    for _ in range(len(v) - 1):
        columns.append(torch.cat([f * columns[-1][-1:], columns[-1][:-1]]))
    return torch.stack(columns, 1)


def shift(n: int, f: float) -> torch.Tensor:
    return krylov(f, torch.eye(n)[1]).double()


def test_it_is_a_sound_layer(tmp_path):
    check_structure(("toeplitz", 2), tmp_path)


def test_the_matrix_is_the_papers_sum_of_products():
    n = 7
    made = ToeplitzLike(n, n, 3)
    g, h = torch.randn(3, n), torch.randn(3, n)
    wanted = 0.5 * sum(krylov(1, g[k]) @ krylov(-1, h[k].flip(0)) for k in range(3))
    found = made.matrix({"left": g[None], "right": h[None]})
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_displacement_is_the_product_of_the_factors(rank):
    n = 8
    made = ToeplitzLike(n, n, rank)
    free = {name: torch.randn(1, rank, n).double() for name in ("left", "right")}
    found = made.matrix(free)
    displaced = shift(n, 1) @ found - found @ shift(n, -1)
    torch.testing.assert_close(displaced, (free["left"].mT @ free["right"])[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(made.displace(found), displaced)
    assert int(torch.linalg.matrix_rank(displaced, rtol=1e-9)) == rank


def toeplitz(n: int) -> torch.Tensor:
    t = torch.randn(2 * n - 1).double()
    i = torch.arange(n)
    return t[i[:, None] - i + n - 1]


def test_toeplitz_matrices_and_their_inverses_have_rank_two_and_a_product_of_two_has_four():
    n = 10
    one, two = toeplitz(n) + 5 * torch.eye(n), toeplitz(n)
    for matrix, rank in ((one, 2), (torch.linalg.inv(one), 2), (one @ two, 4), (krylov(1, one[0]), 1)):
        made = ToeplitzLike(n, n, rank)
        torch.testing.assert_close(made.matrix(made.project(matrix)), matrix, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (13, 4)])
def test_the_full_rank_gives_any_matrix_back(shape):
    made = ToeplitzLike(*shape, min(shape))
    matrix = torch.randn(shape).double()
    torch.testing.assert_close(made.matrix(made.project(matrix)), matrix, rtol=1e-9, atol=1e-9)


def test_steps_towards_the_weight_bring_it_nearer_and_more_rank_is_nearer():
    matrix = torch.randn(16, 16)
    lost = []
    for rank in (1, 2, 4, 8):
        made = ToeplitzLike(16, 16, rank)
        gaps = [float((made.matrix(near(made, matrix, steps)) - matrix).norm() / matrix.norm()) for steps in (0, 40)]
        assert gaps[1] < 0.9 * gaps[0]
        lost.append(gaps[1])
    assert lost == sorted(lost, reverse=True)
    assert lost[0] < 1
    assert lost[-1] < 0.35


@pytest.mark.parametrize("shape", [(7, 7), (6, 17), (13, 4), (1, 3), (1, 1), (8, 300)])
def test_the_matrix_is_what_its_product_multiplies_by_and_squares_are_made_one_by_one(shape):
    made = ToeplitzLike(*shape, min(2, *shape))
    free = {name: torch.randn(size).double() for name, size in made.shapes().items()}
    product = made.product(torch.eye(shape[1]).double(), free).T
    torch.testing.assert_close(made.matrix(free), product, rtol=1e-9, atol=1e-9)
    single = {name: value.float() for name, value in free.items()}
    torch.testing.assert_close(made.matrix(single).double(), product, rtol=1e-4, atol=1e-5)
    beside = made.grid[1]
    assert made.making() == made.grid[0] * beside * ToeplitzLike(min(shape), min(shape), made.rank).making()


def test_a_convolution_is_made_with_far_fewer_multiplications_than_column_by_column():
    made = ToeplitzLike(64, 576, 4)
    assert made.making() < 0.06 * made.macs(576)


@pytest.mark.parametrize("word", sorted(word for word, kind in Structure.known.items() if issubclass(kind, Displaced)))
def test_a_layer_of_one_entry_starts(word):
    layer = StructuredLinear(1, 1, True, (word, 1))
    assert bool(layer(torch.ones(2, 1)).isfinite().all())
    assert float(layer.dense().detach().abs()) == pytest.approx(3**-0.5, rel=1e-4)


def test_gradients_agree_with_finite_differences():
    made = ToeplitzLike(5, 9, 2)
    free = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in made.shapes().values()]
    x = torch.randn(3, 9, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, g, h: made.product(x, {"left": g, "right": h}), (x, *free))


def test_large_layers_cost_a_fraction_of_the_dense_ones():
    layer = StructuredLinear(1024, 1024, False, ("toeplitz", 2))
    assert layer.matrix.size == 4 * 1024
    assert layer.macs((64, 1024), (64, 1024)) / 64 < 0.2 * 1024**2


def test_a_trained_perceptron_is_still_right():
    model, task = small_mlp(), small_task()
    fw.fit(model, task, epochs=8, lr=1e-2)
    result = fw.compress(model, task, "structured_transform", rank=2, epochs=8, lr=1e-2, onnx=False, measure=False)
    assert isinstance(result.model[1], StructuredLinear)
    assert isinstance(result.model[3], nn.Linear)  # 4 x 32 has no fewer parameters at rank two
    assert "no fewer" in result.report["stages"][0]["skipped"]["3"]
    assert result.report["result"]["metric"] > 0.9


def test_a_layer_of_zeros_learns():
    layer = from_dense(nn.Linear(6, 6), ("toeplitz", 2))
    layer.set_dense(torch.zeros(6, 6), None, steps=5)
    assert not layer.dense().any()
    layer(torch.randn(4, 6)).square().sum().add(layer(torch.randn(4, 6)).sum()).backward()
    assert layer.right.grad.abs().sum() > 0


def test_a_rank_beyond_the_size_is_refused_or_bounded():
    with pytest.raises(BadOption, match="rank 7 of squares of 6"):
        StructuredLinear(6, 8, False, ("toeplitz", 7))
    with pytest.raises(CompressionError, match="no fewer than now"):
        entry("structured_transform")(small_mlp(), small_task(), rank=1000)
