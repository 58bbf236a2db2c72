"""What may come before a coder: each answers alike, in one sentence or with the very tensors that were given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight.coding import load, save, unpack
from featherweight.core.forms import Affine, Codes, codes_of, declare_codes
from featherweight.errors import BadData, FormatError

CODERS = (None, "sparse_index", "huffman", "range", "rans", "deepcabac", "context_mixing", "smallest", "fast")
every_coder = pytest.mark.parametrize("coder", CODERS)
full_and_bare = pytest.mark.parametrize("bare", [False, True])


class Odd(nn.Module):
    """Buffers of whole numbers and of truth values, nothing at all, and one weight at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False)
        self.second.weight = self.first.weight
        self.empty = nn.Parameter(torch.zeros(0, 7))
        self.register_buffer("nothing", torch.zeros(3, 0, 2, dtype=torch.int64))
        self.register_buffer("kept", torch.zeros(300, dtype=torch.bool))
        self.register_buffer("counts", torch.zeros(200, dtype=torch.int64))
        self.register_buffer("small", torch.zeros(40, dtype=torch.uint8))


def odd() -> Odd:
    torch.manual_seed(0)
    model = Odd()
    model.kept.copy_(torch.rand(300) < 0.2)
    model.counts.copy_(torch.randint(-(1 << 40), 1 << 40, (200,)))
    model.small.copy_(torch.randint(0, 256, (40,)))
    return model


def on_a_grid(model: Odd) -> Odd:
    symbols = torch.randint(-3, 4, (9, 9), dtype=torch.int8)
    for layer, rows in ((model.first, 9), (model, 0)):
        shape = (rows, 9) if rows else (0, 7)
        own = symbols if rows else torch.zeros(shape, dtype=torch.int8)
        codes = Codes(own, Affine(torch.tensor(0.5), torch.zeros((), dtype=torch.int32)), shape)
        name = "weight" if rows else "empty"
        with torch.no_grad():
            getattr(layer, name).copy_(codes.decode())
        declare_codes(layer, name, codes)
    return model


@every_coder
@full_and_bare
@pytest.mark.parametrize("declared", [False, True])
def test_empty_whole_true_and_tied_tensors_come_back(
    coder: str | None, bare: bool, declared: bool, tmp_path: Path
) -> None:
    model = on_a_grid(odd()) if declared else odd()
    save(model, tmp_path / "a.fw", coder=coder, bare=bare, class_free=False)
    found = load(tmp_path / "a.fw", into=Odd())
    assert found.second.weight is found.first.weight
    for name, tensor in model.state_dict().items():
        again = found.state_dict()[name]
        assert again.dtype == tensor.dtype, name
        assert torch.equal(again, tensor), name
    assert (codes_of(found.first) is not None) == declared
    held = unpack(tmp_path / "a.fw", into=Odd())
    assert all(any(torch.equal(t, one) for one in held.values()) for t in model.state_dict().values())


@every_coder
@full_and_bare
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    coder: str | None, bare: bool, value: float, tmp_path: Path
) -> None:
    model = odd()
    with torch.no_grad():
        model.first.weight[3, 3] = value
    with pytest.raises(BadData, match=r"first\.weight has values that are NaN or infinite"):
        save(model, tmp_path / "a.fw", coder=coder, bare=bare, class_free=False)
    assert not (tmp_path / "a.fw").exists()


@every_coder
@full_and_bare
def test_a_file_from_a_newer_version_is_refused_in_one_sentence(coder: str | None, bare: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.fw"
    save(odd(), path, coder=coder, bare=bare, class_free=False)
    data = bytearray(path.read_bytes())
    newer(data)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"version 2.*update featherweight") as caught:
        load(path, into=Odd())
    assert "\n" not in str(caught.value)


def newer(data: bytearray) -> None:
    """Raises the version of a file."""
    if data[:2] == b"FW":
        data[2] += 1
    else:  # compact
        data[0] += 1 << 3
