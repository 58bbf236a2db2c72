"""Liu et al. 2019: affinities see directions alone, a critic its gradient penalty, pixels the authors' weight."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.errors import BadOption
from featherweight.ingredients.match.pairwise_affinity import affinity, pairwise_affinity
from featherweight.ingredients.match.softened import softened
from featherweight.recipes.structured_kd_seg import Critic, judged, telling
from matches import loss, on_logits, rotation, watched
from scenes import mask_task, segmenter


def pairs(ours, theirs, scale=0.01):  # windows of one pixel
    return float(loss(pairwise_affinity, ours, theirs, scale=scale))


def test_affinity_by_a_slow_reference():
    ours, theirs = torch.randn(2, 3, 3, 2, dtype=torch.float64), torch.randn(2, 5, 3, 2, dtype=torch.float64)
    total = 0.0
    for sample in range(2):
        for i in range(6):
            for j in range(6):
                a, b = (
                    torch.cosine_similarity(f[sample].flatten(1)[:, i], f[sample].flatten(1)[:, j], dim=0)
                    for f in (ours, theirs)
                )
                total += float(a - b) ** 2
    assert pairs(ours, theirs) == pytest.approx(total / (2 * 6**2), rel=1e-9)


def test_nodes_are_maxima_of_windows():
    maps = torch.arange(16.0).view(1, 1, 4, 4) - 8
    assert torch.equal(affinity(maps, 0.5)[0].sign(), torch.tensor([-3.0, -1.0, 5.0, 7.0]).sign().outer(
        torch.tensor([-3.0, -1.0, 5.0, 7.0]).sign()))  # fmt: skip
    for scale, side, nodes in ((0.5, 8, 4), (0.5, 2, 4), (0.25, 8, 16), (1.0, 8, 1), (5.0, 3, 1), (0.01, 3, 9)):
        assert affinity(torch.randn(2, 4, side, side), scale).shape == (2, nodes, nodes)


def test_channels_may_be_mixed_and_pixels_scaled_but_no_cosine_changed():
    theirs = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    mixed = torch.einsum("oc,nchw->nohw", rotation(4), theirs)
    scaled = mixed * (0.1 + torch.rand(3, 1, 3, 3, dtype=torch.float64))
    padded = torch.cat([scaled, torch.zeros_like(scaled)], 1)
    for same in (theirs, mixed, scaled, padded):
        assert pairs(same, theirs) == pytest.approx(0, abs=1e-20)
    other = scaled.clone()
    other[0, :, 1, 1] += 1
    assert pairs(other, theirs) > 1e-4


def test_critics_penalty_by_sample():
    critic, ours, theirs, image = (
        Critic(3, 1, 8),
        torch.randn(4, 3, 6, 6),
        torch.randn(4, 3, 6, 6),
        torch.rand(4, 1, 12, 12),
    )
    with torch.no_grad():
        for attention in critic.attention:
            attention.gain.fill_(0.7)
    torch.manual_seed(5)
    found = telling(critic, ours, theirs, image, 10.0)
    torch.manual_seed(5)
    at, steep = torch.rand(4, 1, 1, 1), 0.0
    for i in range(4):
        between = (at[i] * theirs[i] + (1 - at[i]) * ours[i])[None].requires_grad_(True)
        (slope,) = torch.autograd.grad(critic(between, image[i : i + 1]).sum(), between)
        steep += float(slope.norm() - 1) ** 2 / 4
    gap = float((critic(ours, image).mean() - critic(theirs, image).mean()).detach())
    assert float(found.detach()) == pytest.approx(gap + 10 * steep, rel=1e-4)
    alike = telling(critic, ours, ours, image, 0.0)
    assert float(alike.detach()) == 0
    order = [2, 0, 3, 1]
    torch.testing.assert_close(critic(ours[order], image[order]), critic(ours, image)[order])
    assert critic(torch.randn(2, 3, 1, 1), image[:2]).shape == (2,)


def test_critic_learns_which_is_the_teachers_and_uses_the_image():
    critic = Critic(2, 1, 8)
    image = torch.rand(32, 1, 8, 8)
    theirs = torch.cat([image, 1 - image], 1)
    ours = theirs.flip(0)  # the same maps, beside other images
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        telling(critic, ours, theirs, image, 1.0).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(critic(theirs, image).mean() - critic(ours, image).mean()) > 0.05


def test_student_pleases_the_critic_and_weights_are_those_given():
    steps, task = [], mask_task(16)
    critic, image = Critic(3, 1, 4), torch.rand(2, 1, 24, 24)
    term, _ = judged(replace(task, split=lambda batch: ((batch,), {}, None)), critic, 0.1, 10.0)
    scores = torch.randn(2, 3, 24, 24)
    assert term.weight == 0.1
    torch.testing.assert_close(term.match({"": scores}, {"": scores}, image, 0.0), -critic(scores, image).mean())
    student, batch, found = segmenter(4).eval(), next(iter(task.train)), {}
    task = replace(task, teacher=segmenter(6).eval(), fit=watched(steps))
    for weight, scale in ((0.5, 0.5), (2.0, 0.5), (0.5, 0.25)):
        entry("structured_kd_seg")(student, task, holistic=0, pair=weight, scale=scale)
        found[weight, scale] = float(steps[-1][0](student, batch, 0.0)["pairs"].detach())
    assert found[2.0, 0.5] == pytest.approx(4 * found[0.5, 0.5])
    assert found[0.5, 0.25] != pytest.approx(found[0.5, 0.5])


def test_terms_and_their_weights():
    steps, task = [], mask_task(16)
    teacher, student = segmenter(6).eval(), segmenter(4).eval()

    def keep(model, task, **options):
        steps.append(options)
        return model

    task = replace(task, teacher=teacher, fit=keep)
    entry("structured_kd_seg")(student, task, critic_width=4)
    batch = {key: value[:8] for key, value in next(iter(task.train)).items()}
    terms = steps[0]["step"](student, batch, 0.0)
    assert terms.keys() == {"labels", "pixels", "pairs", "holistic"}
    with torch.no_grad():
        ours, theirs = student(batch["image"]).softmax(1), teacher(batch["image"]).softmax(1)
        of_code = 10 * (theirs * (theirs / ours).log()).sum() / (24 * 24)  # summed over a batch of 8
        torch.testing.assert_close(terms["pixels"], of_code, rtol=1e-3, atol=1e-6)
    ((params, judge),) = steps[0]["also"]
    assert not {id(p) for p in params} & {id(p) for p in steps[0]["params"]}
    sum(terms.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.isfinite(judge(student, batch, 0.0)["critic"])
    steps.clear()
    entry("structured_kd_seg")(student, task, holistic=0, pair=0)
    assert "also" not in steps[0]
    assert steps[0]["step"](student, batch, 0.0).keys() == {"labels", "pixels"}


def test_free_features_find_the_affinities_of_wider_ones():
    ours, theirs = torch.randn(1, 8, 4, 4, requires_grad=True), torch.randn(1, 12, 4, 4)
    optimizer = torch.optim.Adam([ours], lr=0.05)
    values = []
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(pairwise_affinity, ours, theirs, scale=0.25)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.1 * values[0]


def test_a_small_segmenter_learns_objects_from_the_large_one_that_its_labels_do_not_have():
    task = mask_task(64)
    teacher = fit(segmenter(8), task, epochs=8, lr=0.02).eval()
    held = copy.deepcopy(teacher.state_dict())
    blind = [{"image": part["image"], "mask": torch.zeros_like(part["mask"])} for part in task.train]
    unseen, start = replace(task, train=blind, teacher=teacher), segmenter(4)
    alone = fit(copy.deepcopy(start), unseen, epochs=12, lr=0.02)
    student = entry("structured_kd_seg")(copy.deepcopy(start), unseen, critic_width=4, epochs=12, lr=0.02)
    images = next(iter(task.valid))["image"]
    with torch.no_grad():
        near, far = (
            float(on_logits(softened, m.eval()(images), teacher(images), temperature=1.0)) for m in (student, alone)
        )
    assert near < 0.5 * far, (near, far)
    assert all(torch.equal(held[k], v) for k, v in teacher.state_dict().items())


def test_bad_input():
    run = entry("structured_kd_seg")
    with pytest.raises(BadOption, match="scores of every pixel"):
        run(small_cnn(), small_task(teacher=small_cnn()))
    task = mask_task(16)
    with pytest.raises(BadOption, match="the same classes for the same pixels"):
        run(segmenter(4), replace(task, teacher=segmenter(4, classes=5)))
    pooled = nn.Sequential(segmenter(4), nn.AvgPool2d(2))
    with pytest.raises(BadOption, match="the same classes for the same pixels"):
        run(segmenter(4), replace(task, teacher=pooled))
    steps = []
    with pytest.raises(BadOption, match="scale"):
        run(segmenter(4), replace(task, teacher=segmenter(4), fit=watched(steps)), scale=0.0)
