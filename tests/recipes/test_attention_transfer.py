"""Zagoruyko and Komodakis 2017: blind to channels, scale and sign; zero iff the attention maps are proportional."""

import pytest
import torch

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.task import evaluate
from featherweight.ingredients.match.attention_transfer import attention, attention_maps
from matches import loss, rotation


def test_channels_scale_and_sign_do_not_matter():
    f = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    mixed = torch.einsum("dc,bchw->bdhw", rotation(6), f)
    for same in (mixed, f * torch.rand(3, 1, 1, 1).double() * 9, -f, torch.cat([f, f], 1)):
        assert float(loss(attention_maps, same, f)) < 1e-15
    assert float(loss(attention_maps, f.flip(3), f)) > 1e-4


def test_value_by_hand():
    ours, theirs = torch.zeros(1, 2, 1, 2), torch.zeros(1, 1, 1, 2)
    ours[0, :, 0, 0], theirs[0, 0, 0, 1] = 3.0, 1.0  # attention (1, 0) against (0, 1)
    assert float(loss(attention_maps, ours, theirs)) == pytest.approx(0.5 * (1 + 1) / 2)
    assert float(loss(attention_maps, [ours] * 3, [theirs] * 3)) == pytest.approx(3 * 0.5)


def test_maps_have_norm_1_and_dead_ones_are_0():
    maps = torch.randn(2, 3, 4, 4)
    maps[1] = 0
    for over in ("sum", "max"):
        norms = attention(maps, 2.0, over).norm(dim=1)
        torch.testing.assert_close(norms, torch.tensor([1.0, 0.0]))


def test_a_student_comes_nearer_to_the_teachers_attention():
    task = small_task()
    teacher = fit(small_cnn(), task, epochs=6, lr=0.01).eval()

    def gap(model):
        model.eval()
        with torch.no_grad():
            return float(loss(attention_maps, model[:3](task.valid.x), teacher[:3](task.valid.x)))

    start = small_cnn()
    before = gap(start)
    taught = entry("attention_transfer")(start, small_task(teacher=teacher), epochs=10, lr=0.01)
    assert gap(taught) < 0.5 * before
    assert evaluate(taught, task).value >= 0.9
