"""HashedNets: an index that follows from its seed, gradients summed over buckets, and more for a budget than dense."""

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import Batches, blobs, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.structured import StructuredEmbedding, StructuredLinear, from_dense
from featherweight.core.surgery import swap
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption
from structured_layers import check_structure


def test_it_is_a_sound_layer(tmp_path):
    check_structure(("hashed", 17, 3), tmp_path)


def test_as_many_values_as_buckets_and_each_is_the_mean_of_its_weights():
    dense = nn.Linear(40, 30)
    layer = from_dense(dense, ("hashed", 50, 9))
    place = layer.matrix.table.long()
    index, sign = place % 50, torch.where(place >= 50, -1.0, 1.0)
    assert len(layer.dense().abs().unique()) <= 50
    for k in range(50):
        mine = index == k
        mean = (dense.weight.flatten() * sign)[mine].mean()
        torch.testing.assert_close(layer.weights[k], mean)
        assert torch.equal(layer.dense().flatten()[mine], sign[mine] * layer.weights[k])


def test_the_gradient_is_the_sum_over_the_bucket():
    layer = from_dense(nn.Linear(12, 9), ("hashed", 7, 1))
    x, delta = torch.randn(5, 12), torch.randn(5, 9)
    layer(x).backward(delta)
    place = layer.matrix.table.long()
    entries = (delta.T @ x).flatten() * torch.where(place >= 7, -1.0, 1.0)
    torch.testing.assert_close(layer.weights.grad, torch.zeros(7).scatter_add_(0, place % 7, entries))


def test_a_bucket_for_each_weight_that_is_hit_gives_such_a_matrix_back():
    one = from_dense(nn.Linear(8, 8), ("hashed", 20, 4))
    torch.testing.assert_close(one.matrix.project(one.dense().detach())["weights"], one.weights.detach())


def test_empty_buckets_are_zero():
    layer = from_dense(nn.Linear(3, 3), ("hashed", 1000, 0))
    assert int((layer.weights != 0).sum()) <= 9
    assert layer.weights.isfinite().all()


@pytest.mark.parametrize(("compression", "expected"), [(8, [256, 16]), (64, [32, 2]), (1e6, [1, 1])])
def test_buckets_are_as_many_as_the_paper_says(compression, expected):
    model = small_mlp()
    found = entry("hashed_net")(model, small_task(), compression=float(compression), epochs=0)
    assert [found[i].matrix.size for i in (1, 3)] == expected


def test_compression_below_one_is_refused():
    with pytest.raises(BadOption, match="above 1"):
        fw.compress(small_cnn(), small_task(), "hashed_net", compression=1.0)


def test_layers_and_seeds_hash_differently():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    entry("hashed_net")(model, small_task(), epochs=0)
    assert not torch.equal(model[1].matrix.table, model[3].matrix.table)


def test_a_hashed_network_beats_a_dense_one_of_the_same_number_of_parameters():
    """The paper's claim, on 24 classes of noisy patterns, both trained in the same way from random weights."""
    x, y = blobs((64,), classes=24, n=480, noise=1.0)
    task = Task(train=Batches(x[:240], y[:240]), valid=Batches(x[240:], y[240:]))

    def reached(seed: int, hashed: bool) -> float:
        torch.manual_seed(seed)
        hidden = 64 if hashed else 4
        model = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 24))
        for number in (0, 2) if hashed else ():
            layer = model[number]
            rows, columns = layer.weight.shape
            told = ("hashed", rows * columns // 16, number)
            swap(model, str(number), StructuredLinear(columns, rows, True, told))
        params = sum(p.numel() for p in model.parameters())
        assert params <= 440
        return evaluate(fit(model, task, epochs=25, lr=1e-2), task).value

    better = [reached(seed, True) - reached(seed, False) for seed in range(2)]
    assert min(better) > 0.1


def test_embeddings_make_the_rows_that_are_asked_for(tmp_path):
    dense = nn.Embedding(30, 8, padding_idx=3)
    layer = from_dense(dense, ("hashed", 40, 2))
    ids = torch.tensor([[0, 3, 29], [4, 4, 3]])
    assert isinstance(layer, StructuredEmbedding)
    assert torch.equal(layer(ids), layer.dense()[ids])
    layer(ids).sum().backward()
    without = from_dense(nn.Embedding(30, 8, _weight=dense.weight.detach()), ("hashed", 40, 2))
    without(ids[ids != 3]).sum().backward()
    torch.testing.assert_close(layer.weights.grad, without.weights.grad)
    model = nn.Sequential(dense, nn.Flatten(), nn.Linear(24, 2))
    fresh = nn.Sequential(nn.Embedding(30, 8, padding_idx=3), nn.Flatten(), nn.Linear(24, 2))
    swap(model, "0", layer)
    fw.save(model.eval(), tmp_path / "a.fw", example_inputs=ids)
    for loaded in (fw.load(tmp_path / "a.fw"), fw.load(tmp_path / "a.fw", into=fresh)):
        assert torch.equal(loaded(ids), model(ids))
    assert fw.export.onnx(model, tmp_path / "a.onnx", example_inputs=ids).difference < 1e-5


def test_an_embedding_that_renormalises_its_rows_stays():
    model = nn.Sequential(nn.Embedding(30, 8, max_norm=1.0), nn.Flatten(), nn.Linear(24, 2))
    data = Batches(torch.randint(30, (8, 3)), torch.zeros(8).long())
    task = Task(train=data, valid=data)
    found = entry("hashed_net")(model, task, epochs=0)
    assert [type(m) for m in found] == [nn.Embedding, nn.Flatten, StructuredLinear]
