"""Codecs of tensors in transit: what every one keeps, what each is good at, and gradients that travel as bytes."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import featherweight as fw
from featherweight.catalogue import entries
from featherweight.cli import app
from featherweight.coding import Packed
from featherweight.errors import BadData, BadOption, UnknownName

CODECS = sorted(entries("codec"))
TREES = ("dettmers8_dynamic_tree", "dettmers8_static_tree")
each = pytest.mark.parametrize("name", CODECS)


def log_uniform(n: int, decades: float = 5) -> torch.Tensor:
    sign = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    return sign * 10 ** (-decades * torch.rand(n))


@each
def test_it_is_listed_explained_and_no_method(name):
    one = entries("codec")[name]
    assert one.paper
    assert one.doc
    assert "Departs from the paper: " in (inspect.getdoc(inspect.getmodule(one.function)) or "")
    shown = CliRunner().invoke(app, ["methods", name])
    assert shown.exit_code == 0
    assert "featherweight.codec(" in shown.stdout
    listed = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    assert {"id": name, "kind": "codec"}.items() <= next(row for row in listed if row["id"] == name).items()
    with pytest.raises(UnknownName, match="a codec for tensors in transit, no method"):
        fw.compress(torch.nn.Linear(2, 2), fw.Task(valid=[torch.zeros(1, 2)]), name)


@each
def test_the_table_is_ascending_in_minus_one_to_one_and_comes_back_exactly(name):
    codec = fw.codec(name)
    table = codec.table
    assert table.dtype == torch.float32
    assert 255 <= len(table) <= 256
    assert bool((table.diff() > 0).all())
    assert float(table.abs().max()) == 1.0
    assert bool((table == 0).any())
    assert torch.equal(codec.decode(codec.encode(table)), table)
    assert torch.equal(codec.encode(table).codes.long(), torch.arange(len(table)))


@each
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 300), st.one_of(st.none(), st.integers(1, 70)), st.integers(0, 999))
def test_every_element_gets_the_nearest_number_and_a_second_time_the_same(name, n, block, seed):
    codec = fw.codec(name, block=block)
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 10
    packed = codec.encode(x)
    found = codec.decode(packed)
    size = packed.scales.repeat_interleave(block or n)[:n]
    nearest = (x[:, None] / size[:, None] - codec.table).abs().amin(1)
    torch.testing.assert_close((x - found).abs() / size, nearest, atol=1e-6, rtol=1e-4)
    assert torch.equal(codec.encode(found, packed.scales).codes, packed.codes)
    assert torch.equal(codec.decode(codec.encode(found, packed.scales)), found)


@each
@pytest.mark.parametrize(("shape", "block", "scales"), [((1000,), None, 1), ((10, 10, 10), 64, 16), ((7,), 7, 1)])
def test_the_size_is_a_byte_for_each_element_and_four_for_each_scale(name, shape, block, scales):
    packed = fw.codec(name, block=block).encode(torch.randn(shape))
    count = torch.Size(shape).numel()
    assert packed.codes.dtype == torch.uint8
    assert packed.bytes == count + 4 * scales
    assert packed.codes.numel() * packed.codes.element_size() + packed.scales.numel() * 4 == packed.bytes


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_shape_and_type_come_back_and_what_is_lost_is_small(name, dtype):
    x = torch.randn(3, 5, 7).to(dtype)
    codec = fw.codec(name)
    found = codec.decode(codec.encode(x))
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert float((found.double() - x.double()).norm() / x.double().norm()) < 0.05


@each
def test_empty_and_zero_tensors(name):
    for block in (None, 4):
        codec = fw.codec(name, block=block)
        empty = codec.decode(codec.encode(torch.zeros(3, 0, 2)))
        assert empty.shape == (3, 0, 2)
        assert codec.decode(codec.encode(torch.tensor(2.5))).item() == 2.5
        zeros = codec.encode(torch.zeros(10))
        assert torch.equal(codec.decode(zeros), torch.zeros(10))
    tiny = torch.tensor([1e-40, -1e-40, 0.0])
    assert bool(fw.codec(name).decode(fw.codec(name).encode(tiny)).isfinite().all())


@each
def test_bad_input_is_refused(name):
    codec = fw.codec(name)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(BadData, match="NaN or sizes beyond float32"):
            codec.encode(torch.tensor([1.0, bad]))
    with pytest.raises(BadData, match="beyond float32"):
        codec.encode(torch.tensor([1e300], dtype=torch.float64))
    with pytest.raises(BadData, match="packs floating-point tensors"):
        codec.encode(torch.arange(3))
    with pytest.raises(BadData, match="decode with the codec that encoded it"):
        codec.decode(Packed(torch.zeros(4, dtype=torch.uint8), torch.ones(1), (5,), torch.float32))
    with pytest.raises(BadData, match="the same block"):
        fw.codec(name, block=2).decode(codec.encode(torch.randn(10)))
    with pytest.raises(BadOption, match="block=0"):
        fw.codec(name, block=0)


@each
def test_what_was_never_sent_is_refused(name):
    codec = fw.codec(name, block=2)
    packed = codec.encode(torch.tensor([1.0, -0.5, 2.0]))
    for bad in (float("nan"), float("inf"), -1.0):
        scales = torch.tensor([1.0, bad])
        with pytest.raises(BadData, match="not finite, or below zero"):
            codec.decode(replace(packed, scales=scales))
        with pytest.raises(BadData, match="one for each"):
            codec.encode(torch.ones(3), scales)
    for scales in (torch.ones(()), torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(BadData, match="scales are no tensor of the shape"):
            codec.decode(replace(packed, scales=scales))
        with pytest.raises(BadData, match="for 2 blocks: give one for each"):
            codec.encode(torch.ones(3), scales)
    whole = replace(codec, table=codec.table[:100])
    with pytest.raises(BadData, match="has 100 numbers, given the code 100"):
        whole.decode(replace(packed, codes=torch.tensor([0, 99, 100], dtype=torch.uint8)))
    with pytest.raises(BadData, match="not finite"):  # the mark is all scales and codes of zero
        codec.decode(replace(packed, codes=torch.ones_like(packed.codes), scales=torch.full((2,), torch.nan)))


def test_an_unknown_codec_is_answered_with_the_nearest():
    with pytest.raises(UnknownName, match="dettmers8_linear"):
        fw.codec("dettmers8_linea")


@pytest.mark.parametrize("name", TREES)
def test_trees_lose_less_of_every_element_than_equal_distances_on_log_uniform_data(name):
    x = log_uniform(20000)

    def relative(codec: str) -> float:
        found = fw.codec(codec)
        return float(((found.decode(found.encode(x)) - x) / x).abs().mean())

    assert relative(name) < 0.1
    assert relative(name) < 0.2 * relative("dettmers8_linear")
    assert relative("dettmers8_mantissa") < relative("dettmers8_linear")


def test_equal_distances_lose_least_of_uniform_data():
    x = 2 * torch.rand(20000) - 1

    def squared(codec: str) -> float:
        found = fw.codec(codec)
        return float((found.decode(found.encode(x)) - x).square().mean())

    assert min(CODECS, key=squared) == "dettmers8_linear"
    assert squared("dettmers8_linear") == pytest.approx((1 / 127) ** 2 / 12, rel=0.05)


def test_the_dynamic_tree_is_the_table_that_its_author_publishes():
    """Of each exponent 2^i numbers on either side; the first and the last of each, by hand."""
    table = fw.codec("dettmers8_dynamic_tree").table.double()
    assert len(table.unique()) == 256
    for i in range(7):
        within = table[(table > 0.1 * 10.0 ** (i - 6)) & (table < 10.0 ** (i - 6))]
        assert len(within) == 2**i
        step = 0.9 / 2**i
        assert float(within.min()) == pytest.approx((0.1 + step / 2) * 10.0 ** (i - 6))
        assert float(within.max()) == pytest.approx((1 - step / 2) * 10.0 ** (i - 6))


def test_blocks_keep_an_outlier_from_its_neighbours():
    x = torch.randn(4096)
    x[7] = 1e4

    def lost(block: int | None) -> float:
        codec = fw.codec("dettmers8_linear", block=block)
        return float((codec.decode(codec.encode(x)) - x).square().sum())

    assert lost(64) < 0.05 * lost(None)


TRAIN = """
import json
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from featherweight.coding import codec

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + folder + "/meet", rank=rank, world_size=2)
torch.manual_seed(1)
y = torch.arange(128) % 4
x = torch.randn(4, 16)[y] + 0.3 * torch.randn(128, 16)
reached, sent = {}, 0
for name in (None, "dettmers8_dynamic_tree"):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    if name:
        packer = codec(name)

        def hook(group, bucket):
            global sent
            sent += packer.encode(bucket.buffer()).bytes
            return packer.exchange(group, bucket)

        model.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rank::2]), y[rank::2]).backward()
        optimizer.step()
    with torch.no_grad():
        reached[name or "float"] = nn.functional.cross_entropy(model.module(x), y).item()
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(both[0], both[1]), "both processes hold the same network"
print(json.dumps({**reached, "sent": sent / 12 / (4 * len(mine))}))
dist.destroy_process_group()
"""


BROKEN = """
import sys
import torch
import torch.distributed as dist
from featherweight.coding import codec


class Bucket:
    def __init__(self, values):
        self.values = values

    def buffer(self):
        return self.values


rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + folder + "/meet", rank=rank, world_size=2)
packer = codec("dettmers8_linear", block=4)
for bad in (float("nan"), float("inf")):
    mean = packer.exchange(None, Bucket(torch.tensor([1.0] * 5 + [bad if rank else 1.0]))).value()
    assert bool(mean.isnan().all()), mean
    assert torch.equal(packer.exchange(None, Bucket(torch.ones(6))).value(), torch.ones(6))
dist.destroy_process_group()
"""


def test_what_one_process_cannot_encode_is_nan_on_all(tmp_path):
    commands = [[sys.executable, "-c", BROKEN, str(rank), str(tmp_path)] for rank in range(2)]
    runs = [subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for one in commands]
    errors = [one.communicate(timeout=240)[1] for one in runs]
    assert [one.returncode for one in runs] == [0, 0], errors


def test_two_processes_train_alike_on_gradients_that_travel_as_bytes(tmp_path):
    commands = [[sys.executable, "-c", TRAIN, str(rank), str(tmp_path)] for rank in range(2)]
    runs = [subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for one in commands]
    (out, error), (_, other) = (one.communicate(timeout=240) for one in runs)
    assert [one.returncode for one in runs] == [0, 0], error + other
    told = json.loads(out.strip().split("\n")[-1])
    assert told["float"] < 0.2
    assert told["dettmers8_dynamic_tree"] == pytest.approx(told["float"], rel=0.05)
    assert told["sent"] < 0.26
