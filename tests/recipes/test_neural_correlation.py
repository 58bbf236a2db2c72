"""Sun et al. 2016: correlations as numpy has them, exact counts, mostly from the upper half, the last layer first."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, bake, mask_of
from featherweight.core.ledger import recording
from featherweight.core.site import sites
from featherweight.core.task import Task
from featherweight.errors import BadData, BadOption
from featherweight.recipes.neural_correlation import correlations, select

neural_correlation = entry("neural_correlation")


def pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().numpy().ravel(), b.detach().double().numpy().ravel()
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def test_streamed_correlations_are_those_of_numpy():
    model, task = small_mlp(), small_task()
    model[1].bias.data[3] = -100.0  # a dead neuron
    found = sites(model)
    x = task.train.x.flatten(1)
    hidden = model[1](x).relu()
    r = correlations(model, task, found["1"], 100, 64)
    assert float(r.abs().max()) <= 1
    assert not r[3].any()
    for i, k in ((0, 0), (5, 17), (31, 63)):
        assert float(r[i, k]) == pytest.approx(pearson(hidden[:, i], x[:, k]), abs=1e-5)
    r = correlations(model, task, found["3"], 100, 64)
    assert float(r[2, 7]) == pytest.approx(pearson(model[3](hidden)[:, 2], hidden[:, 7]), abs=1e-5)
    assert not r[:, 3].any()


CONVS = [
    nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2),
    nn.Conv2d(4, 2, (3, 2), padding="same", padding_mode="circular"),
    nn.Conv2d(4, 2, 2, dilation=2, padding="valid"),
]


@pytest.mark.parametrize("conv", CONVS, ids=["grouped", "circular", "dilated"])
def test_in_convolutions_it_is_the_mean_size_over_positions(conv):
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(40, 4, 6, 6)
    data = Batches(x, torch.zeros(40, dtype=torch.long))
    r = correlations(model, Task(train=data, valid=data), sites(model)["0"], 100, 1000)
    out = conv(x).relu()
    for o, i, ky, kx in ((0, 0, 0, 0), (1, 1, 1, 1)):
        group = o // (conv.out_channels // conv.groups)
        pick = torch.zeros_like(conv.weight)  # what one connection reads: a convolution with a single one
        pick[o, i, ky, kx] = 1
        probe = nn.Conv2d(4, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
                          False, conv.padding_mode)  # fmt: skip
        probe.weight.data = pick
        seen = probe(x)[:, o]
        assert group < conv.groups
        sizes = [abs(pearson(out[:, o, y, z], seen[:, y, z])) for y in range(out.shape[2]) for z in range(out.shape[3])]
        assert float(r[o, i, ky, kx]) == pytest.approx(sum(sizes) / len(sizes), abs=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.12, 0.03, 0.001])
@pytest.mark.parametrize("size", [64, 75])
def test_every_neuron_keeps_its_share_of_connections(share, size):
    r = torch.randn(20, size).clamp(-1, 1)
    r[0] = r[0].abs()
    r[1] = 0
    keep = select(r, torch.ones(20, size, dtype=torch.bool), share, 0.75)
    assert keep.sum(1).tolist() == [max(1, round(share * size))] * 20


def test_signs_are_chosen_apart_and_most_comes_from_the_upper_halves():
    torch.manual_seed(0)
    r = torch.rand(50, 200) * torch.where(torch.arange(200) < 120, 1.0, -1.0)
    keep = select(r, torch.ones(50, 200, dtype=torch.bool), 0.2, 0.75)
    assert (keep & (r >= 0)).sum(1).tolist() == [24] * 50
    for group in (r[:, :120].abs(), r[:, 120:].abs()):
        middle = group.median(1, keepdim=True).values
        chosen = keep[:, :120] if group.shape[1] == 120 else keep[:, 120:]
        share = float((chosen & (group >= middle)).sum() / chosen.sum())
        assert share == pytest.approx(0.75, abs=0.02)
    best = select(r, torch.ones(50, 200, dtype=torch.bool), 0.1, 1.0)
    assert float(r[best].abs().mean()) > 0.7
    assert not torch.equal(best, select(r, torch.ones(50, 200, dtype=torch.bool), 0.1, 1.0)), "chosen at random"


def test_planted_connections_are_chosen_over_noise():
    torch.manual_seed(0)
    signal = torch.randn(256, 8)
    x = torch.cat([signal, torch.randn(256, 24)], 1)
    y = signal @ torch.randn(8, 3)
    model = nn.Sequential(nn.Linear(32, 3, bias=False))
    data = Batches(x, y)
    task = Task(train=data, valid=data, loss=F.mse_loss)
    fit(model, task, epochs=30, lr=0.01)
    neural_correlation(model, task, sparsity=0.75, upper=1.0, epochs=0, finetune=0)
    keep = mask_of(model[0])
    assert float(keep[:, :8].float().mean()) > 2 * float(keep[:, 8:].float().mean())


def test_layers_take_their_turn_from_the_last_to_the_first_each_from_the_denser_network():
    labels, zeros = [], []

    def watched(model, task, **options):
        labels.append(options["label"])
        zeros.append([int((model[i].weight == 0).sum()) for i in (0, 3, 8)])
        return fit(model, task, **options)

    model = small_cnn()
    neural_correlation(model, small_task(fit=watched), sparsity=0.75, epochs=3, finetune=1)
    assert labels == ["retrain 1/3: 8", "retrain 2/3: 3", "retrain 3/3: 0", "fine-tune"]
    gone = [8 * (9 - 2), 16 * (72 - 18), 4 * (16 - 4)]
    assert zeros == [[0, 0, gone[2]], [0, gone[1], gone[2]], gone, gone]
    bake(model)
    assert [int((model[i].weight == 0).sum()) for i in (0, 3, 8)] == gone


def test_an_earlier_mask_stands():
    model = small_mlp()
    keep = torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    neural_correlation(model, small_task(), sparsity={"1": 0.75}, epochs=0, finetune=0)
    assert not (mask_of(model[1]) & ~keep).any()
    assert mask_of(model[1]).sum(1).tolist() == [16] * 32


def test_activations_that_are_not_finite_are_refused():
    model, task = small_mlp(), small_task()
    task.train.x[0] = torch.nan
    with pytest.raises(BadData, match="around 3 are not finite"):
        neural_correlation(model, task, epochs=0, finetune=0)


class Backwards(nn.Module):
    """Layers that are written down in another order than they are called, one by keyword; attention's last is not."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.attention = nn.Linear(8, 4), nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(input=x.flatten(1, 2)).relu()
        return self.last((x + self.attention(x, x, x)[0]).mean(1))


def test_the_order_is_that_of_calls_and_what_is_not_called_is_left_alone():
    labels = []

    def watched(model, task, **options):
        labels.append(options["label"])
        return model

    model, task = Backwards(), small_task(fit=watched)
    with recording() as ledger:
        neural_correlation(model, task, sparsity=0.5, epochs=2, finetune=0)
    assert labels[:2] == ["retrain 1/2: last", "retrain 2/2: first"]
    assert ledger.skipped["attention.out_proj"] == "its weight is used without a call of the layer"
    assert mask_of(model.attention.out_proj) is None
    with pytest.raises(BadOption, match="without a call"):
        neural_correlation(Backwards(), task, where="attention.out_proj")


def test_inputs_of_several_sizes_are_refused():
    torch.manual_seed(0)
    data = [(torch.randn(4, 1, size, size), torch.zeros(4, dtype=torch.long)) for size in (8, 6)]
    with pytest.raises(BadData, match="inputs of several sizes"):
        neural_correlation(small_cnn(), Task(train=data, valid=data), where="0", epochs=0, finetune=0)
