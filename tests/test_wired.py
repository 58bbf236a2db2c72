"""Networks without their class: what `wire` writes down computes what the model does, and stays a network."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import featherweight as fw
from featherweight.core.channels import channel_groups, remove_channels
from featherweight.core.forms import Mask, attach
from featherweight.core.wire_data import wired_from, wiring_data
from featherweight.core.wired import Place, Wired
from featherweight.core.wiring import wire
from featherweight.errors import BadData, FormatError, TraceError


class Block(nn.Module):
    """A residual block whose sum and view are code, with a parameter and a hidden buffer of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.gain = nn.Parameter(torch.full((width, 1, 1), 0.7))
        self.register_buffer("shift", torch.linspace(0, 1, width).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x))) * self.gain + self.shift


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.blocks(self.stem(x)).mean((2, 3))
        logits = self.head(self.drop(x))
        return {"logits": logits, "doubled": 2 * logits}


def filled(model: nn.Module) -> nn.Module:
    """Running statistics that are not those of a fresh norm."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(1)
    return filled(Net())


X = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(2))


def test_the_outputs_are_the_model_s_at_other_sizes_too(net: nn.Module) -> None:
    wired = wire(net, X)
    for shape in ((2, 1, 12, 12), (1, 1, 12, 12), (5, 1, 17, 9)):
        x = torch.randn(shape)
        ours, theirs = wired(x), net(x)
        assert set(ours) == {"logits", "doubled"}
        for key in ours:
            assert torch.equal(ours[key], theirs[key])


def test_layers_and_names_are_those_of_the_model(net: nn.Module) -> None:
    wired = wire(net, X)
    assert list(wired.state_dict()) == list(net.state_dict())
    assert type(wired.get_submodule("blocks.1.conv")) is nn.Conv2d
    assert type(wired.get_submodule("blocks.1")) is Place
    assert [name for name, _ in wired.named_parameters()] == [name for name, _ in net.named_parameters()]
    # the model was copied: training one leaves the other
    wired.head.weight.data.zero_()  # type: ignore[union-attr, operator]
    assert net.head.weight.abs().sum() > 0  # type: ignore[union-attr, operator]


def test_train_and_eval_mean_what_they_meant(net: nn.Module) -> None:
    wired = wire(net, X)
    assert torch.equal(wired(X)["logits"], wired(X)["logits"])
    net = copy.deepcopy(net).train()
    wired.train()
    outputs = []
    for model in (net, wired):
        torch.manual_seed(5)
        outputs.append(model(X)["logits"])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(wired(X)["logits"], wired(X)["logits"])  # dropout
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            assert not torch.equal(buffer, torch.zeros_like(buffer))


class Functional(nn.Module):
    """Dropout as a function, a loop over a list, a constant in the code, two inputs of which one has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor, scale: Tensor | None = None, *, offset: Tensor | None = None) -> Any:
        for layer in self.layers:
            x = F.dropout(torch.tanh(layer(x)), 0.5, self.training)
        x = x * torch.tensor([1.0, 2.0, 3.0, 4.0])
        x = x if scale is None else x * scale
        return (x if offset is None else x + offset), [x.sum(), None]


def test_dropout_that_is_code_follows_the_mode() -> None:
    torch.manual_seed(0)
    model = Functional().eval()
    wired = wire(model, torch.randn(3, 4))
    x = torch.randn(5, 4)
    assert torch.equal(wired(x)[0], model(x)[0])
    wired.train()
    assert (wired(x)[0] == 0).any()
    assert not (wired.eval()(x)[0] == 0).any()


def test_arguments_may_be_given_by_place_or_by_name() -> None:
    model = Functional().eval()
    wired = wire(model, ((torch.randn(3, 4), torch.rand(3, 4)), {"offset": torch.rand(3, 4)}))
    x, scale, offset = torch.randn(2, 4), torch.rand(2, 4), torch.rand(2, 4)
    expected = model(x, scale, offset=offset)
    found = wired(x, scale=scale, offset=offset)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1][0], expected[1][0])
    assert found[1][1] is None
    assert torch.equal(wired(offset=offset, x=x, scale=scale)[0], expected[0])


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((), {}, "argument 'x' is missing"),
        ((torch.ones(2, 5),), {}, r"shape \(2, 5\)"),
        ((torch.ones(2, 4, dtype=torch.long),), {}, "torch.int64"),
        ((torch.ones(2, 4), torch.ones(2, 4)), {}, "scale is Tensor"),
        ((torch.ones(2, 4),), {"other": torch.ones(1)}, "argument 'other'"),
        ((3.0,), {}, "x is a float"),
    ],
)
def test_wrong_inputs_are_one_sentence(args: tuple[Any, ...], kwargs: dict[str, Any], says: str) -> None:
    wired = wire(Functional().eval(), ((torch.randn(3, 4), None), {}))
    with pytest.raises(BadData, match=says):
        wired(*args, **kwargs)


class Halving(nn.Module):
    """Takes another way for odd lengths: the trace of one is not the other."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2 == 0:
            x = x[:, ::2]
        return self.line(x).sum(1)


def test_sizes_for_which_the_trace_does_not_hold_are_refused() -> None:
    model = Halving()
    wired = wire(model, torch.randn(2, 8, 3))
    even, odd = torch.randn(3, 6, 3), torch.randn(3, 7, 3)
    assert torch.allclose(wired(even), model(even))
    with pytest.raises(BadData, match="size 1 of input 0 % 2 == 0"):
        wired(odd)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.rnn = kind(6, 5, **options)

    def forward(self, ids: Tensor) -> Pair:
        out, states = self.rnn(self.words(ids))
        return Pair(out, states[0] if isinstance(states, tuple) else states)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_layers_stay_layers(kind: type[nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Recurrent(kind, batch_first=True, **options).eval()
    wired = wire(model, torch.randint(0, 9, (2, 5)))
    assert type(wired.rnn) is kind
    assert any(step.target == "@rnn" for step in wired.wiring.steps)
    ids = torch.randint(0, 9, (3, 8))
    found, expected = wired(ids), model(ids)
    a, b = found
    assert torch.equal(found.a, expected.a)
    assert torch.equal(b, expected.b)
    assert torch.equal(found[0], a)


def test_tied_tensors_and_shared_modules_stay_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 4)
            self.line = nn.Linear(4, 4)
            self.again = nn.Sequential(self.line, nn.GELU())
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.again(self.line(self.words(ids))))

    model = Tied().eval()
    wired = wire(model, torch.randint(0, 7, (2, 3)))
    assert wired.out.weight is wired.words.weight
    assert wired.again.get_submodule("0") is wired.line
    ids = torch.randint(0, 7, (4, 6))
    assert torch.equal(wired(ids), model(ids))


def test_a_file_gives_the_network_back_bit_for_bit(net: nn.Module, tmp_path: Path) -> None:
    report = fw.save(net, tmp_path / "a.fw", example_inputs=X)
    assert report.class_free
    found = fw.load(tmp_path / "a.fw")
    assert isinstance(found, Wired)
    assert not found.training
    for key, value in net(X).items():
        assert torch.equal(found(X)[key], value)
    # written again, the file is the same but for the inputs, which are no longer described
    fw.save(found, tmp_path / "b.fw", example_inputs=X)
    assert (tmp_path / "b.fw").read_bytes() == (tmp_path / "a.fw").read_bytes()


def test_a_file_opens_where_the_class_cannot_be_had(net: nn.Module, tmp_path: Path) -> None:
    fw.save(net, tmp_path / "a.fw", example_inputs=X)
    torch.save((X, net(X)["logits"]), tmp_path / "seen.pt")
    script = """
import sys, torch, featherweight as fw
x, logits = torch.load(sys.argv[2])
model = fw.load(sys.argv[1])
assert torch.equal(model(x)["logits"], logits)
model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(0)
losses = []
for _ in range(12):
    loss = torch.nn.functional.cross_entropy(model(x)["logits"], torch.tensor([0, 2]))
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(float(loss))
assert all(p.grad is not None for p in model.parameters())
assert losses[-1] < losses[0], losses
assert "test_wired" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.fw", tmp_path / "seen.pt"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_channels_of_a_wired_network_are_removed_in_its_numbers_too() -> None:
    class Heads(nn.Module):
        """Views with numbers in the code, which no attribute of the class would follow."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x).view(x.shape[0], -1, 2, 6)
            return self.c((a * self.b(x).view(x.shape[0], -1, 2, 6)).flatten(2))

    torch.manual_seed(0)
    model, x = Heads().eval(), torch.randn(2, 5, 4)
    wired = wire(model, x)
    channels = channel_groups(wired, x)
    assert channels.count > 0
    remove_channels(wired, channels.legal(torch.arange(2)), channels=channels)
    kept = wired.get_submodule("a").weight.shape[0]
    assert kept < 12
    assert kept == wired.get_submodule("c").weight.shape[1]
    assert wired(torch.randn(3, 7, 4)).shape == (3, 7, 3)
    again = wired_from(
        json.loads(json.dumps(wiring_data(wired))),
        {n: (tuple(t.shape), t.dtype) for n, t in wired.state_dict().items()},
    )
    assert again.wiring == wired.wiring


def test_compressing_what_was_loaded_gives_what_compressing_the_original_gives(net: nn.Module, tmp_path: Path) -> None:
    fw.save(net, tmp_path / "a.fw", example_inputs=X)
    labels = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(0))
    x = torch.randn(32, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    batches = [(x[i : i + 8], labels[i : i + 8]) for i in range(0, 32, 8)]
    task = fw.Task(valid=batches, train=batches)
    chain = [
        ("network_slimming", {"prune_ratio": 0.3, "epochs": 1, "finetune": 1, "round_to": 1}),
        ("magnitude_iterative", {"sparsity": 0.5, "epochs": 1}),
    ]
    found = []
    for model in (net, fw.load(tmp_path / "a.fw")):
        result = fw.compress(copy.deepcopy(model), task, chain, seed=3, measure=False)
        found.append(dict(result.model.state_dict()))
    assert list(found[0]) == list(found[1])
    for name, tensor in found[0].items():
        assert tensor.shape == found[1][name].shape
        assert torch.allclose(tensor, found[1][name], atol=1e-6), name
    assert sum(t.numel() for t in found[0].values()) < sum(t.numel() for t in net.state_dict().values())


def test_a_single_layer_is_a_network_too(tmp_path: Path) -> None:
    layer = nn.Linear(4, 3)
    fw.save(layer, tmp_path / "a.fw", example_inputs=torch.randn(2, 4))
    found = fw.load(tmp_path / "a.fw")
    x = torch.randn(5, 4)
    assert torch.equal(found(x), layer(x))
    assert list(found.state_dict()) == ["weight", "bias"]


class Coded(nn.Module):
    """A layer, and code that a test gives."""

    def __init__(self, code: Any) -> None:
        super().__init__()
        self.l = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.w = nn.Parameter(torch.ones(3))
        self.code = code

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        return self.code(self, x, *more, **named)


def coded(code: Any) -> nn.Module:
    torch.manual_seed(3)
    model = Coded(code)
    model.norm.running_mean.uniform_(-1, 1)
    return model.eval()


def even_flipped(net: Any, x: Tensor) -> Tensor:
    if x.shape[1] % 2 == 0:
        x = x.flip(1)
    return net.l(x.cumsum(1))


def last_sixteen(net: Any, x: Tensor) -> Tensor:
    if x.shape[1] > 8:
        x = x[:, -16:]
    return net.l(x)


@pytest.mark.parametrize(("code", "other"), [(even_flipped, 7), (last_sixteen, 20)])
@pytest.mark.parametrize("example", [torch.zeros(2, 8, 3), torch.randn(2, 8, 3)])
def test_a_condition_is_kept_whatever_the_example_holds(code: Any, other: int, example: Tensor) -> None:
    model = coded(code)
    wired = wire(model, example)
    x = torch.randn(2, 8, 3)
    assert torch.allclose(wired(x), model(x))
    try:
        found = wired(torch.ones(2, other, 3))
    except BadData as error:
        assert "size 1 of input 0" in str(error)  # noqa: PT017 - a refusal is as good as the right answer
    else:
        assert torch.allclose(found, model(torch.ones(2, other, 3)))


def test_an_empty_batch_is_refused_where_it_is_another_network() -> None:
    model = coded(lambda net, x: x.new_ones(0, 7) if x.shape[0] == 0 else net.l(x))
    with pytest.raises(BadData, match="size 0 of input 0 >= 1"):
        wire(model, torch.randn(2, 3))(torch.ones(0, 3))


def without_gradient(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = net.l(x)
    return h * net.w


def without_autocast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        h = x.float() * net.w
    return net.l(h)


@pytest.mark.parametrize("code", [without_gradient, without_autocast])
def test_what_gets_gradients_is_what_got_them(code: Any) -> None:
    model, x = coded(code), torch.randn(2, 3)
    wired = wire(model, x)
    grads = []
    for net in (model, wired):
        net(x).square().sum().backward()
        grads.append({name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()})
    assert {n for n, g in grads[0].items() if g is not None} == {n for n, g in grads[1].items() if g is not None}
    for name, grad in grads[0].items():
        assert grad is None or torch.allclose(grad, grads[1][name])


def frozen(net: Any, x: Tensor) -> Tensor:
    x = F.batch_norm(x, net.norm.running_mean, net.norm.running_var, net.norm.weight, net.norm.bias, training=False)
    return F.dropout(net.l(F.dropout(x, 0.5, training=False)), 0.25, net.training)


def test_what_is_frozen_stays_frozen_while_it_trains() -> None:
    model, x = coded(frozen), torch.randn(64, 3)
    wired = wire(model, x)
    outputs = []
    for net in (model.train(), wired.train()):
        torch.manual_seed(0)
        outputs.append(net(x))
    assert torch.equal(outputs[0], outputs[1])
    assert (outputs[1] == 0).any()
    assert torch.equal(model.norm.running_mean, wired.norm.running_mean)  # type: ignore[union-attr, arg-type]


def test_modules_that_the_class_keeps_in_evaluation_mode_stay_there(tmp_path: Path) -> None:
    class Kept(Net):
        def train(self, mode: bool = True) -> Kept:
            super().train(mode)
            self.blocks.eval()
            return self

    model = filled(Kept())
    fw.save(model, tmp_path / "a.fw", example_inputs=X)
    found = fw.load(tmp_path / "a.fw").train()
    assert not found.get_submodule("blocks.0.norm").training
    assert found.get_submodule("drop").training


def test_an_argument_that_was_traced_with_another_value_than_its_default_must_be_given() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x * scale

    wired = wire(Scaled(), (torch.ones(2), 2.0))
    assert torch.equal(wired(torch.ones(3), 2.0), torch.full((3,), 2.0))
    with pytest.raises(BadData, match="'scale' is missing"):
        wired(torch.ones(2))
    with pytest.raises(BadData, match="given by place and by name"):
        wired(torch.ones(2), 2.0, x=torch.ones(2))
    assert torch.equal(wire(Scaled(), (torch.ones(2), 1.0))(torch.ones(2)), torch.ones(2))


def test_boolean_and_whole_numbers_are_not_the_same_input() -> None:
    def masked(net: Any, x: Tensor, mask: Tensor) -> Tensor:
        return net.l(x).masked_fill(mask, 0) if mask.dtype == torch.bool else net.l(x) * mask

    class Masked(Coded):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return masked(self, x, mask)

    wired = wire(Masked(None), (torch.randn(2, 3), torch.ones(2, 3, dtype=torch.long)))
    with pytest.raises(BadData, match=r"torch\.bool"):
        wired(torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool))


def test_wiring_a_model_leaves_it_and_the_process_alone() -> None:
    import logging
    import signal

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))
            self.config = type("C", (), {})()
            self.config.limit = 100

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x[:, : self.config.limit] * 2

    model = Counting()
    before = set(vars(model))
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_PROF, 60)
    logging.disable(logging.INFO)
    try:
        wire(model, torch.randn(2, 20))
        assert signal.getitimer(signal.ITIMER_PROF)[0] > 1
        assert logging.root.manager.disable == logging.INFO
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        logging.disable(logging.NOTSET)
    assert float(model.seen) == 0
    assert set(vars(model)) == before
    model.config.limit = 8
    assert wire(model, torch.randn(2, 20))(torch.ones(2, 20)).shape == (2, 8)


class Asking(nn.Module):
    """Layers that are asked for more than a plain call: an output size, indices, an initial state."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(1, 1, 3, stride=2)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.gru = nn.GRU(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.up(x, output_size=(8, 8)))[0].flatten(1, 2)
        return self.gru(x, torch.ones(1, x.shape[0], 5))[0]


def test_layers_that_are_asked_for_more_than_a_plain_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Asking().eval(), torch.randn(2, 1, 3, 3)
    assert fw.save(model, tmp_path / "a.fw", example_inputs=x).class_free
    assert torch.allclose(fw.load(tmp_path / "a.fw")(x), model(x))


def test_what_is_made_on_the_way_is_made_where_the_inputs_are() -> None:
    wired = wire(coded(lambda net, x: torch.arange(x.shape[1], device=x.device)), torch.randn(2, 5))
    assert wired(torch.ones(2, 7, device="meta")).device.type == "meta"


def test_forms_on_weights_are_baked_first(net: nn.Module) -> None:
    layer = net.get_submodule("blocks.0.conv")
    attach(layer, Mask(torch.rand_like(layer.weight) > 0.5), root=net)
    wired = wire(net, X)
    assert torch.equal(wired(X)["logits"], net(X)["logits"])
    assert (wired.get_submodule("blocks.0.conv").weight == 0).any()
    assert hasattr(layer, "parametrizations")


def test_user_hooks_are_part_of_what_is_traced(net: nn.Module) -> None:
    net.get_submodule("stem").register_forward_hook(lambda module, args, output: output * 2)
    wired = wire(net, X)
    assert torch.allclose(wired(X)["logits"], net(X)["logits"])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) if x.sum() > 0 else x


def test_a_model_without_a_graph_is_saved_for_its_class_and_says_why(tmp_path: Path) -> None:
    model = Branching()
    with pytest.raises(TraceError, match="Branching"):
        wire(model, torch.ones(2, 4))
    report = fw.save(model, tmp_path / "a.fw", example_inputs=torch.ones(2, 4))
    assert not report.class_free
    assert "Branching" in report.why_not
    with pytest.raises(FormatError, match="into="):
        fw.load(tmp_path / "a.fw")
    fresh = fw.load(tmp_path / "a.fw", into=Branching())
    assert torch.equal(fresh.line.weight, model.line.weight)  # type: ignore[union-attr]


def corrupted(change: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    data: dict[str, Any] = json.loads(json.dumps(wiring_data(wire(filled(Net()), X))))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["steps"].insert(0, ["aten.system.default", []]), "no file may call"),
        (lambda d: d["steps"].insert(0, ["os.system", ["true"]]), "no file may call"),
        (lambda d: d["steps"].insert(0, ["aten.view.default.__class__", []]), "no file may call"),
        (lambda d: d["steps"].insert(0, ["aten.from_file.default", ["x"]]), "no file may call"),
        (lambda d: d["steps"].insert(0, ["aten.relu.default", [{"r": 0}]]), "not there"),
        (lambda d: d["steps"].insert(0, ["aten.relu.default", [{"r": 2}]]), "not there"),
        (lambda d: d["steps"].insert(0, ["aten.relu.default", [{"w": "nothing"}]]), "not there"),
        (lambda d: d["steps"].insert(0, ["aten.relu.default", []]), "without its argument"),
        (lambda d: d["steps"].insert(0, ["aten.relu.default", ["x"]]), "takes Tensor"),
        (lambda d: d["steps"].insert(0, ["aten.zeros.default", [[1 << 20, 1 << 20]]]), "elements"),
        (lambda d: d["steps"].insert(0, ["@blocks", [{"r": 1}]]), "does not describe"),
        (lambda d: d["steps"].insert(0, ["@missing", [{"r": 1}]]), "does not describe"),
        (lambda d: d["modules"].update({"stem.inner": 0}), "into a layer"),
        (lambda d: d["modules"].update({"training": 0}), "every module has"),
        (lambda d: d["modules"].update({"forward": 0}), "every module has"),
        (lambda d: d["modules"].update({"fw_input": 0}), "no path"),
        (lambda d: d["modules"].update({"a.b": 0}), "does not describe"),
        (lambda d: d["own"].update({"nothing": "p"}), "holds none"),
        (lambda d: d["conditions"].append(["eq", ["size", 0, 9], 3]), "no input has"),
        (lambda d: d["conditions"].append(["__import__", 3]), "condition with"),
        (lambda d: d["inputs"].append(["float32", [1 << 40], [], 0, 0]), "an input"),
        (lambda d: d.update(output={"r": 100000}), "not there"),
        (lambda d: d.update(steps={}), "steps"),
    ],
)
def test_data_that_describe_no_network_are_refused(change: Any, says: str) -> None:
    data = corrupted(change)
    torch.manual_seed(0)
    tensors = {n: (tuple(t.shape), t.dtype) for n, t in filled(Net()).state_dict().items()}
    tensors |= {f"blocks.{i}.shift": ((8, 1, 1), torch.float32) for i in range(2)}
    with pytest.raises(FormatError, match=says):
        wired_from(data, tensors)


def test_arguments_by_name_keep_their_names_in_onnx(tmp_path: Path) -> None:
    model = Functional().eval()
    x, scale = torch.randn(2, 4), torch.rand(2, 4)
    fw.save(model, tmp_path / "a.fw", example_inputs={"scale": scale, "x": x})
    found = fw.load(tmp_path / "a.fw")
    told = fw.export.onnx(found, tmp_path / "a.onnx", example_inputs={"scale": scale, "x": x})
    assert told.inputs == ["x", "scale"]
    assert told.dynamic_batch
    wanted = model(x[:1], scale[:1])[0]
    assert torch.allclose(fw.export.session(tmp_path / "a.onnx")(x=x[:1], scale=scale[:1])[0], wanted, atol=1e-6)


def test_the_command_line_writes_onnx_from_the_file_alone(net: nn.Module, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from featherweight.cli import app

    fw.save(net, tmp_path / "a.fw", example_inputs=X)
    done = CliRunner().invoke(app, ["unpack", str(tmp_path / "a.fw"), "--onnx", str(tmp_path / "a.onnx")])
    assert done.exit_code == 0, done.output
    session = fw.export.session(tmp_path / "a.onnx")
    assert torch.allclose(session(X)[0], net(X)["logits"], atol=1e-5)
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.fw")]).output.replace("\n", "")
    assert "takes float32 (any, 1, any, any)" in told
