"""Channels: removal equals masking, and everything that stays behind agrees with it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coupled import COUPLED, Attention, Dense, Grouped, Recurrent, Reused, Sorted, TorchAttention, WrittenSize, tokens
from featherweight.core.blueprint import restructure, structure
from featherweight.core.channels import Channels, channel_groups, remove_channels
from featherweight.core.forms import Mask, attach
from featherweight.core.labels import Unions
from featherweight.core.ledger import recording
from featherweight.errors import BadData, BadOption, CompressionError, TraceError, UnknownName
from featherweight.zoo.networks import NETWORKS, build
from removal import randomise, removal_gap

# --- removal equals masking -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUPLED)
def test_removal_equals_masking(name: str) -> None:
    make, inputs, removable, outputs = COUPLED[name]
    model = randomise(make())
    found, channels, doomed = removal_gap(model, inputs(), fresh_inputs=inputs(3))
    assert found < 1e-5
    assert len(doomed) >= channels.count // 4
    assert sum(int((ids >= 0).sum()) for ids in channels.outputs.values()) == removable
    assert sum(len(ids) for ids in channels.outputs.values()) == outputs


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["split", "grouped", "shuffled", "segmenter", "attention", "agreeing"])
def test_removal_equals_masking_whatever_is_chosen(name: str, seed: int) -> None:
    make, inputs, _, _ = COUPLED[name]
    found, _, _ = removal_gap(randomise(make()), inputs(), fraction=0.25 + 0.5 * seed, seed=seed)
    assert found < 1e-5


ZOO = [
    *NETWORKS,
    "resnet:shortcut=A",
    "lstm:vocabulary=20",
    "lstm:layers=2,hidden=16",
]


@pytest.mark.parametrize("spec", ZOO)
def test_removal_equals_masking_on_the_zoo(spec: str) -> None:
    model = randomise(build(spec))
    x = torch.randint(0, 20, (2, 9)) if "vocabulary" in spec else torch.randn(2, 1, 28, 28)
    before = sum(p.numel() for p in model.parameters())
    found, channels, _ = removal_gap(model, x)
    assert found < 1e-5
    assert list(channels.pinned.values()) == ["output of the model"]
    assert sum(p.numel() for p in model.parameters()) < 0.55 * before


# --- what agrees afterwards -------------------------------------------------------------------------------------------


def test_attributes_and_edits_follow() -> None:
    model = build("mobilenet_v1").eval()
    x = torch.randn(2, 1, 28, 28)
    channels = channel_groups(model, x)
    remove_channels(model, range(0, channels.count, 3), channels=channels)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == module.running_mean.shape == (module.num_features,)
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    for path, edit in model._fw_edits.items():
        for key, value in edit.items():
            assert getattr(model.get_submodule(path), key) == value


@pytest.mark.parametrize("spec", ["resnet:depth=8,shortcut=A", "vit:depth=2", "lstm:layers=2"])
def test_a_fresh_model_can_be_brought_to_the_same_shape(spec: str) -> None:
    model, x = randomise(build(spec)).eval(), torch.randn(2, 1, 28, 28)
    for _ in range(2):  # edits of two removals merge
        channels = channel_groups(model, x)
        remove_channels(model, range(0, channels.count, 4), channels=channels)
    state = model.state_dict()
    twin = restructure(build(spec), structure(model), {name: tuple(t.shape) for name, t in state.items()})
    twin.load_state_dict(state)
    assert torch.equal(twin.eval()(x), model(x))


def test_training_goes_on_with_the_optimizers_state() -> None:
    model, x = randomise(Grouped()), torch.randn(4, 3, 10, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(x).square().sum().backward()
    optimizer.step()
    channels = channel_groups(model, x)
    before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    assert model.training
    remove_channels(model, {"norm": range(0, 24, 2)}, channels=channels, optimizer=optimizer)
    assert model.training
    kept = [i for i in range(24) if i % 2]
    assert torch.equal(optimizer.state[model.norm.weight]["exp_avg"], before["norm.weight"][kept])
    assert torch.equal(optimizer.state[model.four.weight]["exp_avg"], before["four.weight"][kept])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}
    was = model.four.weight.detach().clone()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(was, model.four.weight)


def test_tied_weights_stay_tied() -> None:
    model = Reused().eval()
    channels = channel_groups(model, tokens())
    remove_channels(model, {"words": [0, 3]}, channels=channels)
    assert model.decoder.weight is model.words.weight
    assert model.words.weight.shape == (11, 6)
    assert model.decoder.in_features == model.words.embedding_dim == 6
    assert model.norm.normalized_shape == (6,)


def test_an_lstm_still_uses_the_weights_it_shows() -> None:
    model = Recurrent(nn.LSTM).eval()
    channels = channel_groups(model, tokens())
    remove_channels(model, {"rnn": [1, 4]}, channels=channels)
    assert (model.rnn.hidden_size, model.out.in_features) == (4, 8)
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))


def test_finding_channels_changes_nothing() -> None:
    model = randomise(Dense()).train()
    before = copy.deepcopy(model.state_dict())
    channel_groups(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not hasattr(model, "_fw_edits")


# --- choosing ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two norms on a residual sum, one inside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        return self.fc((x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))).mean((2, 3)))


@pytest.fixture
def residual() -> tuple[Residual, Channels]:
    model = randomise(Residual()).eval()
    return model, channel_groups(model, torch.randn(2, 1, 3, 3))


def test_a_shared_channel_goes_only_when_all_agree(residual: tuple[Residual, Channels]) -> None:
    model, channels = residual
    agreed = channels.agreed({"bn1": [0, 2], "bn2": [5], "bn3": [2, 3]})
    assert sorted(m for c in agreed.tolist() for m in channels.members(c) if "bn" in m[0]) == [
        ("bn1", 2),
        ("bn2", 5),
        ("bn3", 2),
    ]
    remove_channels(model, agreed, channels=channels)
    assert (model.bn1.num_features, model.bn2.num_features, model.bn3.num_features) == (3, 5, 3)
    assert (model.conv2.in_channels, model.conv3.out_channels, model.fc.in_features) == (3, 3, 3)


def test_scores_are_pooled_over_what_is_coupled(residual: tuple[Residual, Channels]) -> None:
    _, channels = residual
    scores = {"bn1": torch.tensor([1.0, 2.0, 3.0, 4.0]), "bn3": torch.tensor([10.0, 0.0, 0.0, 1.0])}
    assert channels.pool(scores)[channels.outputs["bn1"]].tolist() == [11, 2, 3, 5]
    assert channels.pool(scores, "max")[channels.outputs["conv3"]].tolist() == [10, 2, 3, 4]
    assert channels.pool(scores, "mean")[channels.outputs["conv1"]].tolist() == [5.5, 1, 1.5, 2.5]
    assert channels.pool(scores)[channels.outputs["bn2"]].isnan().all()


def test_slices_and_groups_name_everything(residual: tuple[Residual, Channels]) -> None:
    _, channels = residual
    [inner] = [g for g in channels.groups if "conv2" in g.layers]
    assert set(inner.layers) == {"conv2", "bn2"}
    places = {(s.path, s.dim, s.index) for s in channels.slices(int(channels.outputs["bn2"][3]))}
    names = ["conv2.weight", "conv2.bias", *(f"bn2.{n}" for n in ("weight", "bias", "running_mean", "running_var"))]
    assert places == {*((n, 0, (3,)) for n in names), ("conv3.weight", 1, (3,))}


def test_no_layer_is_emptied(residual: tuple[Residual, Channels]) -> None:
    model, channels = residual
    with recording() as ledger:
        remove_channels(model, {"conv2": [2, 1, 0, 3, 4, 5], "bn1": range(4)}, channels=channels)
    assert (model.conv2.out_channels, model.conv2.in_channels) == (1, 1)
    assert ledger.skipped["conv2"] == "one channel kept: no layer is emptied"


def test_kept_counts_can_be_rounded_up(residual: tuple[Residual, Channels]) -> None:
    _, channels = residual
    doomed = channels.legal({"bn2": [5, 1, 0]}, multiple=4)
    assert doomed.tolist() == channels.outputs["bn2"][[5, 1]].tolist()


def test_groups_lose_equally_many() -> None:
    model = randomise(Grouped()).eval()
    channels = channel_groups(model, torch.randn(2, 3, 10, 10))
    # Outputs of `four` are groups of 6 for itself and of 12 for `two`; only groups 0 and 2 are asked to lose any.
    assert len(channels.legal({"four": [0, 1, 12]})) == 0
    doomed = channels.legal({"four": [0, 1, 6, 12, 19]})
    assert sorted(channels.outputs["four"].tolist().index(c) for c in doomed.tolist()) == [0, 6, 12, 19]


def test_sizes_that_agree_at_run_time_lose_equally_many() -> None:
    make, inputs, _, _ = COUPLED["agreeing"]
    model = make().eval()
    channels = channel_groups(model, inputs())
    remove_channels(model, {"a": [0, 1, 2], "b": [7]}, channels=channels)
    assert (model.a.out_features, model.b.out_features) == (7, 7)


# --- what stays, and errors -------------------------------------------------------------------------------------------


def test_what_is_pinned_says_why() -> None:
    assert "sort (no rule)" in channel_groups(Sorted(), torch.randn(2, 5)).pinned["first"]
    with recording() as ledger:
        pinned = channel_groups(WrittenSize(), torch.randn(2, 5)).pinned
    assert pinned.keys() == ledger.skipped.keys() == {"first", "out"}
    assert "the model's code does not follow a removal" in pinned["first"]
    assert channel_groups(TorchAttention(), torch.randn(2, 6, 5)).pinned["stem"] == "MultiheadAttention"
    pinned = channel_groups(Attention(fixed_scale=False), torch.randn(2, 6, 5)).pinned
    assert "output would move" in pinned["q"]


def test_pinned_outputs_are_left_and_said() -> None:
    model = Sorted()
    channels = channel_groups(model, torch.randn(2, 5))
    with recording() as ledger:
        remove_channels(model, {"first": [1], "second": [2]}, channels=channels)
    assert (model.first.out_features, model.second.out_features) == (12, 5)
    assert "sort (no rule)" in ledger.skipped["first"]


def test_bad_requests_are_refused(residual: tuple[Residual, Channels]) -> None:
    model, channels = residual
    with pytest.raises(UnknownName, match="did you mean 'conv3' or 'conv2' or 'conv1'"):
        remove_channels(model, {"conv": [0]}, channels=channels)
    with pytest.raises(BadOption, match=r"bn1: index 0..4, expected 0..3"):
        remove_channels(model, {"bn1": [0, 4]}, channels=channels)
    with pytest.raises(BadOption, match="3 scores for bn1"):
        channels.pool({"bn1": torch.ones(3)})
    remove_channels(model, {"bn1": [0]}, channels=channels)
    with pytest.raises(BadOption, match="anew after each removal"):
        remove_channels(model, {"bn1": [0]}, channels=channels)


def test_a_removal_that_is_wrong_is_undone(residual: tuple[Residual, Channels]) -> None:
    model, channels = residual
    state, x = copy.deepcopy(model.state_dict()), torch.randn(2, 1, 3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    was = model(x)
    wrong = replace(channels, axes={key: ids for key, ids in channels.axes.items() if key != ("conv3.weight", 1)})
    with pytest.raises(CompressionError, match="channels were not removed"):
        remove_channels(model, {"bn2": [1]}, channels=wrong, optimizer=optimizer)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert torch.equal(model(x), was)
    assert model.conv2.out_channels == 6
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


class Branching(nn.Module):
    """Takes a branch on a value, which no trace can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


def test_a_model_without_a_graph_says_what_still_works() -> None:
    with pytest.raises(TraceError, match=r"Branching cannot be traced \(.*\).*masks, quantized weights"):
        channel_groups(Branching(), torch.ones(2, 3))


def test_parametrized_models_are_to_be_baked_first() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    attach(model[0], Mask(torch.eye(3)))
    with pytest.raises(BadData, match="0 still holds a form: call bake"):
        channel_groups(model, torch.ones(2, 3))


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30), st.integers(1, 5))
def test_unions_are_equivalence_classes(pairs: list[tuple[int, int]], parts: int) -> None:
    unions = Unions()
    labels = unions.fresh(20)
    classes = [{i} for i in range(20)]
    for chunk in [pairs[i::parts] for i in range(parts)]:
        if chunk:
            unions.unite(*torch.tensor(chunk).T)
        for a, b in chunk:
            merged = classes[a] | classes[b]
            for i in merged:
                classes[i] = merged
    roots = unions.find(labels).tolist()
    assert all((roots[a] == roots[b]) == (b in classes[a]) for a in range(20) for b in range(20))


# --- other people's networks ------------------------------------------------------------------------------------------


def _transformers(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers as hf

    hf.logging.set_verbosity_error()
    words = {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    made = {
        "resnet": lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2])
        ),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=32, patch_size=8, **size)),
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(vocab_size=50, **size)),
        "swin": lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=2, embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=3, n_positions=32, use_cache=False)
        ),
    }[name]()
    inputs = words if name == "bert" else {"input_ids": words["input_ids"]} if name == "gpt2" else pixels
    return made, inputs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "vit", "bert", "swin", "gpt2"])
@pytest.mark.filterwarnings("ignore")  # transformers warns of its own deprecations
def test_removal_equals_masking_on_transformers(name: str) -> None:
    model, inputs = _transformers(name)
    found, channels, _ = removal_gap(randomise(model), inputs)
    assert found < 1e-5
    removable = sum(int((ids >= 0).sum()) for ids in channels.outputs.values())
    assert removable > 0.9 * sum(len(ids) for ids in channels.outputs.values())
