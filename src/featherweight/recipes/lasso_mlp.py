"""Variable selection for perceptrons by LASSO: factors on what a layer reads, their sum bounded; zeros are dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.gates import gates_of, remove_closed
from featherweight.core.ledger import note
from featherweight.core.noise import linear_sites
from featherweight.core.surgery import Layer, altered
from featherweight.core.task import Batch, Task, eval_mode, run
from featherweight.errors import BadOption, CompressionError, TraceError


@recipe(
    paper="Sun et al., IEEE TNNLS 28(6), 2017",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"total": 4.0, "iterations": 10, "batches": 2, "epochs": 1},
)
def lasso_mlp(
    model: nn.Module,
    task: Task,
    *,
    layer: Annotated[str | None, Layer("student")] = None,
    total: Positive | None = None,
    grid: Count = 8,
    iterations: Count = 40,
    batches: Count = 20,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Bounds the sum of factors on a layer's inputs until those that do not matter are zero, drops them, retrains.

    Kai Sun, Shao-Hsuan Huang, David Shan-Hill Wong, Shi-Shang Jang, "Design and Application of a Variable Selection
    Method for Multilayer Perceptron Neural Network With LASSO", IEEE TNNLS 28(6), 2017: for the trained network f with
    fixed weights, `min_beta loss(y, f(beta * x))` under `sum |beta_i| <= s`, beta >= 0 (a non-negative garrote); inputs
    with beta = 0 are dropped, and the network is trained again.

    Departs from the paper: the identification and its details are not verified; the task's own loss stands in place of
    the squared error; factors act on the deviation from the mean, which the bias takes over, so that a dropped input is
    at its mean and not at zero; dropped inputs of the network are masked columns of the layer's weight, since it takes
    as many as before, and channels of an earlier layer that nothing else reads are removed; the problem is solved by
    accelerated projected gradients; of the values of s that are tried the smallest is taken whose loss on the
    validation data is within one standard error of the best, since cross-validation among data that the network has
    learned by heart would keep everything.

    Args:
        layer: whose inputs are selected; the first linear layer when left out.
        total: the bound s on the sum of the factors, which start at 1 each; chosen on the validation data if left out.
        grid: how many bounds are tried, from all inputs down in equal steps.
        iterations: steps of the solver for each bound.
        batches: of the training data, on which the factors are found.
        epochs: passes of training after that.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw" or "sgd".

    Raises:
        BadOption: there is no linear layer, or the layer that was named is none.
        CompressionError: no input was dropped.
    """
    masked = masked_names(model)
    path, chosen = linear_layer(bake(model), layer)
    inputs = Inputs.of(model, task, chosen, (joined(list(islice(task.train or (), batches))),))
    bound = total if total is not None else chosen_bound(inputs, grid, iterations)
    beta = inputs.solved(bound, iterations)
    kept = int(beta.count_nonzero())
    if kept == len(beta):
        raise CompressionError(
            f"{path}: all {kept} inputs have a factor above zero under the bound {bound:g}: pass a smaller total"
        )
    if not kept:
        beta[int(inputs.loss(beta)[1].argmin())] = 1.0
        note(f"{path}: all factors are zero, the input along which the loss falls most is kept")
    fold(chosen, inputs.mean, beta)
    mask_zeros(model, list(dict.fromkeys([*masked, (path, "weight")])))
    remove_unread(model, task, path, beta == 0)
    note(f"{path}: {max(kept, 1)} of {len(beta)} inputs kept, the factors add up to {float(beta.sum()):.3g}")
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="retrain")


def linear_layer(model: nn.Module, path: str | None) -> tuple[str, nn.Linear]:
    """The linear layer at a path, or the first one.

    Raises:
        BadOption: it is none, or computes something else; there is none.
    """
    found = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    if path is None:
        path = next((p for p, m in found.items() if not altered(m)), None)
    if path is None:
        raise BadOption("the model has no linear layer, whose inputs this method selects: choose another method")
    if path not in found:
        raise BadOption(f"layer={path!r} is no linear layer: choose one of {', '.join(found)}")
    if reason := altered(found[path]):
        raise BadOption(f"layer={path!r} cannot be chosen: {reason}")
    return path, found[path]


@final
@dataclass(frozen=True)
class Inputs:
    """The loss of a network on some batches, as a function of factors on what one of its layers reads."""

    model: nn.Module
    task: Task
    layer: nn.Linear
    data: tuple[Batch, ...]
    mean: Tensor  # of every input; zero for a layer without bias, which could not take it over

    @staticmethod
    def of(model: nn.Module, task: Task, layer: nn.Linear, data: Sequence[Batch]) -> Inputs:
        """Takes the means of what the layer reads."""
        if not isinstance(layer._parameters["bias"], Tensor):
            note("the layer has no bias: its inputs are dropped to zero, not to their means")
            return Inputs(model, task, layer, tuple(data), layer.weight.new_zeros(layer.in_features))
        parts: list[Tensor] = []
        with _reading(layer, lambda x: parts.append(x.flatten(0, -2).double())), eval_mode(model):
            for batch in data:
                run(model, task, batch)
        return Inputs(model, task, layer, tuple(data), torch.cat(parts).mean(0).to(layer.weight))

    def loss(self, beta: Tensor, *, gradient: bool = True) -> tuple[float, Tensor]:
        """The mean loss with the factors (inputs,), and its gradient."""
        beta = beta.detach().requires_grad_(gradient)
        total, slope = 0.0, torch.zeros_like(beta)
        moved = _reading(self.layer, lambda x: self.mean + beta * (x - self.mean))
        with moved, eval_mode(self.model), torch.set_grad_enabled(gradient):
            for batch in self.data:
                output, target = run(self.model, self.task, batch)
                loss = self.task.loss(output, target)
                total += float(loss.detach())
                slope += torch.autograd.grad(loss, beta)[0] if gradient else 0.0
        return total / len(self.data), slope / len(self.data)

    def solved(self, bound: float, iterations: int, start: Tensor | None = None) -> Tensor:
        """The factors under the bound, by accelerated projected gradients (Beck and Teboulle, SIAM J. Imaging 2009).

        A step is halved until the loss lies below its quadratic bound; momentum starts anew where the loss rises; the
        end is reached where steps no longer move anything or the loss's own precision hides whether they help.
        """
        beta = projected(torch.ones_like(self.mean) if start is None else start, bound)
        point, momentum, rate, last = beta, 1.0, 1.0, self.loss(beta, gradient=False)[0]
        for _ in range(iterations):
            here, slope = self.loss(point)
            for _ in range(12):
                new = projected(point - rate * slope, bound)
                step, value = new - point, self.loss(new, gradient=False)[0]
                if value <= here + float(slope @ step) + float(step.square().sum()) / (2 * rate) + 1e-6 * abs(here):
                    break
                rate /= 2
            if value > last and momentum > 1.0:
                point, momentum = beta, 1.0
                continue
            if value > last or float(step.abs().max()) < 1e-6:
                break
            after = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            point = new + (momentum - 1) / after * (new - beta)
            beta, momentum, last, rate = new, after, value, 1.2 * rate
        return beta


@contextmanager
def _reading(layer: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Shows `change` what a layer reads, and lets the layer read what that returns, if anything."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = change(args[0] if args else kwargs["input"])
        return None if x is None else ((x,), {})

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches as one: every tensor along its first dimension, everything else as in the first."""
    shape = tree_flatten(batches[0])[1]
    others = [tree_flatten(batch)[0] for batch in batches]
    whole = [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*others, strict=True)]
    return tree_unflatten(whole, shape)


def projected(values: Tensor, bound: float) -> Tensor:
    """The nearest factors that are not negative and add up to no more than the bound (Duchi et al., ICML 2008).

    >>> projected(torch.tensor([1.0, 0.5, -1.0]), 1.0)
    tensor([0.7500, 0.2500, 0.0000])
    """
    clipped = values.clamp_min(0)
    if float(clipped.sum()) <= bound:
        return clipped
    ordered = values.sort(descending=True).values.double()
    excess = (ordered.cumsum(0) - bound) / torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
    threshold = excess[int((ordered > excess).nonzero().max())]
    return (values - threshold.to(values)).clamp_min(0)


def chosen_bound(inputs: Inputs, grid: int, iterations: int) -> float:
    """The smallest bound whose loss on the validation batches is within one standard error of the best."""
    bounds = [len(inputs.mean) * (grid - i) / grid for i in range(grid)]
    valid = replace(inputs, data=tuple(inputs.task.valid))
    found, beta = [], None
    for bound in bounds:
        beta = inputs.solved(bound, iterations, beta)
        found.append(
            torch.tensor([replace(valid, data=(batch,)).loss(beta, gradient=False)[0] for batch in valid.data])
        )
    losses = torch.stack(found).double()  # (bounds, batches)
    mean = losses.mean(1)
    best = int(mean.argmin())
    error = float(losses[best].std(correction=0)) / math.sqrt(losses.shape[1])
    chosen = int((mean <= mean[best] + error).nonzero().max())
    beside = f"the least {mean[best]:.4g} at {bounds[best]:g}"
    note(f"bound {bounds[chosen]:g}: loss {mean[chosen]:.4g} on the validation data, {beside}")
    return bounds[chosen]


def remove_unread(model: nn.Module, task: Task, path: str, unread: Tensor) -> None:
    """Removes the channels that only this layer read and of which it reads nothing any more; network inputs stay."""
    masked = masked_names(model)
    try:
        gates = gates_of(bake(model), task.inputs(), {p: s.module for p, s in linear_sites(model, task).items()})
    except (BadOption, TraceError) as error:
        note(f"what {path} no longer reads is not removed: {error}")
        gates = None
    mask_zeros(model, masked)
    if gates is None or path not in gates.reads:
        return
    read = [ids for p, vectors in gates.reads.items() for ids in vectors if p != path]
    read += [ids[~unread.cpu()] for ids in gates.reads[path]]
    mine = torch.cat(gates.reads[path])
    closed = torch.zeros(gates.count, dtype=torch.bool)
    closed[mine[mine >= 0]] = True
    closed[torch.cat([ids[ids >= 0] for ids in read])] = False
    closed[len(gates.numbers) :] = False
    if closed.any():
        remove_closed(model, gates, torch.ones(gates.count), closed, torch.zeros(gates.count))


def fold(layer: nn.Linear, mean: Tensor, beta: Tensor) -> None:
    """Multiplies the factors into the weight, and lets the bias take over the means of what they leave out."""
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.add_(layer.weight @ ((1 - beta) * mean))
        layer.weight.mul_(beta)
