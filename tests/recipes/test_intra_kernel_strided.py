"""Anwar et al. 2017: the taps that stay are strided and shared, so that rows of the patches' matrix go, exactly."""

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.columns import live_columns, reduced_product
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, bake, mask_of
from featherweight.core.ledger import recording
from featherweight.core.site import sites
from featherweight.core.study import Study
from featherweight.core.task import evaluate
from featherweight.errors import BadOption
from featherweight.recipes.intra_kernel_strided import by_energy, by_error, energies, strided_keep

strided = entry("intra_kernel_strided")


@pytest.mark.parametrize(
    ("kernel", "stride", "groups"), [((3, 3), 2, 1), ((5, 5), 3, 1), ((3, 2), 4, 2), ((3, 3), 2, 6)]
)
def test_the_rows_that_stay_are_counted_by_the_formula(kernel, stride, groups):
    layer = nn.Conv2d(6, 12, kernel, groups=groups)
    taps = kernel[0] * kernel[1]
    offsets = torch.randint(min(stride, taps), (6,))
    keep = strided_keep(tuple(layer.weight.shape), groups, stride, offsets)
    assert keep.shape == layer.weight.shape
    rows = keep.flatten(2).unflatten(0, (groups, -1)).any(1).sum()
    assert int(rows) == sum(-(-(taps - int(n)) // stride) for n in offsets)
    for o in range(12):
        for j in range(6 // groups):
            n = offsets[o // (12 // groups) * (6 // groups) + j]
            assert keep[o, j].flatten().nonzero().flatten().tolist() == list(range(int(n), taps, stride))


def test_the_masked_convolution_is_the_smaller_product():
    layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9, 9)
    offsets = torch.tensor([0, 1, 2, 1])
    attach(layer, Mask(strided_keep((6, 4, 3, 3), 1, 3, offsets)))
    bake(layer)
    assert int(live_columns(layer.weight).sum()) == 12  # of 36
    torch.testing.assert_close(reduced_product(layer, x), layer(x))


def test_filters_that_do_not_share_their_offsets_are_refused():
    offsets = torch.tensor([[0, 1], [0, 1], [1, 1]])
    with pytest.raises(BadOption, match="different offsets"):
        strided_keep((3, 2, 3, 3), 1, 2, offsets)
    apart = torch.tensor([[0], [0], [1], [1]])  # two groups: each map has filters of its own
    assert torch.equal(strided_keep((4, 1, 3, 3), 2, 2, apart), strided_keep((4, 1, 3, 3), 2, 2, torch.tensor([0, 1])))
    with pytest.raises(BadOption, match=r"give one of 0\.\.1"):
        strided_keep((3, 2, 3, 3), 1, 2, torch.tensor([0, 2]))


def test_energy_finds_the_planted_offsets():
    layer = nn.Conv2d(5, 8, 3)
    planted = torch.tensor([0, 1, 2, 1, 0])
    with torch.no_grad():
        layer.weight.mul_(torch.where(strided_keep((8, 5, 3, 3), 1, 3, planted), 1.0, 0.1))
    site = sites(layer)[""]
    assert torch.equal(by_energy(site, 3), planted)
    torch.testing.assert_close(energies(site, 3).sum(), layer.weight.detach().double().square().sum())


def test_errors_find_what_energy_cannot_see():
    """Large taps that read nothing: the images are zero where the taps of the larger offset lie."""
    torch.manual_seed(0)
    x = torch.zeros(96, 1, 1, 4)
    y = torch.arange(96) % 2
    x[:, 0, 0, 1] = y * 2.0 - 1
    layer = nn.Conv2d(1, 2, (1, 4), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[[5.0, -1.0, 5.0, 0.0]]], [[[5.0, 1.0, 5.0, 0.0]]]]))
    model = nn.Sequential(layer, nn.Flatten())
    task = small_task(calibration=[(x, y)])
    site = sites(model)["0"]
    assert by_energy(site, 2).tolist() == [0]
    assert by_error(model, Study(model, task, ["0"], 1), site, 2).tolist() == [1]
    assert bool(site.keep.all())  # nothing is masked yet


@pytest.mark.parametrize("saliency", ["energy", "error"])
def test_prunes_and_recovers(saliency):
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=0.01)
    before = evaluate(model, task).value
    with recording() as ledger:
        strided(
            model,
            task,
            saliency=saliency,
            stride={"0": 2, "3": 3},
            epochs=4,
            finetune=4,
            lr=0.01,
            calibration_batches=1,
        )
    for path, stride in (("0", 2), ("3", 3)):
        keep = mask_of(model.get_submodule(path))
        rows = keep.flatten(1).any(0)
        assert torch.equal(keep.flatten(1), rows.expand(len(keep), -1))  # the same in all filters
        assert int(rows.sum()) <= len(rows) * (1 / stride + 1 / 9)
        assert (model.get_submodule(path).weight[~keep] == 0).all()
    assert evaluate(model, task).value >= before - 0.1
    assert sum("rows of the matrix of patches are left" in text for text in ledger.notes) == 2


def test_masks_survive_and_single_taps_are_skipped():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 4))
    keep = torch.rand(4, 1, 3, 3) > 0.3
    attach(model[0], Mask(keep))
    with recording() as ledger:
        strided(model, small_task(), epochs=0, finetune=0)
    assert not (mask_of(model[0]) & ~keep).any()
    assert "one tap" in ledger.skipped["2"]


def test_bad_options():
    with pytest.raises(BadOption, match="choose another method"):
        strided(small_mlp(), small_task())
    with pytest.raises(BadOption, match="choose another method"):
        strided(nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(256, 4)), small_task())
    with pytest.raises(BadOption, match="stride above 1"):
        strided(small_cnn(), small_task(), stride=1)
