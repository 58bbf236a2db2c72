"""A .fw file from a stranger: damaged or made with malice, its checksums right or wrong, it cannot do harm.

`benchmarks/hostile.py` opens these mutations by the hundred thousand; here are a few hundred, and what was found.
"""

from __future__ import annotations

import json
import resource
import time
from collections import Counter
from collections.abc import Callable
from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.coding import inspect, load, save, unpack, unpack_codes, unpack_tensor
from featherweight.coding.bits import pack_list, varint
from featherweight.coding.container import assemble
from featherweight.coding.manifest import NODES, pack_manifest, unpack_manifest
from featherweight.core.arguments import ARGUMENTS, fits
from featherweight.core.layers import LEAVES, MOST
from featherweight.errors import BadData, BadOption, FeatherweightError, FormatError, UnknownName
from golden_models import GoldenNet
from hostile_seeds import Seed, seeds
from mutated_bytes import deflated
from mutations import mutated, parts
from opening import opened, opened_tensor
from test_coding import Net, Tied

SECONDS = 2.0  # the longest that any of these files may take
MEMORY = 500 << 20  # bytes by which the process may grow over any of them
Change = Callable[[dict], object]


def seed(name: str) -> Seed:
    return next(one for one in seeds() if one.name == name)


@pytest.mark.parametrize("one", {one.name: one for one in seeds()}.values(), ids=lambda one: one.name)
def test_an_honest_file_opens_in_every_way(one: Seed, tmp_path: Path) -> None:
    (tmp_path / "a.fw").write_bytes(one.data)
    outcome = opened(tmp_path / "a.fw", one.fresh)
    assert not outcome.wrong
    assert {way for way, kind, _ in outcome.answers if kind == "ok"} >= {"unpack", "codes", "inspect", "into"}


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("turn", range(4))
def test_mutated_files_give_a_sound_model_or_one_sentence(turn: int, sign: bool, tmp_path: Path) -> None:
    rng, path, answers = np.random.default_rng([turn, sign]), tmp_path / "a.fw", Counter()
    for _ in range(60 if sign else 30):
        one = seeds()[int(rng.integers(len(seeds())))]
        what, data = mutated(one.data, rng, sign=sign, shapes=one.shapes)
        path.write_bytes(data)
        outcome = opened(path, one.fresh)
        assert not outcome.wrong, (one.name, what, outcome.wrong)
        answers.update(f"{way} {kind}" for way, kind, _ in outcome.answers)
        if one.data[0] < 0xE0:  # a compact file has no records
            assert not opened_tensor(mutated(parts(one.data)[1][-1], rng, sign=False)[1]).wrong
    if sign:  # the mutations reach every part, and some leave a model
        assert min(answers[f"into {kind}"] for kind in ("ok", "FormatError", "BadData")) > 0
    else:
        assert answers["into ok"] <= 2  # checksums find what no one hides (a doubled byte may change nothing)


@pytest.mark.parametrize("name", ["full", "bare", "network", "network_bare", "small", "network_compact"])
def test_a_truncated_file_is_refused_wherever_it_ends(name: str, tmp_path: Path) -> None:
    one = seed(name)
    for end in [*range(12), *range(12, len(one.data), 23), len(one.data) - 1]:
        (tmp_path / "a.fw").write_bytes(one.data[:end])
        with pytest.raises(FormatError, match=r"truncated|not a \.fw file"):
            load(tmp_path / "a.fw", into=one.fresh())


# --- what is declared and what is there -------------------------------------------------------------------------------

F32, TABLE_OF_2 = 0, b"\x20\x02\xf0"


def head(*shape: int, kind: int = F32) -> bytes:
    return bytes([kind | len(shape) << 5]) + b"".join(varint(size) for size in shape)


def grid(
    integers: int, size: int, low: int = 0, scale: bytes = head() + b"\xf0", zero: bytes = head() + b"\xf0"
) -> bytes:
    return b"\x03" + bytes([integers << 5]) + varint(low) + varint(size) + scale + zero


BOMBS = {
    "zeros": (head(1 << 39) + b"\xf0", "far more data"),
    "raw": (head(1 << 20, 1 << 26) + b"\x00", "far more data"),
    "product of sizes beyond 64 bits": (head(*[1 << 39] * 6) + b"\xf0", "has the shape"),
    "a size of zero beside huge ones": (head(0, 1 << 39, 1 << 39) + b"\xf0", "has the shape"),
    "one value a billion times": (head(1 << 30) + b"\x02" + head(1) + b"\x00" + b"\0\0\x80\x3f\x00", "far more data"),
    "fixed width": (head(1 << 20) + b"\x02" + head(3) + b"\xf0\x00" + b"\0" * 100, "262144 more bytes are declared"),
    "a table larger than its tensor": (head(2) + b"\x02" + head(1 << 30) + b"\xf0", "far more data"),
    "a table of another type": (head(2) + b"\x02" + head(2, kind=5) + b"\xf0\0\0", "table of values"),
    "an alphabet of 2**32": (head(4) + grid(4, 1 << 32) + b"\x04", "an alphabet of 4294967296 symbols has a table"),
    "an alphabet of 2**60": (head(4) + grid(4, 1 << 60) + b"\x04", "symbols"),
    "more entries than elements": (head(4) + b"\x02" + TABLE_OF_2 + b"\x11\x00" + varint(1 << 40), "more entries"),
    "gaps that add up to less than nothing": (
        head(4) + b"\x02" + TABLE_OF_2 + bytes([1 | 63 << 2, 0, 2, 0]) + b"\xff" * 20,
        "impossible gaps",
    ),
    "a gap beyond the end": (
        head(4) + b"\x02" + TABLE_OF_2 + bytes([1 | 30 << 2, 0, 1, 0]) + b"\xff" * 4 + b"\0\xff",
        "beyond the end of its tensor",
    ),
    "a background beyond the alphabet": (head(4) + b"\x02" + TABLE_OF_2 + b"\x02\x02\0\0", "background"),
    "a layout within a layout": (head(4) + b"\x02" + TABLE_OF_2 + b"\x02\x00\x02\x00", "unknown layout"),
    "a symbol beyond its alphabet": (head(4) + b"\x02" + head(3) + b"\xf0\x00\xff", "outside its alphabet"),
    "lengths that are no prefix code": (head(9) + b"\x02" + head(3) + b"\xf0\x04\x00\xff\x01\xff", "no prefix code"),
    "code words that end too early": (head(99) + b"\x02" + TABLE_OF_2 + b"\x04\x00\x48\x01\xff", "99 code words"),
    "frequencies that are all zero": (head(9) + b"\x02" + head(3) + b"\xf0\x08\x00\xff\x01\xff", "impossible sum"),
    "a list that does not end": (head(9) + b"\x02" + head(3) + b"\xf0\x04\x00\x00", "does not end"),
    "a list of more integers than bits": (head(9) + b"\x02" + head(65536) + b"\xf0\x04\x00\x00", "65536 integers"),
    "a range code of nothing": (head(9) + b"\x02" + TABLE_OF_2 + b"\x08\x0f" + b"\0" * 8, "corrupt"),
    "an ANS code that ends in a zero": (head(9) + b"\x02" + TABLE_OF_2 + b"\x0c\x00\x48\x01\x00", "ends in a zero"),
    "an adaptive code beyond its range": (  # found: it grows with every byte that is read
        head(9) + b"\x02" + TABLE_OF_2 + b"\x10\x00\x09\x54\x06" + b"\xff" * 5 + b"\x01",
        "head of a context-adaptive code",
    ),
    "an adaptive code of no rate": (head(9) + b"\x02" + TABLE_OF_2 + b"\x10\x00\x09\x04\x00", "context-adaptive code"),
    "an adaptive code that goes on": (
        head(1) + b"\x02" + TABLE_OF_2 + b"\x10\x00\x09\x54\x20" + b"\x7f" * 32,
        "context-adaptive code goes on",
    ),
    "an unknown type": (bytes([0x1E, 0]), "type 30"),
    "an unknown layout": (head(3) + b"\x07", "unknown layout 7"),
    "an unknown storage": (head(3) + b"\x80" + b"\0" * 12, "unknown type 8"),
    "33 dimensions": (bytes([7 << 5, 33]) + b"\x01" * 33 + b"\xf0", "33 dimensions"),
    "an integer of 70 bits": (bytes([1 << 5]) + b"\xff" * 10, "longer than 63 bits"),
    "tables in tables": ((head(1) + b"\x02") * 2000, "unknown layout 2"),
    "codebooks that do not fit": (head(4, 4) + b"\x04" + head(2, 2, 3) + b"\xf0\0\0", "codebooks do not fit"),
    "an axis that is not there": (head(4) + b"\x03\x85\0\x02" + (head() + b"\xf0") * 2 + b"\0\0", "does not fit"),
    "integers beyond their type": (head(4) + grid(0, 2, low=600) + b"\0\0", r"from 300 to 301 are no torch\.uint8"),
    "a grid of floats of 8 bits": (  # found: such types cannot be multiplied
        head(4, kind=15) + grid(0, 2, scale=head(kind=15) + b"\xf0") + b"\0\0",
        "does not fit",
    ),
    "a zero point of 8 bits": (head(4) + grid(0, 2, zero=head(kind=16) + b"\xf0") + b"\0\0", "does not fit"),
    "a zero point of unsigned 16 bits": (head(4) + grid(0, 2, zero=head(kind=10) + b"\xf0") + b"\0\0", "does not fit"),
    "a zero point that is true": (head(4) + grid(0, 2, zero=head(kind=9) + b"\xf0") + b"\0\0", "does not fit"),
    "signs of integers": (
        head(4, 1, kind=8) + b"\x14" + head(1, 2, 1, kind=8) + b"\xf0\x00\0\x00\0",
        "signs of zeros",
    ),
    "planes of a complex number": (head(4, kind=14) + b"\x01" + b"\0" * 100, "planes of bytes"),
    "planes of constants": (head(1 << 21) + b"\x01" + (b"\x04" + pack_list([1] + [0] * 255)) * 4, "far more data"),
    "nothing": (b"", "truncated"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_declared_sizes_are_checked_before_anything_is_allocated(name: str) -> None:
    data, sentence = BOMBS[name]
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=sentence):
        unpack_tensor(data)
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def test_short_streams_are_short_work() -> None:
    """Found: each Huffman stream of three bytes cost a table of 65536 entries."""
    record = head(2) + b"\x02" + TABLE_OF_2 + b"\x04\x00\x48\x01\x40"
    assert unpack_tensor(record).tolist() == [0.0, 0.0]
    start = time.process_time()
    for _ in range(2000):
        unpack_tensor(record)
    assert time.process_time() - start < SECONDS


def test_a_large_honest_file_says_how_to_raise_the_limit(tmp_path: Path) -> None:
    model = nn.Linear(2100, 2100, bias=False)
    model.weight.data.zero_()
    save(model, tmp_path / "a.fw")
    with pytest.raises(FormatError, match="limit="):
        unpack(tmp_path / "a.fw")
    assert unpack(tmp_path / "a.fw", limit=1 << 26)["weight"].shape == (2100, 2100)
    fresh = load(tmp_path / "a.fw", into=nn.Linear(2100, 2100, bias=False))
    assert not fresh.weight.any()


def test_whatever_a_model_holds_fits_into_its_own_allowance(tmp_path: Path) -> None:
    """Constant, sparse or skewed: the shorter the file, the less its length allows; the model itself allows it."""
    at = torch.arange(3_000_000).view(3000, 1000)
    for weight in (
        torch.ones(3000, 1000),
        (at % 1000 == 0).float(),
        (at % 7 == 0).float(),
    ):
        model = nn.Linear(1000, 3000, bias=False)
        model.weight.data.copy_(weight)
        for coder in ("huffman", "range", "ans"):
            save(model, tmp_path / "a.fw", coder=coder)
            fresh = load(tmp_path / "a.fw", into=nn.Linear(1000, 3000, bias=False))
            assert torch.equal(fresh.weight, model.weight)


# --- the description of the model -------------------------------------------------------------------------------------


def with_manifest(change: Change, name: str = "compressed huffman") -> bytes:
    manifest, records, bare = parts(seed(name).data)
    data = unpack_manifest(manifest)
    change(data)
    return assemble(deflated(json.dumps(data).encode()), list(records), bare)


def refused(
    tmp_path: Path, data: bytes, kind: type[FeatherweightError], sentence: str, fresh: Callable[[], nn.Module] = Net
) -> None:
    """Asserts that loading fails with just this error, and that no other way of opening does worse."""
    (tmp_path / "a.fw").write_bytes(data)
    with pytest.raises(kind, match=sentence) as caught:
        load(tmp_path / "a.fw", into=fresh())
    assert type(caught.value) is kind
    assert not opened(tmp_path / "a.fw", fresh).wrong


def linear(**args: object) -> dict:
    return {"type": "Linear", "args": {"in_features": 8, "out_features": 4, "bias": True, **args}}


def norm(**args: object) -> dict:
    return {"type": "BatchNorm2d", "args": {"num_features": 6, **args}}


def conv(**args: object) -> dict:
    return {"type": "Conv2d", "args": {"in_channels": 1, "out_channels": 1, "kernel_size": 1, **args}}


def nested(depth: int) -> dict:
    return linear() if depth == 0 else {"type": "Sequential", "layers": {"0": nested(depth - 1)}}


LARGE = {"in_features": 1 << 14, "out_features": 1 << 14}


def hashed(*structure: object, **args: object) -> dict:
    sizes = {"in_features": 8, "out_features": 4, "bias": False, "structure": list(structure)}
    return {"type": "StructuredLinear", "args": {**sizes, **args}}


def recurrent(**args: object) -> dict:
    told = {"cell": "GRU", "input_size": 2, "hidden_size": 3, "num_layers": 1, "bias": False, "batch_first": True}
    return {"type": "SharedRecurrent", "args": {**told, "dropout": 0.0, "bidirectional": False, "rank": 2, **args}}


SWAPS = {
    "a recurrent cell that does not exist": (recurrent(cell="gru"), "'gru' as cell"),
    "a rank beyond the units": (recurrent(rank=4), "rank must be from 1"),
    "recurrent matrices of 2^40 entries": (recurrent(hidden_size=1 << 20), "268435456 entries"),
    "a structure that does not exist": (hashed("magic", 1), "as structure"),
    "a structure of too many settings": (hashed("hashed", 4, 0, 0), "as structure"),
    "a structure of a large seed": (hashed("hashed", 4, 1 << 62 | 1), "as structure"),
    "a structure of a true seed": (hashed("circulant", True), "as structure"),
    "a structure that is no list": (hashed(structure="circulant"), "as structure"),
    "a structure within a structure": (hashed("hashed", [4], 0), "as structure"),
    "a matrix of 2^40 entries from one": (
        hashed("hashed", 1, 0, in_features=1 << 20, out_features=1 << 20),
        "1 to 268435456",
    ),
    "matrices of 2^29 entries together": (
        {"type": "Sequential", "layers": {str(i): hashed("hashed", 1, 0, **LARGE) for i in range(2)}},
        "of 536870912 entries, and those of a file may have 1 to 268435456 together",
    ),
    "a matrix of nothing": (hashed("hashed", 1, 0, in_features=0), "1 to 268435456"),
    "a huge layer": (linear(in_features=1 << 50), "1125899906842624 as in_features"),
    "a negative layer": (linear(in_features=-1), "-1 as in_features"),
    "a layer of text": (linear(in_features="8"), "'8' as in_features"),
    "a layer of halves": (linear(in_features=8.5), "8.5 as in_features"),
    "a layer of true features": (linear(in_features=True), "True as in_features"),
    "a bias that is no flag": (linear(bias=7), "7 as bias"),
    "an unknown argument": (linear(device="cuda"), "'device', which it does not have"),
    "an unknown type": ({"type": "os.system", "args": {"command": "true"}}, "'os.system', which is none of"),
    "a type that is no text": ({"type": ["Linear"], "args": {}}, "a list of 1, which is none of"),
    "a type of a thousand letters": ({"type": "x" * 500, "args": {}}, r"xxx\.\.\., which is none of"),
    "no arguments": ({"type": "Linear"}, "which is none of"),
    "too few arguments": ({"type": "Linear", "args": {}}, "cannot be built"),
    "deep nesting": (nested(9), "more than 8 inside one another"),
    "a Sequential of nothing": ({"type": "Sequential"}, "a Sequential without layers"),
    "a Sequential of a number": ({"type": "Sequential", "layers": {"0": 3}}, "type None"),
    "a dotted name": ({"type": "Sequential", "layers": {"a.b": linear()}}, r"'a\.b', which is no name"),
    "a name of nothing": ({"type": "Sequential", "layers": {"": linear()}}, "'', which is no name"),
    "a name that is a method": ({"type": "Sequential", "layers": {"forward": linear()}}, "'forward', which is no name"),
    "groups of zero": (conv(groups=0), "0 as groups"),
    "a stride of zero": (conv(stride=[0, 1]), "as stride"),
    "a kernel of three dimensions": (conv(kernel_size=[1, 1, 1]), "as kernel_size"),
    "a kernel of a thousand dimensions": (conv(kernel_size=[1] * 1000), "as kernel_size"),
    "a padding that does not exist": (conv(padding_mode="mirror"), "as padding_mode"),
    "an epsilon of text": (norm(eps="small"), "'small' as eps"),
    "a momentum of a list": (norm(momentum=[0.1]), "as momentum"),
    "the same as nothing": ({"same": "conv9"}, "'conv9', which it does not describe"),
    "the same as itself": ({"same": "head"}, "'head', which it does not describe"),
    "the same as a number": ({"same": 3}, "3, which it does not describe"),
    "too many layers": (
        {"type": "Sequential", "layers": {str(i): {"type": "Identity", "args": {}} for i in range(MOST)}},
        f"more than the {MOST}",
    ),
}


@pytest.mark.parametrize("name", SWAPS)
def test_layers_that_a_file_may_not_build_are_refused(name: str, tmp_path: Path) -> None:
    spec, sentence = SWAPS[name]
    refused(tmp_path, with_manifest(lambda m: m["swaps"].update(head=spec)), FormatError, sentence)


def test_a_layer_of_a_terabyte_takes_no_memory_before_its_tensors_are_there(tmp_path: Path) -> None:
    data = with_manifest(lambda m: m["swaps"].update(head=linear(in_features=1 << 19, out_features=1 << 19)))
    refused(tmp_path, data, BadData, r"head\.\w+ has the shape")


def test_layers_that_contain_themselves_are_refused(tmp_path: Path) -> None:
    """Found: a layer that stands inside itself was walked without end."""
    inner = {"type": "Sequential", "layers": {"0": linear()}}
    data = with_manifest(lambda m: m["swaps"].update({"head": inner, "head.0": {"same": "head"}}))
    refused(tmp_path, data, FormatError, r"replaces head\.0, which lies inside another")


def test_every_argument_of_every_layer_has_a_check() -> None:
    assert {name for _, names in LEAVES.values() for name in names} == ARGUMENTS.keys()
    for kind, (_, names) in LEAVES.items():
        for name in names:
            for odd in ("odd", nan, (), ("a",), (1,) * 99, -(1 << 70), 1 << 70, (-(1 << 70),)):
                assert not fits(kind, name, odd), (kind, name, odd)


EDITS = {
    "a private attribute": ({"": {"_fw_codes": 1}}, FormatError, "'_fw_codes' of '' is no name of a public attribute"),
    "a class": ({"conv1": {"__class__": 1}}, FormatError, "no name of a public attribute"),
    "an attribute of a class": ({"conv1": {"__class__.call_super_init": 1}}, FormatError, "no name of a public"),
    "an inner private attribute": ({"conv1": {"weight._version": 1}}, FormatError, "no name of a public attribute"),
    "text": ({"conv1": {"out_channels": "6"}}, FormatError, "no integer"),
    "a fraction": ({"conv1": {"out_channels": 6.0}}, FormatError, "no integer"),
    "true": ({"conv1": {"out_channels": True}}, FormatError, "no integer"),
    "an object": ({"conv1": {"out_channels": {"a": 1}}}, FormatError, "no integer"),
    "a huge number": ({"conv1": {"out_channels": 1 << 80}}, FormatError, "beyond 63 bits"),
    "an absent attribute": ({"conv1": {"absent": 1}}, BadData, r"no attribute conv1\.absent"),
    "an absent layer": ({"conv9": {"out_channels": 1}}, BadData, "no layer conv9"),
    "a method": ({"conv1": {"forward": 1}}, BadData, r"no attribute conv1\.forward"),
    "a flag": ({"conv1": {"training": 7}}, BadData, r"no attribute conv1\.training"),
    "a flag of all modules": ({"conv1": {"call_super_init": 1}}, BadData, "no attribute conv1"),
    "a size of a tensor": ({"conv1": {"weight.shape": [6, 1, 3, 3]}}, BadData, "no attribute conv1"),
    "a flag of a tensor": ({"conv1": {"weight.requires_grad": 0}}, BadData, "no attribute conv1"),
    "more numbers than were there": ({"conv1": {"stride": [1, 1, 1]}}, BadData, "no attribute conv1"),
    "a number for a list": ({"conv1": {"stride": 1}}, BadData, "no attribute conv1"),
    "another width than its tensors": ({"conv1": {"out_channels": 7}}, FormatError, "other sizes than its tensors"),
    "groups of zero": ({"conv1": {"groups": 0}}, FormatError, "other sizes than its tensors"),
    "another number of features": ({"bn": {"num_features": 5}}, FormatError, "other sizes than its tensors"),
}


@pytest.mark.parametrize("name", EDITS)
def test_attributes_that_a_file_may_not_change_are_refused(name: str, tmp_path: Path) -> None:
    edits, kind, sentence = EDITS[name]
    refused(tmp_path, with_manifest(lambda m: m.update(edits=edits)), kind, sentence)
    assert nn.Module.call_super_init is False


class Holding(GoldenNet):
    """Holds what no file may reach through: a module of Python, a class, a function."""

    def __init__(self) -> None:
        super().__init__()
        self.python, self.kind, self.function = json, Net, seed

    @property
    def frozen(self) -> int:
        return 3


@pytest.mark.parametrize("key", ["python.level", "kind.call_super_init", "function.level", "frozen"])
def test_attributes_of_what_is_not_the_model_are_out_of_reach(key: str, tmp_path: Path) -> None:
    """Found: through an attribute that holds a module of Python, a file could set the module's numbers."""
    json.level = seed.level = 1
    data = with_manifest(lambda m: m["edits"][""].update({key: 2}), "network")
    refused(tmp_path, data, BadData, key, Holding)
    assert json.level == seed.level == 1
    assert nn.Module.call_super_init is False


def form(kind: str, at: str = "input", tensor: str = "b.factor", number: int = 0, **given: object) -> dict:
    return {at: {"type": kind, "settings": given, "tensors": {tensor: number}}}


FORMS = {
    "an unknown form": ({"head": form("Popen")}, UnknownName, "unknown form 'Popen'"),
    "an unknown place": ({"head": form("Half", "inside", bits=1)}, UnknownName, "unknown place of a form 'inside'"),
    "an absent layer": ({"tail": form("Half", bits=1)}, BadData, "no layer tail"),
    "an absent tensor": ({"head": form("Half", number=99, bits=1)}, FormatError, "not numbered from 0"),
    "a negative tensor": ({"head": form("Half", number=-1, bits=1)}, FormatError, "'input' of 'head' is no form"),
    "no tensor": (
        {"head": {"input": {"type": "Half", "settings": {"bits": 1}, "tensors": {}}}},
        FormatError,
        "describes 14 tensors and has 15",
    ),
    "other settings": ({"head": form("Half", width=1)}, FormatError, "a form Half has the settings bits"),
    "a name that is a method": ({"head": form("Half", tensor="b.forward", bits=1)}, FormatError, "tensor 'forward'"),
    "a name that is a path": ({"head": form("Half", tensor="b.a.b", bits=1)}, FormatError, "is no form"),
    "a name of another kind": ({"head": form("Half", tensor="x.factor", bits=1)}, FormatError, "is no form"),
    "no form": ({"head": {"input": 3}}, FormatError, "'input' of 'head' is no form"),
    "a grid without a scale": ({"head": form("ActivationGrid", low=0, high=3)}, FormatError, "without one scale"),
    "a gradient of text": ({"head": form("DoReFaGradient", "grad", bits="4")}, FormatError, "of impossible bits"),
    "a mask without a mask": ({"head": form("Mask", grad="kept")}, FormatError, "a Mask whose mask"),
    "a codebook of floats": ({"head": form("Codebook", tensor="b.index")}, FormatError, "without integers"),
    "a grid of weights": ({"head": form("SymmetricGrid", bits=4, axis="x")}, FormatError, "SymmetricGrid whose bits"),
    "a weight's grid, a block of 2^24 each": (
        {
            "head": {
                "input": {
                    "type": "FixedGrid",
                    "settings": {"low": 0, "high": 3, "axis": None, "block": 1 << 24, "ties": "even"},
                    "tensors": {"b.scale": 0, "b.zero_point": 0},
                }
            }
        },
        FormatError,
        "a FixedGrid cannot stand on the input of a layer",
    ),
    "a weight's grid on an output": (
        {"head": form("SymmetricGrid", "output", "b.clip", bits=4, axis=None)},
        FormatError,
        "a SymmetricGrid cannot stand on the output of a layer",
    ),
    "an output's sizes on an input": (
        {"head": form("TimesSize", "input", "p.bias", dim=-1)},
        FormatError,
        "a TimesSize cannot stand on the input of a layer",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_a_file_may_not_attach_are_refused(name: str, tmp_path: Path) -> None:
    forms, kind, sentence = FORMS[name]
    refused(tmp_path, with_manifest(lambda m: m.update(activations=forms)), kind, sentence)


@pytest.mark.parametrize(
    "settings",
    [
        {"low": "0", "high": 255},
        {"low": 0, "high": 1 << 40},
        {"low": 4, "high": 255},
        {"low": 0, "high": 2},
        {"low": 0},
    ],
)
def test_a_grid_on_activations_must_be_one(settings: dict, tmp_path: Path) -> None:
    data = with_manifest(lambda m: m["activations"]["first"]["input"].update(settings=settings), "network")
    refused(tmp_path, data, FormatError, "ActivationGrid", GoldenNet)


def repeat(m: dict) -> None:
    m["names"].append(m["names"][0])


def tie(name: str, owner: str) -> Change:
    return lambda m: (m["names"].remove(name), m.update(ties={name: owner}))


NAMED = {
    "a name twice": (repeat, FormatError, "names: a name occurs twice"),
    "a name too many": (lambda m: m["names"].append("absent"), FormatError, "describes 16 tensors and has 15"),
    "a name too few": (lambda m: m["names"].pop(), FormatError, "describes 14 tensors and has 15"),
    "another name": (lambda m: m["names"].__setitem__(0, "absent"), BadData, "the file has none"),
    "names that are numbers": (lambda m: m.update(names=[1, 2]), FormatError, "names: they are no list of names"),
    "a name that clears the screen": (lambda m: m["names"].__setitem__(0, "\x1b[2J"), FormatError, "is no name"),
    "a name of two lines": (lambda m: m["names"].__setitem__(0, "a\nb"), FormatError, "is no name"),
    "a name without end": (lambda m: m["names"].__setitem__(0, "a" * 600), FormatError, "is no name"),
    "half of a character": (lambda m: m.update(tool="\ud800"), FormatError, "is no name"),
    "a tie to nothing": (lambda m: m.update(ties={"x": "absent"}), FormatError, "ties: 'x' is tied to 'absent'"),
    "a tie of what is there": (
        lambda m: m.update(ties={m["names"][0]: m["names"][1]}),
        FormatError,
        "has a record of its own",
    ),
    "frozen is no list": (lambda m: m.update(frozen=3), FormatError, "frozen: they are no list"),
    "frozen is absent": (lambda m: m.update(frozen=["absent"]), FormatError, "frozen: a name is none of its names"),
    "swaps are a list": (lambda m: m.update(swaps=[]), FormatError, "swaps: they are no object"),
    "inputs of text": (lambda m: m.update(example_inputs="x"), FormatError, "example_inputs: they are no object"),
    "inputs of a type that is a function": (
        lambda m: m.update(example_inputs={"args": [{"shape": [1], "dtype": "load"}], "kwargs": {}}),
        FormatError,
        "'load' is no type of a tensor",
    ),
    "inputs of a terabyte": (
        lambda m: m.update(example_inputs={"args": [{"shape": [1 << 40], "dtype": "int8"}], "kwargs": {}}),
        FormatError,
        "example_inputs",
    ),
    "inputs that together are too large": (
        lambda m: m.update(example_inputs={"args": [{"shape": [1 << 27], "dtype": "int8"}] * 3, "kwargs": {}}),
        FormatError,
        "402653184 elements",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_that_do_not_fit_the_records_are_refused(name: str, tmp_path: Path) -> None:
    change, kind, sentence = NAMED[name]
    refused(tmp_path, with_manifest(change), kind, sentence)


def test_a_tie_to_another_shape_is_refused(tmp_path: Path) -> None:
    """Found: only the first of all places that share a tensor was asked whether it fits."""
    model = Tied()
    model.second.weight = model.first.weight = nn.Parameter(torch.randn(30, 8))
    save(model, tmp_path / "a.fw")
    narrow = Tied()
    narrow.second = nn.Embedding(30, 9)
    with pytest.raises(BadData, match=r"second\.weight has the shape \(30, 9\) in the model and \(30, 8\)"):
        load(tmp_path / "a.fw", into=narrow)


def test_a_bare_file_may_say_what_only_full_files_use(tmp_path: Path) -> None:
    """Found: ties in the description of a bare file led `unpack` to names that are not there."""
    manifest, records, _ = parts(seed("tied").data)
    (tmp_path / "a.fw").write_bytes(assemble(manifest, list(records), True))
    assert list(unpack(tmp_path / "a.fw")) == [str(i) for i in range(len(records))]
    assert unpack_codes(tmp_path / "a.fw") == {}
    assert "ties" in inspect(tmp_path / "a.fw")["manifest"]


TEXTS = {
    b"[" * 100_000: "nested too deeply",
    b'{"a":' * 50_000: "nested too deeply",
    b'{"provenance":' + b"[" * 70 + b"]" * 70 + b"}": "more than 64 deep",
    b"[]": "no JSON object",
    b"{": "no JSON",
    b"\xff": "no JSON",
    b'{"names":' + b"9" * 5000 + b"}": "no JSON",
    b'{"provenance":1e999}': "not finite",
    b'{"provenance":NaN}': "the number NaN",
    b'{"names":["a"],"names":["b"]}': "a key occurs twice",
    b'{"swaps":{"a":{"type":"ReLU","type":"Linear"}}}': "a key occurs twice",
    b'{"a":['
    + bytes(np.random.default_rng(0).permutation(list(b"[]0, " * NODES)).astype(np.uint8))
    + b"]}": f"than {NODES} values",
}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_description_that_is_no_object_is_refused(text: bytes, tmp_path: Path) -> None:
    refused(tmp_path, assemble(deflated(text), [], False), FormatError, TEXTS[text])


@pytest.mark.parametrize("data", [b"\xff" * 9, deflated(b"{}")[:-1], deflated(b"{}") + b"{}"])
def test_a_description_that_does_not_inflate_is_refused(data: bytes, tmp_path: Path) -> None:
    refused(tmp_path, assemble(data, [], False), FormatError, "cannot be inflated|too early or too late")


def test_a_description_that_inflates_beyond_bounds_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, assemble(deflated(b" " * (160 << 20)), [], False), FormatError, "far larger")


@pytest.mark.parametrize("told", [[[[]] * 40] * 200_000, {"a": 1 << 70}, {"a": "\ud800"}, "deep"])
def test_what_no_reader_would_accept_is_not_written(told: object) -> None:
    for _ in range(70 if told == "deep" else 0):
        told = [told]
    with pytest.raises(BadOption, match="about"):
        pack_manifest({"provenance": told})


# --- what is not a .fw file -------------------------------------------------------------------------------------------


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.fw"
    for content, sentence in (
        (b"", "not a .fw file"),
        (b"PK\x03\x04 an archive", "not a .fw file"),
        (b"FW\x01", "truncated"),
        (b"FW\x02" + bytes(40), "version 2"),
    ):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=sentence):
            unpack(path)
    with pytest.raises(FormatError, match="cannot be read"):
        unpack(tmp_path / "absent.fw")
    with pytest.raises(FormatError, match="cannot be read"):
        load(tmp_path, into=Net())


def test_a_tie_of_a_bare_file_points_backwards(tmp_path: Path) -> None:
    record = head(2) + b"\xf0"
    for number in (varint(0), varint(1), varint(2), varint(1 << 40)):
        (tmp_path / "a.fw").write_bytes(assemble(b"", [record, b"\x1f" + number, b"\x1f\x01"], True))
        with pytest.raises(FormatError, match="repeats number"):
            unpack(tmp_path / "a.fw")
    (tmp_path / "a.fw").write_bytes(assemble(b"", [record, b"\x1f\x00"], True))
    assert [t.shape for t in unpack(tmp_path / "a.fw").values()] == [torch.Size([2])] * 2


def test_a_file_that_holds_more_tensors_than_it_names_is_refused(tmp_path: Path) -> None:
    """Found: what followed the last name was decoded, at any length, and ignored."""
    manifest, records, bare = parts(seed("network").data)
    (tmp_path / "a.fw").write_bytes(assemble(manifest, [*records, records[0]], bare))
    for use in (unpack, unpack_codes, inspect):
        with pytest.raises(FormatError, match="describes 18 tensors and has 19"):
            use(tmp_path / "a.fw")
