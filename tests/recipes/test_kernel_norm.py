"""The norm of kernels, filters and maps: an option of the verb, listed as a part."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import Batches, small_cnn, small_task
from featherweight import compress, methods
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.task import Task
from featherweight.errors import UnknownName
from featherweight.ingredients.score.kernel_norm import by_input, kernel_norm
from featherweight.prune import prune

NOW = {"rounds": 1, "epochs": 0, "finetune": 0}


def test_it_is_listed_as_a_part_with_its_options_and_is_no_method():
    row = methods("part")["kernel_norm"].facts()
    assert (row["family"], row["kind"]) == ("prune", "part")
    assert [option["name"] for option in row["options"]] == ["norm", "of"]
    assert all(option["meaning"] for option in row["options"])
    with pytest.raises(UnknownName, match="kernel_norm"):
        compress(small_cnn(), small_task(), "kernel_norm")
    with pytest.raises(UnknownName, match="did you mean 'l1'"):
        kernel_norm(Site.of(torch.ones(2, 2)), norm="l11")


def test_norms_by_hand():
    site = Site.of(torch.tensor([[[[3.0, -4.0]], [[0.0, 0.0]]], [[[1.0, 1.0]], [[2.0, 0.0]]]]))  # (2, 2, 1, 2)
    for norm, expected in (("l1", [7, 0, 2, 2]), ("l2", [5, 0, 2**0.5, 2]), ("mean", [3.5, 0, 1, 1])):
        found = kernel_norm(site, norm=norm)
        torch.testing.assert_close(found[..., 0, 0].flatten(), torch.tensor(expected, dtype=torch.float32))
        assert found.shape == site.weight.shape
    whole = Site.of(site.weight, "filter")
    for norm, expected in (("l1", [7, 4]), ("l2", [5, 6**0.5]), ("mean", [1.75, 1])):
        torch.testing.assert_close(kernel_norm(whole, norm=norm), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("norm", ["l1", "l2", "mean"])
def test_permuted_weights_have_permuted_scores(norm):
    weight, rows, columns = torch.randn(6, 4, 3, 3), torch.randperm(6), torch.randperm(4)
    found = kernel_norm(Site.of(weight), norm=norm)
    torch.testing.assert_close(kernel_norm(Site.of(weight[rows][:, columns]), norm=norm), found[rows][:, columns])


def test_masked_kernels_leave_a_table_of_connections_that_computes_the_same():
    model, x = small_cnn(), torch.randn(2, 1, 8, 8)
    prune(model, small_task(), score="kernel_norm", grain="kernel", scope="layer", sparsity=0.6, where="3", **NOW)
    weight = model[3].weight.detach()
    kept = weight.flatten(2).abs().sum(2) > 0
    assert int(kept.sum()) == 16 * 8 - int(0.6 * 16 * 8)
    seen = model.eval()[:3](x).detach()
    by_table = torch.zeros(2, 16, 4, 4)
    for o, i in itertools.product(range(16), range(8)):
        if kept[o, i]:
            by_table[:, o : o + 1] += F.conv2d(seen[:, i : i + 1], weight[o : o + 1, i : i + 1], stride=2, padding=1)
    torch.testing.assert_close(by_table, model[3](seen).detach(), rtol=1e-5, atol=1e-5)


def test_the_smallest_kernels_go():
    model = small_cnn()
    sizes = model[3].weight.detach().flatten(2).norm(dim=2)
    prune(model, small_task(), score=lambda site: kernel_norm(site, norm="l2"), grain="kernel", scope="layer",
          sparsity=0.5, where="3", **NOW)  # fmt: skip
    gone = model[3].weight.detach().flatten(2).abs().sum(2) == 0
    assert sizes[gone].max() <= sizes[~gone].min()


class Grouped(nn.Module):
    """A map can be read by a grouped convolution and by a linear layer at several positions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(6 * 36, 3)

    def forward(self, x):
        return self.fc(self.b(self.a(x).relu()).relu().flatten(1))


def test_a_map_can_be_judged_by_what_reads_it():
    torch.manual_seed(0)
    model, x = Grouped(), torch.randn(4, 1, 8, 8)
    task = Task(valid=Batches(x, torch.zeros(4).long()), train=Batches(x, torch.zeros(4).long()))
    study = Study(model, task, ["a", "b"], 1)
    found = {p: kernel_norm(Site(p, model.get_submodule(p), study=study), of="consumers") for p in ("a", "b")}
    weight = model.b.weight.detach()
    expected = [weight[3 * (i // 2) : 3 * (i // 2) + 3, i % 2].abs().sum() for i in range(4)]
    torch.testing.assert_close(found["a"], torch.stack(expected).double())
    torch.testing.assert_close(found["b"], model.fc.weight.detach().view(3, 6, 36).abs().sum((0, 2)).double())
    assert by_input(nn.ConvTranspose2d(3, 5, 2)).shape == (3, 20)


def test_consumers_decide_in_the_verb():
    model = small_cnn()
    read = model[3].weight.detach().abs().sum((0, 2, 3))
    kept = model[0].weight.detach()[read.argsort()[4:].sort().values]
    prune(model, small_task(), score="consumer_norm", grain="filter", scope="layer", prune_ratio=0.5, round_to=1,
          where="0", **NOW)  # fmt: skip
    assert torch.equal(model[0].weight, kept)
