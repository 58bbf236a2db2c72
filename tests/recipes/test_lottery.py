"""Frankle and Carbin 2019, Renda et al. 2020: survivors are bit-equal to the snapshot, training starts from there."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, bake, mask_of
from featherweight.core.ledger import recording
from featherweight.core.task import Task
from featherweight.errors import BadOption
from featherweight.recipes.lottery import rounds_for

lottery = entry("lottery")


class Watched:
    """The training loop, which remembers the plain weights before every training and at the start of every epoch."""

    def __init__(self) -> None:
        self.runs: list[dict] = []

    def __call__(self, model: nn.Module, task: Task, *, before_epoch=None, **options) -> nn.Module:
        rates = []
        plain = {k: v.clone() for k, v in bake(copy.deepcopy(model)).state_dict().items()}
        run = {"start": plain, "seen": {}, "rates": rates, **options}
        self.runs.append(run)

        def watched(epoch: int) -> None:
            run["seen"][epoch] = {k: v.clone() for k, v in bake(copy.deepcopy(model)).state_dict().items()}
            if before_epoch is not None:
                before_epoch(epoch)

        decay = options.pop("decay", None)
        if decay is not None:
            options["decay"] = lambda progress: rates.append(decay(progress)) or rates[-1]
        fit(model, task, before_epoch=watched, **options)
        run["end"] = {k: v.clone() for k, v in bake(copy.deepcopy(model)).state_dict().items()}
        return model


OPTIONS = {"sparsity": 0.75, "rate": 0.5, "lr": 0.05}


@pytest.mark.parametrize("rewind", [0, 1])
def test_survivors_are_bit_equal_to_the_snapshot(rewind):
    watched, model = Watched(), small_cnn()
    lottery(model, small_task(fit=watched), epochs=3, rewind=rewind, **OPTIONS)
    dense, first, second = watched.runs
    early = dense["seen"][rewind]
    for run, sparsity in ((first, 0.5), (second, 0.75)):
        for name, value in run["start"].items():
            if name in ("0.weight", "3.weight", "8.weight"):
                gone = run["start"][name] == 0
                assert int(gone.sum()) == int(sparsity * gone.numel())
                assert torch.equal(value, torch.where(gone, 0.0, early[name]))
            else:  # biases, norms and their statistics go back too
                assert torch.equal(value, early[name])
    assert rewind == 0 or not torch.equal(early["3.weight"], dense["start"]["3.weight"])
    assert [run["label"].split()[2] for run in watched.runs] == ["dense", "ticket", "ticket"]


def test_the_learning_rate_goes_back_to_where_the_weights_were():
    watched = Watched()
    lottery(small_mlp(), small_task(fit=watched), epochs=4, rewind=1, **OPTIONS)
    ticket = watched.runs[1]
    assert ticket["seen"].keys() == {0, 1, 2}
    assert ticket["rates"][0] == pytest.approx(0.5 * (1 + 2**-0.5))  # the cosine after a quarter of the run
    assert ticket["rates"][-1] < 0.05


def test_survivors_that_are_kept_go_on_from_trained_weights():
    watched = Watched()
    lottery(small_mlp(), small_task(fit=watched), epochs=2, survivors="kept", **{**OPTIONS, "sparsity": 0.5})
    dense, ticket = watched.runs
    kept = ticket["start"]["1.weight"] != 0
    assert not torch.equal(ticket["start"]["1.weight"][kept], dense["start"]["1.weight"][kept])
    assert torch.equal(ticket["start"]["1.bias"], ticket["seen"][0]["1.bias"])
    assert ticket["rates"][0] == 1.0


def test_the_smallest_of_what_was_trained_go():
    watched = Watched()
    lottery(small_mlp(), small_task(fit=watched), epochs=2, start="given", **{**OPTIONS, "sparsity": 0.5, "lr": 0.2})
    dense, ticket = watched.runs
    gone, trained = ticket["start"]["1.weight"] == 0, dense["end"]["1.weight"].abs()
    assert int(gone.sum()) == 1024
    assert float(trained[gone].max()) <= float(trained[~gone].min())
    at_first = dense["start"]["1.weight"].abs()
    assert float(at_first[gone].max()) > float(at_first[~gone].min()), "which are not the smallest at the start"


def test_given_weights_are_the_first_ones_and_trained_ones_are_drawn_anew():
    for start in ("given", "redrawn"):
        watched, model = Watched(), small_mlp()
        before = model[1].weight.detach().clone()
        lottery(model, small_task(fit=watched), epochs=1, start=start, **OPTIONS)
        assert torch.equal(watched.runs[0]["start"]["1.weight"], before) == (start == "given")


def test_the_control_is_the_tickets_own_mask_on_other_weights():
    runs = {}
    for survivors in ("rewound", "redrawn"):
        torch.manual_seed(0)
        watched = Watched()
        lottery(small_mlp(), small_task(fit=watched), epochs=2, rewind=1, survivors=survivors, **OPTIONS)
        runs[survivors] = watched.runs
    ticket, control = runs["rewound"][-1], runs["redrawn"][-1]
    for name in ("1.weight", "3.weight"):
        kept = ticket["start"][name] != 0
        assert torch.equal(kept, control["start"][name] != 0)
        assert not torch.equal(ticket["start"][name], control["start"][name])
    assert (len(ticket["seen"]), len(control["seen"])) == (1, 2), "training starts anew"


def loss_after(seed: int, survivors: str) -> float:
    torch.manual_seed(seed)
    model, task = small_mlp(), small_task()
    lottery(model, task, sparsity=0.97, rate=0.5, epochs=6, lr=0.05, survivors=survivors)
    bake(model)
    assert int((model[1].weight == 0).sum()) == int(0.97 * 2048)
    with torch.no_grad():
        return float(torch.stack([task.loss(model(x), y) for x, y in task.valid]).mean())


def test_tickets_train_better_than_the_same_mask_on_other_weights():
    rewound, redrawn = ([loss_after(seed, how) for seed in range(4)] for how in ("rewound", "redrawn"))
    assert sum(rewound) < 0.8 * sum(redrawn)


def test_rounds_remove_no_more_than_the_rate():
    assert rounds_for(0.8, 0.2) == 8
    for sparsity, rate in ((0.9, 0.2), (0.5, 0.5), (0.99, 0.1), (0.1, 0.9)):
        n = rounds_for(sparsity, rate)
        assert 1 - (1 - sparsity) ** (1 / n) <= rate + 1e-9
        assert n == 1 or 1 - (1 - sparsity) ** (1 / (n - 1)) > rate


def test_layers_have_their_own_fractions_and_an_earlier_mask_stands():
    model = small_mlp()
    keep = torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    with recording() as ledger:
        lottery(model, small_task(), epochs=1, rate=0.5, sparsity={"1": 0.75, "3": 0.5}, lr=0.05)
    assert [int(mask_of(model[i]).sum()) for i in (1, 3)] == [512, 64]
    assert not (mask_of(model[1]) & ~keep).any()
    assert any(text.startswith("2 rounds, ") for text in ledger.notes)


def test_bad_options():
    with pytest.raises(BadOption, match="rewind=3 must be below epochs=3"):
        lottery(small_mlp(), small_task(), epochs=3, rewind=3)
    with pytest.raises(BadOption, match="before_epoch"):
        lottery(small_mlp(), small_task(fit=lambda model, task, **options: model), epochs=1)
