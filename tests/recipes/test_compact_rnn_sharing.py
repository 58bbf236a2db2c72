"""Compact recurrent networks: the full rank changes nothing, and one factor serves recurrence and the layer behind."""

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import Sequences, small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.arguments import agrees
from featherweight.core.channels import channel_groups
from featherweight.core.cost import _layer_macs, cost
from featherweight.core.ledger import recording
from featherweight.core.recurrent import SharedRecurrent, dense_size, shared
from featherweight.errors import BadData, BadOption, CompressionError

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


def layers(hidden: int = 6):
    for make in KINDS.values():
        for both in (False, True):
            yield make(5, hidden, 3, batch_first=both, bidirectional=both, bias=not both)


def states(output):
    out, last = output
    return [out, *(last if isinstance(last, tuple) else (last,))]


def test_the_full_rank_changes_nothing():
    for layer in layers():
        new, x = shared(layer, 6), torch.randn(4, 4, 5)
        start = states(layer(x))[1:]
        hx = tuple(torch.randn_like(s) for s in start)
        for args in ((x,), (x, hx if len(hx) > 1 else hx[0])):
            for a, b in zip(states(new(*args)), states(layer(*args)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_factors_are_singular_vectors_and_least_squares():
    layer = nn.GRU(5, 8, 2)
    new = shared(layer, 3)
    w = layer.weight_hh_l0.detach()
    tail = torch.linalg.svdvals(w)[3:].square().sum().sqrt()
    _, made, *_ = new.weights()
    torch.testing.assert_close((w - made.detach()).norm(), tail)
    behind = layer.weight_ih_l1.detach()
    least = torch.linalg.lstsq(new.projection[0, 0].detach().T, behind.T).solution.T
    torch.testing.assert_close(new.between[0, 0, 0].detach(), least, rtol=1e-4, atol=1e-5)


def test_one_factor_serves_all_gates_the_recurrence_and_the_layer_behind():
    layer = shared(nn.LSTM(5, 8, 2), 3)
    assert [tuple(p.shape) for p in layer.parameters()][1] == (2, 1, 3, 8)
    matrices = [w for w in layer.weights() if w.dim() == 2]
    assert [int(torch.linalg.matrix_rank(w)) for w in matrices] == [5, 3, 3, 3]
    both = torch.cat([matrices[1], matrices[2]])  # W_hh of the first layer, W_ih of the second: one row space
    assert int(torch.linalg.matrix_rank(both)) == 3
    x = torch.randn(4, 2, 5)
    layer(x)[0].square().sum().backward()
    through = [torch.zeros(3, 8), torch.zeros(3, 8)]
    free = [w.detach().requires_grad_() for w in layer.weights()]
    torch.lstm(x, (x.new_zeros(2, 2, 8),) * 2, free, True, 2, 0.0, True, False, False)[0].square().sum().backward()
    through[0] = layer.recurrent[0, 0].T @ free[1].grad
    through[1] = layer.between[0, 0, 0].T @ free[4].grad
    torch.testing.assert_close(layer.projection.grad[0, 0], (through[0] + through[1]).detach())


def test_a_file_holds_the_factors_once_and_gives_the_layer_back(tmp_path):
    model, task = Sequences(), small_task((6, 8))
    result = fw.compress(model, task, "compact_rnn_sharing", rank=4, epochs=1, out=tmp_path, measure=False)
    assert result.report["file"]["class_free"]
    assert isinstance(result.model.recurrent, SharedRecurrent)
    held = {name: tuple(t.shape) for name, t in fw.unpack(tmp_path / "model.fw").items() if "recurrent." in name}
    assert held["recurrent.projection"] == (2, 1, 4, 20)
    x = torch.randn(3, 6, 8)
    for loaded in (fw.load(tmp_path / "model.fw"), fw.load(tmp_path / "model.fw", into=Sequences())):
        assert torch.equal(loaded.eval()(x), result.model(x))
    assert sum(torch.Size(shape).numel() for shape in held.values()) == sum(
        p.numel() for p in result.model.recurrent.parameters()
    )


def test_what_is_executed_is_counted():
    for layer in layers():
        new, x = shared(layer, 2), torch.randn(4, 4, 5)
        model = nn.Sequential(new)
        counted = cost(model, x).macs
        assert counted == round(sum(_layer_macs(model, x).values()) / 4)
        assert counted == round((16 * dense_size(layer) + new.making()) / 4)


def test_channels_that_it_reads_and_writes_stay():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.recurrent, self.out = nn.Linear(8, 5), shared(nn.GRU(5, 6), 2), nn.Linear(6, 4)

        def forward(self, x):
            return self.out(self.recurrent(self.into(x))[0][-1])

    found = channel_groups(Net(), torch.randn(4, 3, 8))
    assert found.count == 0


def test_a_trained_network_recovers():
    torch.manual_seed(0)
    model, task = Sequences(), small_task((6, 8))
    fw.fit(model, task, epochs=8, lr=1e-2)
    with recording() as ledger:
        entry("compact_rnn_sharing")(model, task, rank=3, epochs=6, lr=1e-2)
    assert ledger.notes[0].startswith("recurrent: rank 3 of 20, ")
    assert fw.evaluate(model, task).value > 0.9


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_stays_says_why():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.LSTM(8, 12, batch_first=True, proj_size=3), nn.GRU(3, 12, batch_first=True)
            self.idle, self.out = nn.RNN(4, 4), nn.Linear(12, 4)

        def forward(self, x):
            return self.out(self.b(self.a(x)[0])[0][:, -1])

    model = Two()
    with recording() as ledger:
        entry("compact_rnn_sharing")(model, small_task((6, 8)), epochs=0)
    assert "projections already" in ledger.skipped["a"]
    assert "does not call it" in ledger.skipped["idle"]
    assert isinstance(model.b, SharedRecurrent)
    assert agrees(model.b)
    with pytest.raises(CompressionError, match=r"rank 12 would need .* it has"):
        entry("compact_rnn_sharing")(Two(), small_task((6, 8)), rank=1.0)


def test_refusals_name_a_cure():
    with pytest.raises(BadOption, match="choose another method"):
        fw.compress(small_cnn(), small_task(), "compact_rnn_sharing")
    with pytest.raises(BadOption, match="from 1 to the units"):
        shared(nn.GRU(2, 3), 4)
    with pytest.raises(BadData, match="batches of sequences"):
        shared(nn.GRU(2, 3), 2)(torch.randn(5, 2))
