"""Luo et al. 2016: neurons that tell identities are chosen, one of each duplicate pair, none that tell nuisances."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task, token_task
from featherweight.catalogue import entry
from featherweight.core.ensemble import Ensemble
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData, BadOption
from featherweight.recipes.face_neuron_selection import (
    Selected,
    energies,
    greedy,
    mean_field,
    select,
    told,
    told_by_neurons,
)
from matches import watched
from scenes import classifier, digits


def planted():
    """Values of neurons and attributes: 0..2 tell an identity each, 3 and 4 repeat 0 and 1; 5, 6 tell nuisances; 7 is
    dead, 8 is noise."""
    identity, other = torch.rand(400, 3) < 0.5, torch.rand(400, 3) < 0.5
    noise = 0.3 * torch.randn(400, 9)
    values = torch.cat([identity, identity[:, :2], other[:, :2], torch.zeros(400, 2)], 1).float() + noise
    values[:, 3:5] = 2 * values[:, :2] + 1
    values[:, 7] = 0.25
    return values, identity, other


def test_how_well_a_neuron_tells_is_that_of_its_best_threshold():
    values, yes = torch.randint(0, 6, (40, 5)).float(), torch.rand(40, 3) < 0.4
    yes[:, 1] = values[:, 2] < 3  # told perfectly, from below
    found = told(values, yes)
    for i, j in itertools.product(range(5), range(3)):
        best = 0.5
        for threshold in (-0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5):
            said = values[:, i] > threshold
            rate = (said[yes[:, j]].float().mean() + (~said[~yes[:, j]]).float().mean()) / 2
            best = max(best, float(rate), 1 - float(rate))
        assert float(found[i, j]) == pytest.approx(best, rel=1e-6)
    assert float(found[2, 1]) == 1
    constant = torch.cat([yes, torch.ones(40, 1, dtype=torch.bool)], 1)
    assert torch.equal(told(values, constant), found)  # what all have tells nothing


def test_planted_neurons():
    values, identity, other = planted()
    x = told(values, identity), told(values, other)
    for redundancy in (0.5, 5.0):
        chosen = select(*x, 1 / 3, redundancy, "greedy").tolist()
        assert len(chosen) == 3
        assert 2 in chosen
        assert len({0, 3} & set(chosen)) == len({1, 4} & set(chosen)) == 1
    phi, psi = energies(*x)

    def energy(chosen, weight):
        s = list(chosen)
        return float(phi[s].sum() + weight * psi[s][:, s].sum())

    alive = [i for i in range(9) if i != 7]
    best = min(itertools.combinations(alive, 3), key=lambda s: energy(s, 0.5 / 8))
    assert energy(select(*x, 1 / 3, 0.5, "greedy").tolist(), 0.5 / 8) == pytest.approx(energy(best, 0.5 / 8))
    assert 7 not in select(*x, 1.0, 0.5, "greedy").tolist()  # a dead neuron is never chosen
    assert set(select(*x, 5 / 9, 0.0, "greedy").tolist()) == {0, 1, 2, 3, 4}
    some = select(*x, 1 / 3, 20.0, "mean_field").tolist()
    assert len({0, 3} & set(some)) == len({1, 4} & set(some)) == 1


def test_energies_by_hand():
    identity, other = torch.tensor([[1.0, 0.5], [0.75, 0.5]]), torch.tensor([[0.6, 0.5], [1.0, 0.5]])
    phi, psi = energies(identity, other)
    assert phi.tolist() == pytest.approx([0.05 / 0.251, 0.25 / 0.126])
    apart = torch.tensor([2.0, 0, 2, 0]).square().sum()  # two of four attributes differ, by two deviations each
    torch.testing.assert_close(psi, (1 - torch.eye(2)) * (-apart / 2).exp())


def test_free_energy_never_rises():
    phi, raw = torch.rand(12, dtype=torch.float64), torch.rand(12, 12, dtype=torch.float64)
    psi = (raw + raw.T).fill_diagonal_(0)
    for temperature in (0.05, 0.1, 1.0):
        q, values = mean_field(phi, psi, 0.3, 1.0, temperature=temperature)
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(values))
        assert bool(((q >= 0) & (q <= 1)).all())
    assert greedy(phi, psi, 0.0, 4).tolist() == phi.argsort()[:4].tolist()


def test_loss_by_hand_with_neurons_of_several_teachers():
    ours, a, b = torch.randn(4, 2, requires_grad=True), torch.randn(4, 3, 2, 2), torch.randn(4, 3, requires_grad=True)
    match = Selected("g", ["x", "y"], torch.tensor([1, 5]), ours)
    assert isinstance(match.join, nn.Identity)
    loss = match({"g": ours}, {"x": a, "y": b}, None, 0.0)
    wanted = sum(
        (a[m, 1].mean() - ours[m, 0]) ** 2 + (b[m, 2] - ours[m, 1]) ** 2 for m in range(4)
    ) / (2 * 4)  # fmt: skip
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert b.grad is None
    joined = Selected("g", ["x"], torch.tensor([0, 1, 2]), ours)
    assert joined.join.weight.shape == (3, 2)
    assert torch.isfinite(joined({"g": ours.bfloat16()}, {"x": a.bfloat16()}, None, 0.0))


def test_nuisances_are_told_by_neurons_that_see_brightness_and_place():
    x, y = digits()
    place = nn.Linear(64, 2, bias=False)  # the mean, and the right half against the left
    right = torch.where(torch.arange(8) < 4, -1.0, 1.0).expand(8, 8)
    place.weight.data = torch.stack([torch.ones(64) / 64, right.reshape(64) / 32])
    teacher = nn.Sequential(nn.Flatten(), place, nn.Linear(2, 4)).eval()
    data = Batches(x[:200], y[:200])
    identity, other = told_by_neurons(Task(train=data, valid=data, teacher=teacher), ["1"], None)
    assert identity.shape == (2, 4)
    assert other.shape == (2, 6)  # brighter, darker, up, down, left, right
    assert other[0].argmax() < 2
    assert other[0, :2].min() > 0.9
    assert other[0, 2:].max() == 0.5  # a shift keeps the mean
    assert other[1, 4:].min() > other[1, :4].max()


def test_student_learns_the_chosen_neurons_and_then_its_head():
    x, y = digits()
    task = Task(train=Batches(x[:320], y[:320]), valid=Batches(x[320:], y[320:], 400))
    teachers = Ensemble([fit(small_cnn(), task, epochs=4, lr=0.01) for _ in range(2)]).eval()
    held = copy.deepcopy(teachers.state_dict())
    stages = []

    def watching(model, task, **options):
        stages.append((copy.deepcopy(model.state_dict()), options.get("step")))
        return fit(model, task, **options)

    student = classifier(width=4)
    with recording() as ledger:
        entry("face_neuron_selection")(
            student, replace(task, teacher=teachers, fit=watching), guided="3", epochs=6, head_epochs=6, lr=0.01
        )
    assert any("16 of 32 neurons of 2 teacher(s) chosen, learned by layer 3" in text for text in ledger.notes)
    (start, step), (middle, plain) = stages
    assert plain is None
    for name, value in student.state_dict().items():
        above = name.startswith("5.")
        assert torch.equal(start[name], middle[name]) == above
        assert torch.equal(middle[name], value) != above
    student.load_state_dict(start)
    before = step(student, (x[320:352], None), 0.0)
    student.load_state_dict(middle)
    after = step(student, (x[320:352], None), 0.0)
    assert before.keys() == after.keys() == {"neurons"}  # no labels
    assert float(after["neurons"].detach()) < 0.5 * float(before["neurons"].detach())
    assert all(torch.equal(held[k], v) for k, v in teachers.state_dict().items())


@pytest.mark.parametrize("solver", ["greedy", "mean_field"])
def test_the_chosen_neurons_are_those_that_are_learned(solver):
    x, y = digits()
    data, steps = Batches(x[:96], y[:96]), []
    teacher, student = fit(small_cnn(), Task(train=data, valid=data), epochs=2, lr=0.01).eval(), small_mlp().eval()
    task = Task(train=data, valid=data, teacher=teacher, fit=watched(steps))
    options = {"keep": 0.25, "redundancy": 3.0, "solver": solver}
    torch.manual_seed(1)
    chosen = select(*told_by_neurons(task, ["7"], None), *options.values())
    assert chosen.tolist() != [0, 1, 2, 3]
    torch.manual_seed(1)
    entry("face_neuron_selection")(student, task, **options)
    step, params = steps[0]
    with torch.no_grad():
        guess = student[:3](x[:32]) @ params[-1].T
        wanted = (teacher[:8](x[:32])[:, chosen] - guess).square().sum(1).mean() / 2
        torch.testing.assert_close(step(student, (x[:32], None), 0.0)["neurons"], wanted)


def test_data_that_come_in_another_order_every_time():
    x, y = digits()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Linear(3, 4)).eval()

    class Shuffled(Batches):
        def __iter__(self):
            order = torch.randperm(len(self.x))
            return zip(self.x[order].split(self.size), self.y[order].split(self.size), strict=True)

    found = [
        told_by_neurons(Task(train=data, valid=data, teacher=teacher), ["1"], None)
        for data in (Batches(x[:96], y[:96]), Shuffled(x[:96], y[:96]))
    ]
    torch.testing.assert_close(found[0][0], found[1][0])  # the classes; a batch's brightness depends on its samples


def test_learns_with_attributes_of_the_users_own():
    task = small_task()
    teacher = fit(small_cnn(), task, epochs=6, lr=0.01)

    def attributes(batch):
        return batch[1][:, None] == torch.arange(4), batch[0].flatten(1)[:, :3] > 0

    student = entry("face_neuron_selection")(
        small_cnn(), replace(task, teacher=teacher), attributes=attributes, epochs=15, head_epochs=12, lr=0.02
    )
    assert evaluate(student, task).value >= 0.8


def test_bad_input():
    run, task = entry("face_neuron_selection"), small_task(teacher=small_cnn())
    with pytest.raises(BadOption, match="pass attributes="):
        run(small_cnn(), replace(task, train=Batches(task.train.x, task.train.y.float())))
    with pytest.raises(BadData, match="0 other attributes differ"):
        run(small_cnn(), task, attributes=lambda batch: (torch.eye(4)[batch[1]], torch.ones(len(batch[1]), 3)))
    tokens = nn.Sequential(nn.Embedding(60, 8), nn.Flatten(), nn.Linear(48, 4))
    with pytest.raises(BadOption, match="without real numbers"):
        run(copy.deepcopy(tokens), replace(token_task(), teacher=tokens))
    with pytest.raises(BadOption, match="keep"):
        run(small_mlp(), small_task(teacher=small_mlp()), keep=0.0)
    dead = small_mlp()
    for p in dead.parameters():
        p.data.zero_()
    with pytest.raises(BadData, match="no neuron of the teacher changes"):
        run(small_mlp(), small_task(teacher=dead))


def test_classes_are_those_of_the_training_batches() -> None:
    """Calibration batches may have no labels."""
    task, teacher = small_task(), small_cnn()
    task = replace(task, calibration=[(x, None) for x, _ in task.train or ()], teacher=teacher)
    with recording() as ledger:
        entry("face_neuron_selection")(small_cnn(), task, epochs=0, head_epochs=0)
    assert any("neurons of 1 teacher(s) chosen" in line for line in ledger.notes)
