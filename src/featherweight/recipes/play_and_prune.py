"""Play and prune: one player shrinks and removes the weakest filters, the other says how strongly by the slack left.

Pravendra Singh, Vinay Kumar Verma, Piyush Rai, Vinay Namboodiri, "Play and prune: adaptive filter pruning for deep
model compression", IJCAI 2019, arXiv:1905.04446. The user gives what accuracy may be lost, `eps`, not a ratio. With `E`
the accuracy at the start, and `C` that of the network as it is, both in percent, every round has a slack
`T = C - (E - eps)`.

- The adaptive filter pruner takes the weakest `alpha` of the filters of every layer, `U`, by `sum |w|`, trains with
  `loss + lambda_t ||U||_1`, and removes the filters with `sum |w| < W_t`.
- The pruning rate controller sets `W_{t+1} = delta T W_gamma` and `lambda_{t+1} = T lambda` while `T > 0`, and both to
  0 otherwise, so that the network recovers. `W_gamma` is one threshold a layer, found by binary search: the largest
  with which one removal, of all layers at once, costs at most the slack.

Departs from the paper: its constants could not be verified: `alpha` and the epochs of a round are what is told of it,
the rest is chosen here, such as `delta = 2 / eps`, with which half a slack removes up to `W_gamma`. `W_gamma` reaches
no further than `U`; the learning rate falls with the slack, to a tenth while the network recovers; filters that a
residual sum couples go together by the sum of their norms; kept filters are whole vectors, so of a wide layer `U` holds
at least one vector; the network of the last round with a slack is handed back, after a fine-tuning that is kept if it
keeps the slack.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.channels import Channels, channel_groups, remove_channels
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.ledger import note
from featherweight.core.masks import free
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task, drop, evaluate
from featherweight.core.widths import rounded, scores_of
from featherweight.errors import CompressionError

LEVELS = 16  # of the binary search for W_gamma: parts of the weakest filters
SLOWEST = 0.1  # of the learning rate, where there is no slack
DELTA = 2  # over the tolerance


@recipe(
    paper="Singh et al., IJCAI 2019, arXiv:1905.04446",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"tolerance": 10, "alpha": 0.25, "rounds": 2, "epochs": 1, "finetune": 0, "round_to": 1},
)
def play_and_prune(
    model: nn.Module,
    task: Task,
    *,
    tolerance: Positive = 1.0,
    alpha: Fraction = 0.1,
    penalty: Amount = 1e-4,
    rounds: Count = 20,
    patience: Count = 3,
    epochs: Positive = 1,
    finetune: Amount = 10,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
    round_to: Count = 16,
    where: WhereWeighted = None,
) -> nn.Module:
    """Removes filters as long as the metric on the validation data stays within a tolerance; returns the last that did.

    Args:
        tolerance: points of the metric that may be lost on `task.valid`, eps.
        alpha: the fraction of the filters of every layer that are pulled to zero in a round, and may go in it.
        penalty: strength of that pull for a slack of one point, lambda.
        rounds: how often the two players take turns, at most.
        patience: rounds in a row without a removal after which the game is over.
        epochs: training in a round.
        finetune: epochs at the end, the learning rate falling to zero.
        lr: learning rate at a full slack.
        optimizer: "adam", "adamw" or "sgd" (default).
        round_to: wider layers keep a multiple of this many channels; 1 removes exactly what falls below.
        where: which layers may lose filters.

    Raises:
        CompressionError: no filter could be removed within the tolerance.
    """
    masked = masked_names(model)
    before = evaluate(bake(model), task)

    def slack(network: nn.Module) -> float:
        return tolerance - 100 * drop(before, evaluate(network, task, label="evaluate the slack"))

    def train(network: nn.Module, now: float, label: str) -> None:
        game = Game.of(network, task, where, alpha, round_to)
        mask_zeros(network, masked)
        pull = game.pull(network, penalty * now) if now > 0 else None
        task.fit(network, task, epochs=epochs, lr=lr * min(1.0, max(SLOWEST, now / tolerance)), optimizer=optimizer,
                 decay="constant", after_backward=pull, label=label)  # fmt: skip
        bake(network)

    now, idle, gone, best, best_gone = float(tolerance), 0, 0, copy.deepcopy(model), 0
    for turn in range(1, rounds + 1):
        train(model, now, f"round {turn}, slack {now:.2f}")
        removed = 0
        if now > 0:
            game = Game.of(model, task, where, alpha, round_to)
            doomed = game.below(min(1.0, DELTA * now / tolerance) * game.threshold(model, slack))
            remove_channels(model, doomed, channels=game.channels)
            removed = len(doomed)
        gone, now = gone + removed, slack(model)
        note(f"round {turn}: {removed} channels removed, slack {now:+.2f} pt")
        if now >= 0:
            best, best_gone = copy.deepcopy(model), gone
        idle = 0 if removed else idle + 1
        if idle == patience:
            break
    if not best_gone:
        raise CompressionError(
            f"no channel can go with tolerance={tolerance:g} pt: raise it, or lower round_to={round_to}"
        )
    mask_zeros(best, masked)
    tuned = task.fit(copy.deepcopy(best), task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")
    if slack(tuned) < 0:
        note("the fine-tuning is dropped: it would have used up more than the slack")
        return best
    return tuned


@dataclass(frozen=True)
class Game:
    """The channels of a network as it is, and of every group of coupled layers the weakest, the lowest norms first."""

    channels: Channels
    weak: list[Tensor]  # numbers of channels, by group
    norms: Tensor  # (count,)
    layers: list[str]
    round_to: int

    @staticmethod
    def of(model: nn.Module, task: Task, where: WhereWeighted, alpha: float, round_to: int) -> Game:
        """Ranked by `sum |w|`; of a group that is wider than a vector at least a vector is weak.

        Raises:
            BadOption: no channel can be removed.
        """
        channels = channel_groups(model, task.inputs())
        found = sites(model, where)
        norms = scores_of(channels, {p: site.rows.abs().sum(1) for p, site in found.items()}, "sum", "none")
        weak = []
        for group in channels.groups:
            ids = torch.tensor(group.channels)
            ids = ids[norms[ids].isfinite()]
            least = round_to if len(ids) > round_to else 1
            count = min(max(math.ceil(alpha * len(ids)), least), len(ids) - 1)
            weak.append(ids[norms[ids].argsort(stable=True)[:count]])
        return Game(channels, weak, norms, [path for path in found if path in channels.outputs], round_to)

    def pull(self, model: nn.Module, strength: float) -> Callable[[float], None]:
        """Adds the gradient of `strength ||U||_1` to that of the weights, once they have one."""
        weak = torch.cat(self.weak)
        pulled = []
        for path in self.layers:
            module = model.get_submodule(path)
            weight = free(Site(path, module))
            chosen = torch.isin(self.channels.outputs[path], weak)
            if weight is not None and chosen.any():
                along = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
                shape = [-1 if d == along else 1 for d in range(weight.dim())]
                pulled.append((weight, strength * chosen.view(shape).to(weight)))

        def add(progress: float) -> None:
            for weight, strengths in pulled:
                if weight.grad is not None:
                    weight.grad.add_(weight.detach().sign() * strengths)

        return add

    def threshold(self, model: nn.Module, slack: Callable[[nn.Module], float]) -> Tensor:
        """W_gamma of every group (groups,): the largest, of equal parts of all, below which everything may go."""

        def ends(level: int) -> Tensor:
            places = [level * len(ids) // LEVELS for ids in self.weak]
            norms = [torch.cat([self.norms[ids], self.norms.new_tensor([torch.inf])]) for ids in self.weak]
            # halfway to the next, so that exactly these lie below
            return torch.stack([_between(n, place) for n, place in zip(norms, places, strict=True)])

        def costs_too_much(level: int) -> bool:
            smaller = copy.deepcopy(model)
            remove_channels(smaller, self.below(ends(level)), channels=self.channels)
            return slack(smaller) < 0

        return ends(bisect_left(range(1, LEVELS + 1), True, key=costs_too_much))

    def below(self, thresholds: Tensor) -> Tensor:
        """The weak channels whose norms lie below their group's threshold, in whole vectors."""
        parts = [ids[self.norms[ids] < end] for ids, end in zip(self.weak, thresholds, strict=True)]
        return rounded(self.channels, torch.cat([*parts, torch.empty(0, dtype=torch.long)]), self.round_to)


def _between(norms: Tensor, place: int) -> Tensor:
    """A threshold below which lie the first `place` of rising norms (their ties aside); 0 for none."""
    if place == 0:
        return norms.new_zeros(())
    last, following = norms[place - 1], norms[place]
    return (last + following) / 2 if following.isfinite() else last * (1 + 1e-9)
