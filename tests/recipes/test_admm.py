"""Zhang et al. 2018: the residuals fall, counts are exact, it beats one shot, and without sparsity it only trains."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import Batches, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.forms import Mask, attach, mask_of, originals
from featherweight.core.ledger import recording
from featherweight.core.task import Task
from featherweight.errors import BadOption, UnknownName

admm = entry("admm")
SGD = {"lr": 0.1, "optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr)}


def least_squares(seed: int, size: int = 12, used: int = 4) -> tuple[nn.Module, Task, torch.Tensor]:
    """Regressors that are nearly dependent, a sparse truth with noise, and the dense solution as what is pruned."""
    torch.manual_seed(seed)
    x = torch.randn(40, size // 2) @ torch.randn(size // 2, size) / (size // 2) ** 0.5 + 0.15 * torch.randn(40, size)
    truth = torch.zeros(size, 1)
    truth[torch.randperm(size)[:used]] = torch.randn(used, 1).sign() * (1 + torch.rand(used, 1))
    y = x @ truth + torch.randn(40, 1)
    dense = torch.linalg.lstsq(x, y).solution
    model = nn.Sequential(nn.Linear(size, 1, bias=False))
    model[0].weight.data.copy_(dense.T)
    return model, Task(train=Batches(x, y, 40), valid=Batches(x, y, 40), loss=F.mse_loss), dense


def refitted(task: Task, keep: torch.Tensor) -> float:
    """The least squares error on the weights that are kept."""
    x, y = task.train.x[:, keep.view(-1)], task.train.y
    return float(F.mse_loss(x @ torch.linalg.lstsq(x, y).solution, y))


def test_it_chooses_better_weights_than_one_shot_magnitude_on_least_squares():
    ours, one_shot = [], []
    for seed in range(6):
        model, task, dense = least_squares(seed)
        admm(model, task, sparsity=2 / 3, rho=0.3, rounds=40, epochs=40, finetune=0, **SGD)
        keep = mask_of(model[0])
        assert int(keep.sum()) == 4
        ours.append(refitted(task, keep))
        largest = torch.zeros(12, dtype=torch.bool)
        largest[dense.view(-1).abs().topk(4).indices] = True
        one_shot.append(refitted(task, largest))
    assert sum(ours) < 0.9 * sum(one_shot)


def test_without_sparsity_it_only_trains():
    model, task, dense = least_squares(0)
    model[0].weight.data.zero_()
    admm(model, task, sparsity=0.0, rho=1e-3, rounds=3, epochs=600, finetune=0, **SGD)
    error = [float(F.mse_loss(task.train.x @ w, task.train.y)) for w in (model[0].weight.detach().T, dense)]
    assert error[0] == pytest.approx(error[1], rel=0.01)


def series(notes: list[str], start: str) -> list[float]:
    (found,) = [text for text in notes if text.startswith(start)]
    return [float(part) for part in found.split(": ")[1].split()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_residuals_fall(seed):
    model, task, _ = least_squares(seed)
    with recording() as ledger:
        admm(model, task, sparsity=2 / 3, rho=2.0, rounds=50, epochs=100, finetune=0, **SGD)
    primal, dual = series(ledger.notes, "||W - Z||"), series(ledger.notes, "rho ||Z' - Z||")
    assert len(primal) == len(dual) == 50
    assert primal[-1] < 0.01 * primal[0]
    assert dual[-1] < 0.2 * max(dual)


def test_counts_are_exact_layer_by_layer_and_the_rest_is_gone():
    model, task = small_mlp(), small_task()
    admm(model, task, sparsity={"1": 0.95, "3": 0.5}, rounds=2, epochs=2, finetune=1)
    assert [int(mask_of(model[i]).sum()) for i in (1, 3)] == [2048 - int(0.95 * 2048), 64]
    for layer in (model[1], model[3]):
        assert not originals(layer, "weight")[0][~mask_of(layer)].any()


def gap(**options) -> float:
    """How far the weights of a small classifier are from sparse ones after the last round."""
    torch.manual_seed(0)
    with recording() as ledger:
        settings = {"sparsity": 0.8, "rounds": 10, "epochs": 60, "finetune": 0, "lr": 5e-3}
        admm(small_mlp(), small_task(), **(settings | options))
    return series(ledger.notes, "||W - Z||")[-1]


def test_a_stronger_pull_and_one_that_grows_close_the_gap():
    weak = gap(rho=1e-4)
    assert gap(rho=1e-2) < 0.6 * weak
    assert gap(rho=1e-4, growth=1.5) < 0.7 * weak


def test_an_earlier_mask_stands():
    model = small_mlp()
    keep = torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    admm(model, small_task(), sparsity={"1": 0.75}, rounds=2, epochs=2, finetune=1)
    assert not (mask_of(model[1]) & ~keep).any()
    assert int(mask_of(model[1]).sum()) == 512


def test_bad_options():
    with pytest.raises(BadOption, match="rho"):
        admm(small_mlp(), small_task(), rho=0.0)
    with pytest.raises(UnknownName, match="conv9"):
        admm(small_mlp(), small_task(), sparsity={"conv9": 0.5})
