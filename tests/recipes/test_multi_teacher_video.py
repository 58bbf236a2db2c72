"""Wu et al. 2019: one teacher is kd, weights have the sum 1, segments no order, streams add to what none knows."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.ensemble import Ensemble
from featherweight.core.fit import fit
from featherweight.core.streams import OnStream, Segments
from featherweight.core.task import Metric, Task, evaluate
from featherweight.errors import BadData, BadOption
from featherweight.recipes.multi_teacher_video import normalised
from matches import watched
from scenes import Named, clips, looks_at


def test_one_teacher_is_kd_bit_for_bit():
    task = small_task(teacher=small_cnn())
    start = small_cnn()
    ours = entry("multi_teacher_video")(copy.deepcopy(start), task, alpha=2.0, temperature=3.0, epochs=1)
    plain = entry("kd")(copy.deepcopy(start), task, weight=2.0 * 3.0**2, temperature=3.0, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_weights_are_normalised_and_those_of_a_weighted_sum_of_divergences():
    teachers, (x, y) = [small_cnn().eval(), small_mlp().eval()], next(iter(small_task().train))
    student, t, grads = small_mlp().eval(), 2.0, {}
    for weights in ([3.0, 1.0], [0.75, 0.25]):
        steps = []
        task = small_task(teacher=Ensemble(teachers), fit=watched(steps))
        entry("multi_teacher_video")(student, task, weights=weights, temperature=t, alpha=1.5)
        terms = steps[0][0](student, (x, y), 0.0)
        assert terms.keys() == {"labels", "teachers"}
        grads[tuple(weights)] = torch.autograd.grad(sum(terms.values()), list(student.parameters()))
    ours, reference = student(x), 0
    for w, teacher in zip([0.75, 0.25], teachers, strict=True):
        p, q = (teacher(x).detach() / t).softmax(1), (ours / t).softmax(1)
        reference = reference + w * (p * (p / q).log()).sum(1).mean()
    wanted = torch.autograd.grad(F.cross_entropy(ours, y) + 1.5 * t**2 * reference, list(student.parameters()))
    for a, b, c in zip(*grads.values(), wanted, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)


def test_weights_follow_the_metric_of_each_teacher():
    task = small_task()
    known, guesses = fit(small_mlp(), task, epochs=6, lr=0.01), small_mlp()
    good, bad = evaluate(known, task).value, evaluate(guesses, task).value
    assert good > bad > 0
    assert normalised([known, guesses], task, "metric").tolist() == pytest.approx(
        [good / (good + bad), bad / (good + bad)]
    )
    assert normalised([known, guesses, known, known], task, "equal").tolist() == [0.25] * 4


def test_segments_have_no_order():
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), torch.randn(4, 5, 2, 3)
    found = Segments(network)(x)
    torch.testing.assert_close(found, torch.stack([network(x[:, i]) for i in range(5)]).mean(0))
    torch.testing.assert_close(Segments(network)(x[:, [3, 0, 4, 1, 2]]), found)


def flat(inputs: int, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, classes))


def streams():
    data = clips()
    parts = [Named(**{k: v[at] for k, v in data.items()}) for at in (slice(0, 256), slice(256, None))]

    def every(batch):
        return (), {k: batch[k] for k in ("frame", "displacement")}, batch["labels"]

    return Task(train=parts[0], valid=parts[1], split=looks_at("clip"), teacher_split=every)


def test_a_student_learns_from_two_streams_what_neither_teacher_knows():
    task = streams()
    teachers = [OnStream("frame", flat(96)), OnStream("displacement", flat(2))]
    for teacher in teachers:
        fit(teacher, replace(task, split=task.teacher_split), epochs=10, lr=0.01)
        assert 0.3 < evaluate(teacher, task.of_teacher()).value < 0.7  # it knows the digit, or the direction
    held = copy.deepcopy(Ensemble(teachers).state_dict())
    student = entry("multi_teacher_video")(
        flat(192), replace(task, teacher=Ensemble(teachers)), labels=0, temperature=1.0, epochs=15, lr=0.01
    )
    assert evaluate(student, task).value > 0.85
    assert all(torch.equal(held[k], v) for k, v in Ensemble(teachers).state_dict().items())


def test_hints_of_every_stream_reach_one_layer():
    steps = []
    task = streams()
    teachers = Ensemble([OnStream("frame", flat(96)), OnStream("displacement", flat(2))]).eval()
    student = flat(192)
    entry("multi_teacher_video")(
        student, replace(task, teacher=teachers, fit=watched(steps)), weights=[1.0, 3.0], hints=2.0, guided="2"
    )
    step, params = steps[0]
    terms = step(student, batch := next(iter(task.train)), 0.0)
    assert terms.keys() == {"labels", "teachers", "hint 0", "hint 1"}
    with torch.no_grad():
        ours = student[:3](batch["clip"])
        for member, stream, share in ((0, "frame", 0.25), (1, "displacement", 0.75)):
            theirs = teachers.members[member].network[:3](batch[stream])
            torch.testing.assert_close(terms[f"hint {member}"].detach(), 2 * share * (ours - theirs).square().mean())
    assert len(params) == len(list(student.parameters()))  # equal widths need no adapter


def test_bad_input():
    two = Ensemble([small_mlp(), small_cnn()])
    task = small_task(teacher=two)
    run = entry("multi_teacher_video")
    for weights, said in (([1.0], "one number for each"), ([0.0, 0.0], "at least 0"), ([2.0, -1.0], "at least 0")):
        with pytest.raises(BadOption, match=said):
            run(small_mlp(), task, weights=weights)
    with pytest.raises(BadOption, match="for 1 teachers: pass one number for each"):
        run(small_mlp(), small_task(teacher=small_cnn()), weights=[1.0, 2.0])
    with pytest.raises(BadOption, match="nothing to learn from"):
        run(small_mlp(), task, labels=0, alpha=0)
    with pytest.raises(BadOption, match="is an error"):
        run(small_mlp(), replace(task, metric=Metric("error", per_sample=lambda o, t: t, higher_is_better=False)))
    with pytest.raises(BadOption, match="same classes"):
        run(small_mlp(5), task, weights="equal", epochs=1)
    lost = streams()
    teachers = Ensemble([OnStream("frame", flat(96)), OnStream("sound", flat(2))])
    with pytest.raises(BadData, match="stream 'sound', the streams are 'frame', 'displacement'"):
        run(flat(192), replace(lost, teacher=teachers), weights="equal", epochs=1)
