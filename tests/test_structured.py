"""Structured layers: hashes that are the same everywhere, whole operators in a graph, one count, no crash elsewhere."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import Batches, blobs
from featherweight.core.arguments import agrees
from featherweight.core.channels import channel_groups, remove_channels
from featherweight.core.cost import _layer_macs, cost
from featherweight.core.exchange import impose
from featherweight.core.ledger import recording
from featherweight.core.site import sites
from featherweight.core.structured import StructuredLinear, from_dense
from featherweight.core.structures import PIECE, Hashed, hashed, made, places
from featherweight.core.task import Task
from featherweight.errors import BadOption, UnknownName

TABLE = """
import hashlib
from featherweight.core.structures import Hashed
print(hashlib.sha256(Hashed(33, 77, 9, 6).table.numpy().tobytes()).hexdigest())
"""


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4)
    )


def test_layers_of_one_structure_share_a_table_and_it_goes_with_the_last_of_them():
    one, other = (StructuredLinear(12, 12, True, ("hashed", 7, 2)) for _ in range(2))
    table = weakref.ref(one.matrix.table)
    assert other.matrix.table is copy.deepcopy(one).matrix.table is table()
    model = nn.Sequential(one, nn.ReLU(), other)
    cost(model, torch.randn(2, 12))  # traced: the layers are operators that the graph tells of
    channel_groups(model, torch.randn(2, 12))
    del one, other, model
    gc.collect()
    assert table() is None


def test_hashes_are_those_of_splitmix64():
    """The first numbers of the public generator, started at 0 and at the finalized 0, which is 0."""
    assert [hex(v) for v in hashed(0, 0, 0, 3).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_the_index_table_comes_back_from_its_seed_in_another_process():
    found = subprocess.run([sys.executable, "-c", TABLE], capture_output=True, text=True, check=True).stdout.strip()
    assert found == "3a4c759f1179e1e63b6c3cf37e6674c36c5e9ee82b2599af6d0206bdcd0efc17"


def test_hashes_by_pieces_are_the_same():
    found = places(3, 0, PIECE + 5, 1000)[-5:]
    assert (found % 1000 == hashed(3, 0, PIECE, 5) % 1000).all()
    assert (found // 1000 == hashed(3, 1, PIECE, 5) >> 63).all()


def test_signs_and_buckets_are_even_and_independent():
    found = torch.from_numpy(places(1, 0, 1 << 16, 8)).long()
    index, minus = found % 8, found // 8
    table = torch.zeros(8, 2).index_put_((index, minus), torch.ones(()), accumulate=True)
    expected = (1 << 16) / 16
    assert float(((table - expected) ** 2 / expected).sum()) < 40  # chi-square with 15 degrees: p of about 5e-4


def test_graphs_show_a_structured_layer_whole_and_removal_pins_it():
    model, x = net(), torch.randn(4, 16)
    model[2] = from_dense(model[2], ("circulant", 0))
    found = channel_groups(model, x)
    assert {path: int((ids >= 0).sum()) for path, ids in found.outputs.items()} == {"0": 0, "4": 20, "6": 0}
    smaller = remove_channels(copy.deepcopy(model), {"4": [0, 3]}, channels=found)
    assert smaller(x).shape == (4, 4)


def test_counting_agrees_with_and_without_a_graph():
    model, x = net(), torch.randn(5, 16)
    for number, told in ((0, ("circulant", 1)), (2, ("hashed", 9, 2))):
        model[number] = from_dense(model[number], told)
    counted = {path: row.macs for path, row in cost(model, x).layers.items()}
    assert counted == {path: round(macs / 5) for path, macs in _layer_macs(model, x).items()}
    assert counted["2"] == 24 * 24


def test_a_structured_layer_runs_in_an_exported_program():
    layer, x = from_dense(nn.Linear(6, 8), ("hashed", 7, 1)), torch.randn(3, 6)
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), layer(x))


WORDS = (("circulant", 3), ("hashed", 900, 1 << 40), ("functional", 300, 2, 3, 1), ("toeplitz", 2), ("stein_cauchy", 2))


@pytest.mark.parametrize("told", WORDS, ids=lambda told: told[0])
def test_an_onnx_file_holds_the_free_parameters_and_makes_the_weight_itself(told, tmp_path):
    dense = nn.Linear(96, 128) if told[0] != "hashed" else nn.Conv2d(16, 64, 3, padding=1)
    model = nn.Sequential(from_dense(dense, told)).eval()
    x = torch.randn(2, 96) if told[0] != "hashed" else torch.randn(2, 16, 5, 5)
    report = fw.export.onnx(model, tmp_path / "a.onnx", example_inputs=x)
    assert max(report.difference, report.optimized) < 1e-5
    small = report.bytes < 4 * sum(p.numel() for p in model.parameters()) + 16_384
    assert small == (told[0] != "stein_cauchy")
    assert ("made from its free parameters" if small else "written out whole") in report.notes[0]


@pytest.mark.parametrize("told", [*WORDS[:4], ("functional", 7, 2, 0, 1), ("hashed", 1_000_003, 5)], ids=str)
def test_a_matrix_made_without_tables_is_the_same(told):
    for rows, columns in ((5, 5), (4, 9), (11, 4)):
        structure = made(told, rows, columns)
        free = {name: torch.randn(shape) for name, shape in structure.shapes().items()}
        found = structure.portable(free, torch.ones(1, dtype=torch.int64))
        if told[0] in ("circulant", "hashed"):
            assert torch.equal(found, structure.matrix(free))
        torch.testing.assert_close(found, structure.matrix(free), rtol=1e-4, atol=1e-5)


def test_half_precision_runs():
    layer = from_dense(nn.Linear(6, 8).bfloat16(), ("circulant", 1))
    assert layer(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16


def test_settings_that_are_none_are_refused():
    with pytest.raises(UnknownName, match="circulant"):
        made(("circulent", 0), 3, 3)
    with pytest.raises(BadOption, match=r"hashed takes buckets 1\.\.268435456, seed"):
        made(("hashed", 0, 0), 3, 3)
    with pytest.raises(BadOption, match="1 to 268435456 entries"):
        Hashed(1 << 15, 1 << 15, 5, 0)
    with pytest.raises(BadOption, match="cannot be structured"):
        from_dense(nn.Conv1d(2, 2, 1), ("circulant", 0))


def test_sizes_that_are_not_those_of_the_tensors_do_not_agree():
    layer = StructuredLinear(6, 8, True, ("circulant", 0))
    assert agrees(layer)
    layer.in_features = 7
    assert not agrees(layer)


def test_what_stays_as_it_was_is_told():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.unused = (nn.Linear(16, 16) for _ in range(4))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    x, y = blobs((16,))
    model, task = Tied(), Task(valid=Batches(x, y))
    with recording() as ledger:
        impose(model, task, None, lambda number, rows, columns: ("circulant", number))
    assert [type(m) for m in model.children()] == [nn.Linear, nn.Linear, StructuredLinear, nn.Linear]
    assert {"shared" in ledger.skipped[p] for p in "ab"} == {True}
    assert "did not call it" in ledger.skipped["unused"]
    assert "16 of 256 parameters" in ledger.notes[0]
    assert fw.evaluate(model, task).value is not None


def test_methods_on_plain_layers_say_that_structured_ones_stay():
    model = net()
    model[2] = from_dense(model[2], ("hashed", 9, 2))
    with recording() as ledger:
        assert list(sites(model)) == ["0", "4", "6"]
    assert "StructuredLinear" in ledger.skipped["2"]
