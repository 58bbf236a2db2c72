"""Li et al. 2017: features count inside the regions alone; one region as large as the map is the whole map."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.errors import BadData, BadOption
from featherweight.ingredients.match.region_features import region_features, region_outputs
from matches import taps, watched
from scenes import detection_task, detector, proposed


def value(ours, theirs, boxes=None, **options):
    regions = None if boxes is None else lambda output, batch: boxes
    return region_features(taps(ours, logits=ours), taps(theirs), None, 0.0, regions=regions, **options)


BOXES = [torch.tensor([[0.0, 0.0, 0.5, 0.25], [0.5, 0.5, 1.0, 1.0]]), torch.tensor([[0.25, 0.25, 0.3, 0.3]])]


def test_formula_by_a_slow_reference():
    ours, theirs = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    cells = [(0, 0, 4, 0, 2), (0, 4, 8, 4, 8), (1, 2, 3, 2, 3)]  # image, columns, rows
    total = 0.0
    for image, x1, x2, y1, y2 in cells:
        squares = [
            float(ours[image, c, y, x] - theirs[image, c, y, x]) ** 2
            for c in range(3) for y in range(y1, y2) for x in range(x1, x2)
        ]  # fmt: skip
        total += sum(squares) / len(squares)
    assert float(value(ours, theirs, BOXES)) == pytest.approx(total / (2 * 3), rel=1e-5)


def test_what_is_outside_all_regions_changes_nothing():
    ours, theirs = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    inside = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    inside[0, :, 0:2, 0:4] = inside[0, :, 4:8, 4:8] = inside[1, :, 2, 2] = True
    before = value(ours, theirs, BOXES)
    assert torch.equal(value(torch.where(inside, ours, 9 * torch.randn(2, 3, 8, 8)), theirs, BOXES), before)
    assert not torch.equal(value(torch.where(inside, ours + 1, ours), theirs, BOXES), before)
    grad = torch.func.grad(lambda f: value(f, theirs, BOXES))(ours)
    assert torch.equal((grad != 0).any(1, keepdim=True), inside)


def test_one_region_of_the_whole_map_is_the_whole_map():
    ours, theirs = torch.randn(4, 3, 5, 7), torch.randn(4, 3, 5, 7)
    whole = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])] * 4
    for found in (value(ours, theirs, whole), value(ours, theirs)):
        assert float(found) == pytest.approx(0.5 * float(F.mse_loss(ours, theirs)), rel=1e-5)
    assert float(value(ours, ours, whole)) == 0


def test_a_teacher_that_saw_a_larger_image():
    ours = torch.randn(2, 3, 4, 4)
    larger = F.interpolate(ours, scale_factor=2, mode="bilinear")
    assert float(value(ours, larger)) == pytest.approx(0, abs=1e-10)
    half = [torch.tensor([[0.0, 0.0, 0.5, 1.0]])] * 2
    crop = F.interpolate(ours[:, :, :, :2], size=(8, 4), mode="bilinear")
    theirs = torch.randn(2, 3, 8, 8)
    wanted = 0.5 * float(F.mse_loss(crop, theirs[:, :, :, :4]))
    assert float(value(ours, theirs, half)) == pytest.approx(wanted, rel=1e-5)


def test_regions_are_drawn_without_a_gradient_and_empty_ones_left_out():
    f = torch.randn(2, 3, 8, 8, requires_grad=True)
    t, seen = torch.randn(2, 3, 8, 8), []

    def regions(output, batch):
        seen.append(output)
        return [torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.rand(5, 4).sort(1).values]

    assert torch.isfinite(region_features(taps(f, logits=f), taps(t), None, 0.0, regions=regions, count=3))
    assert not seen[0].requires_grad
    none = [torch.zeros(0, 4), torch.zeros(3, 4)]
    nothing = value(f, t, none)
    nothing.backward()
    assert nothing.item() == 0
    assert float(f.grad.abs().sum()) == 0
    single = {round(value(f, t, BOXES, count=1).item(), 5) for _ in range(30)}
    assert len(single) == 3  # each of the three regions was drawn


def test_stages_have_the_labels_features_and_then_outputs():
    steps = []
    task = detection_task(32)
    teacher = detector(12).eval()
    student = entry("mimic_detection")(
        detector(8), replace(task, teacher=teacher, fit=watched(steps)), regions=proposed
    )
    batch = next(iter(task.train))
    assert [step(student, batch, 0.0).keys() for step, _ in steps] == [
        {"labels", "regions"},
        {"labels", "regions", "outputs"},
    ]
    adapters = [[tuple(p.shape) for p in params[len(list(student.parameters())) :]] for _, params in steps]
    assert adapters == [[(24, 16, 1, 1)]] * 2
    assert steps[0][1][-1] is steps[1][1][-1], "the second stage goes on with the adapter of the first"
    with torch.no_grad():
        student.eval()
        terms, ours, theirs = steps[1][0](student, batch, 0.0), student(batch["image"]), teacher(batch["image"])
        wanted = region_outputs({"": ours}, {"": theirs}, batch, 0.0, regions=proposed)
        torch.testing.assert_close(terms["outputs"], wanted)


def test_a_small_detector_comes_near_the_large_ones_features_where_objects_are():
    task = detection_task(192)
    teacher = fit(detector(8), task, epochs=10, lr=0.01).eval()
    held = copy.deepcopy(teacher.state_dict())
    start = detector(8)  # equal widths: no adapter, so that features can be compared afterwards
    alone = fit(copy.deepcopy(start), task, epochs=10, lr=0.01)
    with recording() as ledger:
        student = entry("mimic_detection")(
            copy.deepcopy(start), replace(task, teacher=teacher), weight=4.0, epochs=7, output_epochs=3, lr=0.01
        )
    assert any("mimics the teacher's layer 5 in the boxes of the labels" in text for text in ledger.notes)
    batch = next(iter(task.valid))

    def distance(model):
        with torch.no_grad():
            maps = [m.eval()[:6](batch["image"]) for m in (model, teacher)]
        return float(value(*maps, batch["boxes"]))

    assert distance(student) < 0.5 * distance(alone)
    assert evaluate(student, task).value > 0.9
    assert all(torch.equal(held[k], v) for k, v in teacher.state_dict().items())


def test_boxes_of_labels_one_for_each_image():
    boxes = {"boxes": torch.tensor([[0.0, 0.0, 0.5, 0.5]])}
    task = small_task(teacher=small_cnn())
    x = torch.randn(4, 1, 8, 8)
    listed = replace(task, train=[(x, [boxes] * 4)], loss=lambda output, target: output.square().mean())
    with recording() as ledger:
        entry("mimic_detection")(small_cnn(), listed, epochs=1, output_epochs=1)
    assert any("the boxes of the labels" in text for text in ledger.notes)


def test_bad_input():
    task = small_task(teacher=small_cnn())
    for boxes in ([torch.zeros(1, 4)], [torch.zeros(4)] * 32, [torch.full((1, 4), float("nan"))] * 32):
        with pytest.raises(BadData, match="regions of 32 images"):
            entry("mimic_detection")(small_cnn(), task, regions=lambda output, batch, boxes=boxes: boxes, epochs=1)
    with pytest.raises(BadOption, match="both must detect the same"):
        entry("mimic_detection")(small_cnn(5), task, epochs=0, output_epochs=1)
    pixels = [{"boxes": torch.tensor([[2.0, 2.0, 6.0, 6.0]])}] * 4
    listed = replace(task, train=[(torch.randn(4, 1, 8, 8), pixels)], loss=lambda output, target: output.sum())
    with pytest.raises(BadData, match="boxes reach 6, expected left, top, right, bottom as fractions"):
        entry("mimic_detection")(small_cnn(), listed, epochs=1)
    vectors = replace(task, teacher=nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 4)))
    with pytest.raises(BadOption, match="has no feature maps"):
        entry("mimic_detection")(small_cnn(), vectors, epochs=1)
