"""The verb `distill`: what every formula keeps, layers found or named, adapters, ensembles, one sentence each."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import Batches, blobs, small_cnn, small_mlp, small_task
from featherweight.catalogue import _discovered, entries, entry
from featherweight.core.ensemble import Ensemble
from featherweight.core.features import INPUT, matched, outputs, same_size
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import first
from featherweight.distill import Term, distill, facts_of, learn, limited, tapped
from featherweight.errors import BadData, BadOption, CompressionError, UnknownName
from matches import taps, watched

FORMULAS = dict(sorted(_discovered()[1]["match"].items()))
RANDOM = {"noisy_logits", "permuted"}


def wide_cnn(width: int = 12, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def shown(name: str, count: int = 6, dtype: torch.dtype = torch.float32):
    """Taps that the formula takes: of the student, with a gradient, and of the teacher."""
    facts = facts_of(FORMULAS[name])
    where, same = facts.get("where", "logits"), facts.get("same", "")
    sides = []
    for seed, channels in ((1, 4), (2, 4 if same == "channels" else 6)):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, generator=generator):
            return torch.randn(*shape, generator=generator).to(dtype)

        if where in ("logits",):
            found = {"": draw(count, 5)}
        elif where == "last":
            found = taps(draw(count, 2 * channels), logits=draw(count, 5))
        else:
            maps = (draw(count, channels, 8, 8), draw(count, channels, 8, 8), draw(count, 2 * channels, 4, 4))
            found = taps(*(m.relu() for m in maps), logits=draw(count, 5))
        sides.append(found)
    ours = {key: value.requires_grad_(True) for key, value in sides[0].items()}
    theirs = {key: value.requires_grad_(True) for key, value in sides[1].items()}
    return ours, theirs


def value(name: str, ours, theirs, order=None):
    torch.manual_seed(3)
    labels = torch.arange(len(ours[""])) % 5
    return FORMULAS[name](ours, theirs, (None, labels if order is None else labels[order]), 0.5)


PLAIN = [name for name in FORMULAS if not facts_of(FORMULAS[name]).get("inputs")]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_finite_and_the_teacher_has_none(name, dtype):
    ours, theirs = shown(name, dtype=dtype)
    loss = value(name, ours, theirs)
    assert loss.dim() == 0
    assert torch.isfinite(loss)
    loss.backward()
    grads = [t.grad for t in ours.values() if t.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)
    assert any((g != 0).any() for g in grads)
    assert all(t.grad is None for t in theirs.values())


@pytest.mark.parametrize("name", PLAIN)
def test_dead_features_have_a_finite_gradient(name):
    ours, theirs = shown(name)
    ours = {key: torch.zeros_like(v).requires_grad_(True) for key, v in ours.items()}
    loss = value(name, ours, theirs)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(t.grad).all() for t in ours.values() if t.grad is not None)


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in RANDOM])
def test_order_of_the_batch_does_not_matter(name):
    ours, theirs = shown(name)
    order = torch.randperm(6)
    mixed = [{key: v[order] for key, v in side.items()} for side in (ours, theirs)]
    torch.testing.assert_close(value(name, *mixed, order), value(name, ours, theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_smallest_batch_that_it_says_it_takes(name):
    samples = facts_of(FORMULAS[name]).get("samples", 1)
    ours, theirs = shown(name, samples)
    assert torch.isfinite(value(name, ours, theirs))


@pytest.mark.parametrize("name", [n for n in PLAIN if facts_of(FORMULAS[n]).get("samples", 1) > 1])
def test_batches_too_small_are_refused_and_a_small_last_one_is_left_out(name):
    x, y = blobs((1, 8, 8), n=33)
    task = small_task(teacher=small_cnn().eval())
    ones = replace(task, train=Batches(x, y, 1))
    with pytest.raises(BadData, match="pass larger training batches"):
        distill(small_cnn().eval(), ones, match=name, epochs=1)
    with recording() as ledger:
        distill(small_cnn(), replace(task, train=Batches(x[:17], y[:17], 16)), match=FORMULAS[name], epochs=1)
    assert any("left out a batch of 1 samples" in text for text in ledger.notes)


def test_layers_are_found_and_said():
    student, teacher, task = small_cnn(), wide_cnn(), small_task()
    batch = first(task.train, "training")
    assert matched(student, teacher, task, batch, "ends") == [("2", "1"), ("5", "3")]
    assert matched(student, teacher, task, batch, "stages") == [("0", "0"), ("2", "1"), ("5", "3")]
    assert matched(student, teacher, task, batch, "top") == [("5", "3")]
    assert matched(student, teacher, task, batch, "last") == [("7", "5")]
    assert matched(small_mlp(), teacher, task, batch, "any") == [("2", "5")]
    deeper = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), *list(wide_cnn(8))[2:])
    assert outputs(deeper, task, batch)["2"] == (32, 16, 2, 2)
    assert matched(deeper, teacher, task, batch, "ends") == [("0", "1"), ("1", "3")]
    with recording() as ledger:
        distill(student, replace(task, teacher=teacher), match="gram_matrices", labels=1, weight=1, epochs=1)
    assert any("the student's layer 2 with the teacher's layer 1" in text for text in ledger.notes)
    assert any("8 channels of 2 reach the 12 of 1 through Conv2d" in text for text in ledger.notes)
    (shares,) = ledger.tables["gradient_shares"]
    assert (shares["at"], shares["terms"]) == ("3.weight", ["labels", "gram_matrices"])
    assert len(shares["points"]) == 3
    assert all(sum(point["shares"]) == pytest.approx(1) for point in shares["points"])
    assert ledger.tables["distill"]["gram_matrices"]["training_only_parameters"] == 8 * 12 + 8 * 12 + 16 * 24
    assert not any(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in student.modules())


def test_tap_that_matches_nothing_names_the_nearest():
    task = small_task(teacher=wide_cnn())
    with pytest.raises(UnknownName, match="unknown layer of the student 'conv'"):
        distill(small_cnn(), task, match="relations", pairs=[("conv", "3")])
    with pytest.raises(UnknownName, match="unknown layer of the teacher '33': did you mean '3'"):
        distill(small_cnn(), task, match="relations", pairs=[("3", "33")])
    with pytest.raises(BadOption, match="pairs= names none"):
        distill(small_cnn(), task, match="relations", pairs=[])
    with pytest.raises(BadOption, match="both maps, or both vectors"):
        distill(small_cnn(), task, match="gram_matrices", pairs=[("2", "5"), ("5", "3")])
    with pytest.raises(BadOption, match="choose one that takes vectors"):
        distill(small_mlp(), task, match="attention_maps")


def test_settings_reach_the_formula_and_are_checked():
    task = small_task(teacher=wide_cnn())
    with pytest.raises(UnknownName, match="unknown option of locality 'neighbour': did you mean 'neighbours'"):
        distill(small_cnn(), task, match="locality", settings={"neighbour": 3})
    with pytest.raises(BadOption, match="neighbours=0: must be a whole number of at least 1"):
        distill(small_cnn(), task, match="locality", settings={"neighbours": 0})
    steps = []
    distill(small_cnn(), replace(task, fit=watched(steps)), match="squared_logits", labels=0, weight=1.0,
            settings={"centred": True})  # fmt: skip
    model = small_cnn().eval()
    x, y = next(iter(task.train))
    a, b = model(x), task.teacher(x)
    wanted = 0.5 * ((a - a.mean(1, keepdim=True)) - (b - b.mean(1, keepdim=True))).square().sum(1).mean()
    torch.testing.assert_close(steps[0][0](model, (x, y), 0.0)["squared_logits"], wanted)


def test_terms_add_up_and_the_one_that_is_not_finite_is_named():
    task, model = small_task(teacher=wide_cnn()), small_cnn()
    steps = []
    distill(model, replace(task, fit=watched(steps)), match="attention_maps", labels=1, weight=2.0, soft=0.5)
    terms = steps[0][0](model, next(iter(task.train)), 0.0)
    assert terms.keys() == {"labels", "attention_maps", "softened"}

    def broken(student, teacher, batch, progress):
        return student[""].sum() * float("nan")

    with pytest.raises(CompressionError, match="the loss term broken is not finite"):
        learn(model, task, {"softened": Term("softened"), "broken": Term(broken)}, epochs=1, lr=1e-3)


def test_limited_gradients_are_no_larger_than_the_labels():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    loss, by = 100 * w.sum(), w[0] * 1.0
    made = limited(loss, by, [w])
    assert torch.equal(made.detach(), loss.detach())
    (grad,) = torch.autograd.grad(made, [w])
    assert float(grad.norm()) == pytest.approx(1.0)
    small = limited(0.1 * w.sum(), w.sum(), [w])
    torch.testing.assert_close(torch.autograd.grad(small, [w])[0], torch.full((2,), 0.1))


def test_input_has_a_gradient_where_it_is_asked_for():
    task, model = small_task(), small_cnn()
    batch = next(iter(task.train))
    seen, output, target = tapped(model, model, task, batch, ["2"], inputs=True)
    assert torch.equal(seen[INPUT], batch[0])
    assert torch.autograd.grad(output.sum(), seen[INPUT])[0].shape == batch[0].shape
    assert torch.equal(target, batch[1])
    assert not batch[0].requires_grad


def test_same_size_pools_the_larger_map():
    a, b = same_size(torch.ones(2, 3, 8, 8), torch.ones(2, 5, 4, 4))
    assert a.shape == (2, 3, 4, 4)
    assert b.shape == (2, 5, 4, 4)


def test_ensemble_is_the_mean_of_probabilities_at_its_temperature():
    members = [small_mlp().eval() for _ in range(3)]
    x = torch.randn(5, 1, 8, 8)
    for t in (1.0, 4.0):
        both = Ensemble(members, temperature=t)(x)
        mean = torch.stack([(m(x) / t).softmax(1) for m in members]).mean(0)
        torch.testing.assert_close((both / t).softmax(1), mean)
    values = Ensemble([nn.Linear(3, 1), nn.Linear(3, 1)])
    torch.testing.assert_close(values(x[:, 0, 0, :3]), sum(m(x[:, 0, 0, :3]) for m in values.members) / 2)


def test_ensembles_that_are_none():
    with pytest.raises(BadOption, match="an ensemble of 1 is none"):
        Ensemble([small_mlp()])
    with pytest.raises(BadOption, match="all must score the same classes"):
        Ensemble([small_mlp(4), small_mlp(5)])(torch.randn(2, 1, 8, 8))


def test_teacher_stays_as_it_was_whatever_is_compared():
    teacher = fit(wide_cnn(), small_task(), epochs=1).train()
    held = copy.deepcopy(teacher.state_dict())
    for name in FORMULAS:
        distill(small_cnn(), small_task(teacher=teacher), match=name, labels=1, weight=0.1, epochs=0.4)
    assert all(torch.equal(held[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert teacher.training


def test_every_method_refuses_other_classes():
    task = small_task(teacher=small_cnn(5))
    for name in ("kd", "logit_regression", "noisy_teacher"):
        with pytest.raises(BadOption, match="both must score the same classes"):
            entry(name)(small_cnn(), task, **entry(name).small)
    assert entries("method", "distill")
