"""Functional hashing: one hash without a network is the hashing trick, and more hashes tell more weights apart."""

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core import functional_hash
from featherweight.core.functional_hash import FunctionalHash
from featherweight.core.structured import StructuredLinear, from_dense
from featherweight.core.structures import Hashed, near
from featherweight.errors import BadOption, CompressionError
from structured_layers import check_structure


def random(made: FunctionalHash, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, dtype=dtype) for name, shape in made.shapes().items()}


def test_it_is_a_sound_layer(tmp_path):
    check_structure(("functional", 9, 3, 4, 7), tmp_path)


def test_one_hash_without_a_network_is_the_hashing_trick_bit_for_bit():
    one, other = FunctionalHash(33, 20, 50, 1, 0, 5), Hashed(33, 20, 50, 5)
    weights = {"weights": torch.randn(50)}
    assert torch.equal(one.matrix(weights), other.matrix(weights))
    dense = torch.randn(33, 20)
    assert torch.equal(one.project(dense)["weights"], other.project(dense)["weights"])


def test_entries_are_the_formula_written_out():
    made = FunctionalHash(4, 6, 5, 3, 2, 1)
    free = random(made)
    wanted = torch.zeros(24)
    for p in range(24):
        places = [int(made.table[u, p]) for u in range(3)]
        read = torch.tensor([(-1) ** (q >= 5) * float(free["weights"][q % 5]) for q in places])
        hidden = torch.tanh(free["inner"] @ read + free["inner_bias"])
        wanted[p] = free["outer"] @ hidden + free["outer_bias"][0]
    torch.testing.assert_close(made.matrix(free).flatten(), wanted)


@pytest.mark.parametrize("width", [0, 3])
def test_entries_made_in_pieces_are_the_same_and_so_are_their_gradients(width, monkeypatch):
    made = FunctionalHash(9, 11, 20, 2, width, 3)
    free = {name: value.requires_grad_() for name, value in random(made).items()}
    whole = made.matrix(free)
    wanted = torch.autograd.grad(whole.square().sum(), list(free.values()))
    monkeypatch.setattr(functional_hash, "ENTRIES", 7)
    pieces = made.matrix(free)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(pieces.square().sum(), list(free.values())), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_agree_with_finite_differences():
    made = FunctionalHash(3, 4, 5, 2, 2, 0)
    free = {name: value.requires_grad_() for name, value in random(made, torch.double).items()}
    assert torch.autograd.gradcheck(lambda *v: made.matrix(dict(zip(free, v, strict=True))), tuple(free.values()))


def test_the_small_network_is_counted():
    layer = StructuredLinear(30, 20, False, ("functional", 75, 4, 4, 0))
    assert sum(p.numel() for p in layer.parameters()) == layer.matrix.size == 75 + 4 * 4 + 4 + 4 + 1
    assert layer.macs((1, 30), (1, 20)) == 600 + 600 * 4 * 5


def test_several_hashes_tell_apart_what_one_hash_makes_equal():
    hashed, several = Hashed(40, 40, 64, 0), FunctionalHash(40, 40, 64, 3, 4, 0)
    assert len(hashed.matrix({"weights": torch.randn(64)}).abs().unique()) <= 64
    assert len(several.matrix(random(several)).unique()) > 1500


def test_it_comes_nearer_to_a_weight_than_one_hash():
    matrix = torch.randn(24, 24)
    gaps = []
    for made in (Hashed(24, 24, 72, 0), FunctionalHash(24, 24, 72, 4, 4, 0)):
        gaps.append(float((made.matrix(near(made, matrix, 200)) - matrix).norm() / matrix.norm()))
    assert gaps[1] < gaps[0] < 1


def test_a_matrix_of_zeros_is_given_back():
    made = FunctionalHash(5, 5, 6, 2, 3, 0)
    assert float(made.matrix(near(made, torch.zeros(5, 5), 10)).abs().max()) < 1e-8


def test_embeddings_make_the_rows_that_are_asked_for():
    layer = from_dense(nn.Embedding(30, 8), ("functional", 20, 2, 3, 2))
    ids = torch.tensor([[0, 29], [4, 4]])
    torch.testing.assert_close(layer(ids), layer.dense()[ids])


def test_a_trained_perceptron_is_still_right():
    model, task = small_mlp(), small_task()
    fw.fit(model, task, epochs=8, lr=1e-2)
    result = fw.compress(model, task, "funhash", epochs=8, lr=1e-2, onnx=False, measure=False)
    assert result.model[1].matrix.size == 256 + 25
    assert result.report["result"]["metric"] > 0.9


def test_what_gets_no_smaller_and_what_is_out_of_range_is_refused():
    with pytest.raises(CompressionError, match="no fewer than now"):
        entry("funhash")(small_mlp(), small_task(), where="3", width=64)
    with pytest.raises(BadOption, match="hashes=0"):
        fw.compress(small_mlp(), small_task(), "funhash", hashes=0)
