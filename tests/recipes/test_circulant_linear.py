"""Circulant projections: the Fourier product is the matrix product, and no circulant is nearer than the projection."""

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.structured import StructuredConv2d, StructuredLinear, from_dense
from featherweight.core.structures import Circulant
from featherweight.errors import CompressionError
from structured_layers import check_structure


def circulants(size: int, seed: int) -> list[torch.Tensor]:
    """A basis of the circulants of a size times the fixed signs, entry by entry from the definition."""
    signs = [-1.0 if m else 1.0 for m in Circulant(size, size, seed).minus.tolist()]
    basis = []
    for k in range(size):
        c = torch.zeros(size, size)
        for i in range(size):
            j = (i - k) % size
            c[i, j] = signs[j]
        basis.append(c)
    return basis


def test_it_is_a_sound_layer(tmp_path):
    check_structure(("circulant", 3), tmp_path)


def test_the_matrix_is_a_circulant_times_signs_and_the_residual_is_orthogonal_to_all_of_them():
    dense = nn.Linear(9, 9)
    layer = from_dense(dense, ("circulant", 5))
    basis = circulants(9, 5)
    made = sum(float(v) * c for v, c in zip(layer.vectors.detach().flatten(), basis, strict=True))
    torch.testing.assert_close(layer.dense().detach(), made)
    residual = dense.weight.detach() - made
    assert max(abs(float((residual * c).sum())) for c in basis) < 1e-5
    assert residual.norm() > 0.5 * dense.weight.norm()  # a random matrix is far from circulant: d of d^2 dimensions


def test_a_circulant_is_given_back_as_it_was():
    one = from_dense(nn.Linear(16, 40), ("circulant", 1))
    dense = nn.Linear(16, 40)
    dense.weight.data, dense.bias.data = one.dense().detach(), one.bias.detach()
    again = from_dense(dense, ("circulant", 1))
    torch.testing.assert_close(again.vectors, one.vectors)
    assert torch.equal(again.bias, one.bias)


def test_gradients_are_those_of_the_paper():
    """dL/dr = IFFT(conj(FFT(Dx)) * FFT(delta)), dL/dx = D IFFT(conj(FFT(r)) * FFT(delta))."""
    layer = from_dense(nn.Linear(10, 10, bias=False), ("circulant", 2))
    x, delta = torch.randn(10, requires_grad=True), torch.randn(10)
    layer(x).backward(delta)
    signs = torch.where(torch.from_numpy(layer.matrix.minus), -1.0, 1.0)
    fft, ifft = torch.fft.fft, torch.fft.ifft
    r = layer.vectors.detach().flatten()
    torch.testing.assert_close(layer.vectors.grad.flatten(), ifft(fft(signs * x.detach()).conj() * fft(delta)).real)
    torch.testing.assert_close(x.grad, signs * ifft(fft(r).conj() * fft(delta)).real)


def test_without_signs_every_layer_of_a_seed_would_be_the_same_and_layers_differ():
    signs = [Circulant(64, 64, seed).minus for seed in (0, 1)]
    assert 16 < signs[0].sum() < 48
    assert 16 < (signs[0] != signs[1]).sum() < 48


def test_the_layer_costs_d_log_d():
    layer = StructuredLinear(1024, 1024, False, ("circulant", 0))
    assert layer.matrix.size == 1024
    assert layer.macs((64, 1024), (64, 1024)) / 64 < 0.03 * 1024**2


def test_a_trained_perceptron_is_still_right_after_training_its_circulants():
    model, task = small_mlp(), small_task()
    fw.fit(model, task, epochs=8, lr=1e-2)
    result = fw.compress(model, task, "circulant_linear", epochs=8, lr=1e-2, onnx=False, measure=False)
    assert [type(result.model[i]) for i in (1, 3)] == [StructuredLinear, StructuredLinear]
    assert sum(p.numel() for p in result.model.parameters()) == 64 + 32 + 32 + 4
    assert result.report["result"]["metric"] > 0.9


def test_where_keeps_to_the_papers_layers():
    result = fw.compress(
        small_cnn(), small_task(), "circulant_linear", where="Linear", epochs=0, onnx=False, measure=False
    )
    kinds = [type(m) for m in result.model.modules()]
    assert StructuredLinear in kinds
    assert StructuredConv2d not in kinds


def test_what_would_not_get_smaller_is_refused():
    model, task = small_mlp(classes=1), small_task()
    with pytest.raises(CompressionError, match="32 parameters, no fewer"):
        entry("circulant_linear")(model, task, where="3", epochs=0)


def test_a_layer_of_zeros_learns():
    model, task = small_mlp(), small_task()
    nn.init.zeros_(model[1].weight)
    result = fw.compress(model, task, "circulant_linear", epochs=4, lr=1e-2, onnx=False, measure=False)
    assert result.model[1].vectors.abs().sum() > 0
