"""Hu et al. 2016: the part of an activation that is zero; a channel that is always zero goes without a trace."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.task import evaluate
from featherweight.errors import BadOption
from featherweight.ingredients.score.zeros import zeros
from featherweight.prune import prune

apoz = entry("apoz")
NOW = {"epochs": 0, "finetune": 0, "round_to": 1, "rounds": 1}


def scored(model, path, task, batches=3):
    return zeros(Site(path, model.get_submodule(path), study=Study(model, task, [path], batches)))


def test_zeros_streamed_over_batches_are_those_of_all_samples_at_once():
    task = small_task()
    model = fit(small_cnn(), task, epochs=2).eval()
    x = task.train.x
    for path, stop in (("0", 3), ("3", 6)):
        at_once = (model[:stop](x) == 0).double().mean((0, 2, 3))
        torch.testing.assert_close(scored(model, path, task), 1 - at_once)
        assert 0.05 < at_once.min() < at_once.max() < 0.95
    mlp = small_mlp()
    torch.testing.assert_close(scored(mlp, "1", task), (mlp[:3](x) != 0).double().mean(0))


def test_a_channel_that_is_never_active_goes_first_and_without_a_trace():
    task = small_task()
    model = fit(small_cnn(), task, epochs=3, lr=1e-2)
    with torch.no_grad():
        model[1].bias[[2, 5]] = -1e6
        model[4].bias[[0, 7, 9, 14]] = -1e6
    assert scored(model, "0", task)[[2, 5]].tolist() == [0, 0]
    before = model.eval()(task.valid.x)
    apoz(model, task, prune_ratio=6 / 24, **NOW)
    assert (model[0].out_channels, model[3].out_channels) == (6, 12)
    torch.testing.assert_close(model.eval()(task.valid.x), before, rtol=1e-5, atol=1e-5)


class Residual(nn.Module):
    """Zeros are seen behind the block's first convolution, not behind those that end in a sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, 8, 3, padding=1) for i in (1, 8, 8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.b(self.a(x).relu())).mean((2, 3)))


def test_layers_without_a_relu_stay_and_that_is_said():
    model = Residual()
    with recording() as ledger:
        apoz(model, small_task(), prune_ratio=0.25, **NOW)
    assert (model.stem.out_channels, model.a.out_channels, model.b.out_channels) == (8, 6, 8)
    assert "never zero" in ledger.skipped["stem"]
    assert "never zero" in ledger.skipped["b"]
    smooth = small_cnn()
    smooth[2] = smooth[5] = nn.GELU()
    with pytest.raises(BadOption, match="no layer that was chosen has a score"):
        apoz(smooth, small_task(), **NOW)


def test_it_prunes_in_rounds_and_recovers():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2)
    before = evaluate(model, task).value
    apoz(model, task, prune_ratio=0.5, rounds=2, epochs=2, finetune=14, lr=1e-2, round_to=1)
    assert model[0].out_channels + model[3].out_channels == 12
    assert evaluate(model, task).value >= before - 0.1


def test_the_score_masks_weights_too():
    task = small_task()
    model = copy.deepcopy(small_mlp())
    dead = scored(model, "1", task).argsort()[:8]
    prune(model, task, score="zeros", scope="layer", sparsity=0.25, where="1", rounds=1, epochs=0, finetune=0)
    assert (model[1].weight.detach()[dead] == 0).float().mean() > 0.9  # rows go whole, but for ties at the border
