"""Derivatives of the task's loss by single weights: mean gradients, and second moments sample by sample.

All of it is computed on a baked copy, so that derivatives are those by the weight that a layer sees, whatever forms
stand on it, and the model stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from featherweight.core.forms import bake, owners
from featherweight.core.ledger import note
from featherweight.core.progress import track
from featherweight.core.site import Site
from featherweight.core.task import Batch, Task, cross_entropy, length, prediction, run
from featherweight.errors import BadData, BadOption

CHUNK = 2**23  # numbers of per-sample gradients that are held at a time
OUTPUTS = 512  # of a sample, up to which its whole output Hessian is computed

Pull = Callable[[Tensor, Tensor, Tensor], Iterator[Tensor]]
"""`(loss, output, target) -> vectors`, each of the output's shape: what is pulled back to the weights, in turn."""


def mean_gradients(
    model: nn.Module, task: Task, found: Mapping[str, Site], batches: Iterable[Batch], *, training: bool = False
) -> dict[str, Tensor]:
    """The gradient of the mean loss by each site's weight, of its shape, float64, on the processor.

    Args:
        training: batch norms use the statistics of the batch, as in training.

    Raises:
        BadData: there are no batches, or the loss is not finite.
    """
    model = probe(model, training)
    weights = {path: getattr(model.get_submodule(path), site.name) for path, site in found.items()}
    total = {path: torch.zeros(weight.shape, dtype=torch.float64) for path, weight in weights.items()}
    samples = 0
    for batch in track(batches, "gradients", length(batches)):
        output, target = run(model, task, batch)
        loss, count = finite(task.loss(output, target)), len(prediction(output))
        grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for path, grad in zip(weights, grads, strict=True):
            total[path] += 0 if grad is None else count * grad.detach().cpu().double()
        samples += count
    return {path: one / _some(samples) for path, one in total.items()}


def ggn_diagonal(
    model: nn.Module, task: Task, found: Mapping[str, Site], batches: Iterable[Batch], *, draws: int | None = None
) -> dict[str, Tensor]:
    """The diagonal of the generalised Gauss-Newton matrix of the mean loss, of each weight's shape, float64.

    For a sample with output `z` and `J = dz/dw`, the matrix is `J' H J` with `H` the Hessian of the loss by `z`. With
    `H = S S'` its diagonal is the sum of the squares of `J' s` over the columns `s` of `S`: as many backward passes as
    a sample has outputs. Of cross-entropy it is the diagonal of the Fisher matrix. Losses must be means over samples.

    Args:
        draws: for cross-entropy alone: so many classes drawn for every sample from the network's own predictions in
            place of the sum over all classes; unbiased, and cheap. One is drawn, and that is noted, where a sample has
            more than 512 outputs.

    Raises:
        BadOption: a sample has too many outputs, or `draws` with another loss.
        BadData: there are no batches, or the loss is not finite.
    """
    if draws is not None and task.loss is not cross_entropy:
        raise BadOption("draws= needs a task with cross-entropy, whose classes can be drawn: leave it out")

    def pull(loss: Tensor, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        if draws is not None or (output[0].numel() > OUTPUTS and task.loss is cross_entropy):
            if draws is None:
                note(
                    f"curvature is an estimate, from a class drawn for each sample: it has {output[0].numel()} outputs"
                )
            return _drawn(output, draws or 1)
        return columns_of(loss, output, target)

    return moments(model, task, found, batches, pull, torch.square)


def fisher_diagonal(
    model: nn.Module, task: Task, found: Mapping[str, Site], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """The mean of squared gradients of single samples' losses (empirical Fisher), of each weight's shape, float64."""

    def pull(loss: Tensor, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        yield len(output) * torch.autograd.grad(loss, output, retain_graph=True)[0]

    return moments(model, task, found, batches, pull, torch.square)


def output_sensitivity(
    model: nn.Module, task: Task, found: Mapping[str, Site], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """The mean of `|d ||f(x)||^2 / dw|` over samples (Aljundi et al., ECCV 2018), float64; it needs no labels."""

    def pull(loss: Tensor, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        yield 2 * output.detach()

    return moments(model, task, found, batches, pull, torch.abs, labels=False)


def moments(
    model: nn.Module,
    task: Task,
    found: Mapping[str, Site],
    batches: Iterable[Batch],
    pull: Pull,
    of: Callable[[Tensor], Tensor],
    *,
    labels: bool = True,
) -> dict[str, Tensor]:
    """The mean over samples of `of(gradient)`, summed over the vectors that `pull` yields, for each site's weight.

    Gradients are those of single samples, exact for every kind of layer: all uses of a weight are summed before `of`.
    Where a layer sees several rows for a sample, the rows of a sample must follow each other. A weight that code uses
    without calling its layer (attention's output projection) takes a backward pass for each sample.
    """
    model = probe(model, training=False)
    uses = {
        path: list(dict.fromkeys(m for m, _ in owners(model, model.get_submodule(path), site.name)))
        for path, site in found.items()
    }
    total = {path: torch.zeros(site.weight.shape, dtype=torch.float64) for path, site in found.items()}
    samples = 0
    for batch in track(batches, "curvature", length(batches)):
        with calls(layer for layers in uses.values() for layer in layers) as called:
            output, target = run(model, task, batch)
        output = prediction(output)
        loss = finite(task.loss(output, target)) if labels else output.new_zeros(())
        flat = [(layer, seen, put) for layer, pairs in called.items() for seen, put in pairs]
        for vector in pull(loss, output, target):
            grads = torch.autograd.grad(output, [put for *_, put in flat], vector, retain_graph=True, allow_unused=True)
            back = [(layer, seen, grad) for (layer, seen, _), grad in zip(flat, grads, strict=True) if grad is not None]
            for path, layers in uses.items():
                if not all(called[layer] for layer in layers):
                    weight = getattr(layers[0], found[path].name)
                    total[path] += _one_by_one(output, vector, weight, of)
                    continue
                rows = [(layer, seen, grad) for layer, seen, grad in back if layer in layers]
                if rows:
                    total[path] += _summed(path, found[path].name, rows, len(output), of)
        samples += len(output)
    return {path: one / _some(samples) for path, one in total.items()}


def some_batches(task: Task, count: int | None) -> list[Batch]:
    """The first batches of the calibration data, or of the training data; all of them if `count` is None.

    Raises:
        MissingNeed: the task has neither.
    """
    return list(islice(task.calibrating(), count))


# --- single samples ---------------------------------------------------------------------------------------------------


class calls:  # noqa: N801 - used like a function: `with calls(layers) as called:`
    """Inside the block, what layers see and put out, call by call; what works in place changes a copy."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def __enter__(self) -> dict[nn.Module, list[tuple[Tensor, Tensor]]]:
        self.handles = [layer.register_forward_hook(self._see, with_kwargs=True) for layer in self.seen]
        return self.seen

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        self.seen[module].append(((args[0] if args else kwargs["input"]).detach(), output))
        return output.clone()


def _summed(
    path: str, name: str, rows: list[tuple[nn.Module, Tensor, Tensor]], samples: int, of: Callable[[Tensor], Tensor]
) -> Tensor:
    """`of(gradient)` summed over samples, a few samples at a time."""
    total = torch.zeros(getattr(rows[0][0], name).shape, dtype=torch.float64)
    shaped = [(layer, _by_sample(path, seen, samples), _by_sample(path, grad, samples)) for layer, seen, grad in rows]
    size = max(1, CHUNK // total.numel())
    for start in range(0, samples, size):
        part = slice(start, start + size)
        grads = [_gradients(layer, name, seen[part], grad[part]) for layer, seen, grad in shaped]
        total += of(torch.stack(grads).sum(0)).double().sum(0).cpu()
    return total


def _one_by_one(output: Tensor, vector: Tensor, weight: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """`of(gradient)` summed over samples by a backward pass for each: whatever the weight is used by, but slow."""
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for one, back in zip(output, vector, strict=True):
        (grad,) = torch.autograd.grad(one, weight, back, retain_graph=True, allow_unused=True)
        if grad is not None:
            total += of(grad).double().cpu()
    return total


def _by_sample(path: str, value: Tensor, samples: int) -> Tensor:
    """(samples, rows of a sample, ...)."""
    if value.dim() == 0 or len(value) % samples:
        raise BadData(f"{path} sees inputs of shape {tuple(value.shape)} for {samples} samples: choose other layers")
    return value.reshape(samples, len(value) // samples, *value.shape[1:])


def _gradients(layer: nn.Module, name: str, seen: Tensor, grad: Tensor) -> Tensor:
    """The gradient of every sample by the layer's weight: (samples, *weight)."""

    def one(rows: Tensor, back: Tensor) -> Tensor:
        pulled = vjp(lambda weight: functional_call(layer, {name: weight}, (rows,)), getattr(layer, name).detach())[1]
        return pulled(back)[0]

    return vmap(one)(seen, grad)


# --- what is pulled back ----------------------------------------------------------------------------------------------


def columns_of(loss: Tensor, output: Tensor, target: Tensor) -> Iterator[Tensor]:
    """The columns of `S` with `S S'` the Hessian of each sample's loss by its outputs, negative curvature left out."""
    size = output[0].numel()
    if size > OUTPUTS:
        raise BadOption(
            f"a sample has {size} outputs, more than the {OUTPUTS} of which the curvature of a loss that is no "
            "cross-entropy is computed: choose a method that needs none, such as magnitude_iterative"
        )
    (slope,) = torch.autograd.grad(loss, output, create_graph=True)
    rows = [_derivative(entry.sum(), output) for entry in slope.flatten(1).unbind(1)]
    hessian = len(output) * torch.stack([row.flatten(1) for row in rows], 1).double()
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    columns = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
    for column in columns.unbind(2):
        yield column.to(output.dtype).view_as(output)


def _derivative(value: Tensor, output: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(output)
    (found,) = torch.autograd.grad(value, output, retain_graph=True, allow_unused=True)
    return torch.zeros_like(output) if found is None else found


def _drawn(output: Tensor, draws: int) -> Iterator[Tensor]:
    """`(p - e_y) / sqrt(draws)` for classes `y` drawn from the predictions `p` of logits (batch, classes, ...)."""
    p = output.detach().softmax(1)
    last = p.movedim(1, -1)
    for _ in range(draws):
        classes = torch.multinomial(last.reshape(-1, last.shape[-1]), 1).view(last.shape[:-1])
        hot = nn.functional.one_hot(classes, last.shape[-1]).movedim(-1, 1)
        positions = max(1, output[0, 0].numel())
        yield (p - hot) / (draws * positions) ** 0.5


def tilted(output: Tensor, draws: int) -> Iterator[Tensor]:
    """As classes drawn from the predictions of logits (batch, classes, ...), but drawn by about the root of these.

    Unbiased too, and less noisy where most predictions are sure: of the squared vectors, not of the vectors, the mean
    over draws is the Hessian.
    """
    p = output.detach().softmax(1).movedim(1, -1)
    chance = (p + 1e-3).sqrt()
    chance = chance / chance.sum(-1, keepdim=True)
    positions = max(1, output[0, 0].numel())
    for _ in range(draws):
        classes = torch.multinomial(chance.reshape(-1, p.shape[-1]), 1).view(*p.shape[:-1], 1)
        weight = p.gather(-1, classes) / chance.gather(-1, classes) / (draws * positions)
        yield (weight.sqrt() * (p - torch.zeros_like(p).scatter_(-1, classes, 1.0))).movedim(-1, 1)


def probe(model: nn.Module, training: bool) -> nn.Module:
    """A plain copy whose parameters all require gradients, in evaluation mode but for batch norms where asked for."""
    model = bake(copy.deepcopy(model)).eval().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(training)
    return model


def finite(loss: Tensor) -> Tensor:
    if not torch.isfinite(loss):
        raise BadData("the loss of a batch is not finite: check the data, the labels and the weights")
    return loss


def _some(samples: int) -> int:
    if samples == 0:
        raise BadData("there is no batch to compute derivatives on: pass calibration or training data")
    return samples
