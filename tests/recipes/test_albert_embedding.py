"""Factorized embeddings: the error is the tail of the singular values, and a tied output layer stays tied."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import featherweight as fw
from conftest import Batches, Sentences, small_task, token_task
from featherweight.catalogue import entry
from featherweight.core.cost import cost
from featherweight.core.ledger import recording
from featherweight.core.task import Task
from featherweight.errors import BadOption, CompressionError
from independent_reader import read


class Language(nn.Module):
    """The next token from the one before; the output layer is the embedding."""

    def __init__(self, tokens: int = 40, width: int = 16, reads: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width, padding_idx=0)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, tokens)
        self.head.weight = self.embedding.weight
        self.reads = reads

    def forward(self, ids):
        h = self.inner(self.embedding(ids)).relu()
        return F.linear(h, self.embedding.weight) if self.reads else self.head(h)


def next_tokens() -> Task:
    x = torch.randint(1, 40, (64,), generator=torch.Generator().manual_seed(0))
    data = Batches(x, (x * 7) % 40)
    return Task(train=data, valid=data)


def test_the_error_is_the_tail_of_the_singular_values():
    model = Sentences()
    dense = model.embedding.weight.detach().clone()
    entry("albert_embedding")(model, token_task(), width=5, epochs=0)
    short, widen = model.embedding
    assert (tuple(short.weight.shape), tuple(widen.weight.shape), widen.bias) == ((60, 5), (24, 5), None)
    tail = torch.linalg.svdvals(dense)[5:].square().sum().sqrt()
    torch.testing.assert_close((dense - short.weight @ widen.weight.T).norm(), tail)
    ids = torch.tensor([[3, 59]])
    torch.testing.assert_close(model.embedding(ids), (short.weight @ widen.weight.T)[ids])


def test_a_matrix_of_low_rank_is_given_back():
    model = Sentences()
    low = torch.randn(60, 4) @ torch.randn(4, 24)
    model.embedding.weight.data.copy_(low)
    x = next(iter(token_task().valid))[0]
    before = model(x)
    with recording() as ledger:
        entry("albert_embedding")(model, token_task(), width=4, epochs=0)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert ledger.notes == ["embedding: 336 of 1,440 parameters, 0% of the embedding off before training"]


def test_a_tied_output_layer_stays_tied_and_is_stored_once(tmp_path):
    model, task = Language(), next_tokens()
    with torch.no_grad():
        model.embedding.weight.copy_(torch.randn(40, 3) @ torch.randn(3, 16)).mul_(torch.arange(40)[:, None] > 0)
    x = next(iter(task.valid))[0]
    before = model(x).detach()
    result = fw.compress(model, task, "albert_embedding", width=3, epochs=0, out=tmp_path, measure=False)
    found = result.model
    torch.testing.assert_close(found(x), before, rtol=1e-4, atol=1e-4)
    assert found.head[1].weight is found.embedding[0].weight
    h = torch.randn(2, 16)
    wanted = F.linear(found.head[0](h), found.embedding[0].weight, found.head[1].bias)
    assert torch.equal(found.head(h), wanted)
    assert sum(p.numel() for p in found.parameters()) == 40 * 3 + 2 * 3 * 16 + 16 * 17 + 40
    told, _ = read((tmp_path / "model.fw").read_bytes())
    assert told["ties"] == {"head.1.weight": "embedding.0.weight"}
    for loaded in (fw.load(tmp_path / "model.fw"), fw.load(tmp_path / "model.fw", into=Language())):
        assert torch.equal(loaded(x), found(x))
        assert loaded.get_submodule("head.1").weight is loaded.get_submodule("embedding.0").weight
    assert cost(found, x).macs < cost(model, x).macs  # the output layer is a product of thin matrices


def test_the_padding_row_stays_zero_and_untrained():
    model, task = Language(), next_tokens()
    model.embedding.weight.data[0] = 0
    entry("albert_embedding")(model, task, width=4, epochs=0)
    assert model.embedding[0].padding_idx == 0
    assert float(model.embedding(torch.tensor([0])).detach().abs().max()) < 1e-6
    model.embedding(torch.tensor([0, 1])).sum().backward()
    assert not model.embedding[0].weight.grad[0].any()
    assert model.embedding[0].weight.grad[1].any()


def test_a_trained_network_recovers():
    torch.manual_seed(0)
    model, task = Sentences(), token_task()
    fw.fit(model, task, epochs=20, lr=1e-2)
    result = fw.compress(model, task, "albert_embedding", width=6, epochs=20, lr=1e-2, onnx=False, measure=False)
    assert result.report["result"]["metric"] >= fw.evaluate(model, task).value - 0.1


def test_code_that_reads_the_weight_keeps_its_embedding():
    model, task = Language(reads=True), next_tokens()
    with pytest.raises(CompressionError, match="own code reads it"):
        entry("albert_embedding")(model, task, width=3, epochs=0)
    assert isinstance(model.embedding, nn.Embedding)
    assert model.head.weight is model.embedding.weight


def test_what_gets_no_smaller_and_what_is_not_there_is_refused():
    with pytest.raises(CompressionError, match="20 dimensions would need 1,680 parameters, it has 1,440"):
        entry("albert_embedding")(Sentences(), token_task(), width=20)
    with pytest.raises(BadOption, match="no Embedding layer"):
        fw.compress(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), small_task(), "albert_embedding")
