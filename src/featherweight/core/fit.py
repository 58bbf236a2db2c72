"""The one training loop: a plain loop on Accelerate, which brings devices, several processes and mixed precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from featherweight.core import processes
from featherweight.core.check import positive
from featherweight.core.forms import Form, own_modules
from featherweight.core.progress import track
from featherweight.core.shares import Shares
from featherweight.core.task import Batch, Task, length, loss_of, run
from featherweight.core.tracking import Losses
from featherweight.errors import BadData, CompressionError, MissingNeed, unknown

Step = Callable[[nn.Module, Batch, float], dict[str, Tensor]]
"""`(model, batch, progress) -> named loss terms`; their sum is minimised, `progress` runs from 0 to 1."""

MakeOptimizer = Callable[[list[nn.Parameter], float], Optimizer]

Optimizers = Literal["adam", "adamw", "sgd", "momentum"] | MakeOptimizer | None
"""A name of `OPTIMIZERS`, `(parameters, learning rate) -> Optimizer`, or Adam when left out."""

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adam": lambda params, lr: Adam(params, lr=lr),
    "adamw": lambda params, lr: AdamW(params, lr=lr, weight_decay=0.05),
    "sgd": lambda params, lr: SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "momentum": lambda params, lr: SGD(params, lr=lr, momentum=0.9, nesterov=True),  # few weights bear no decay
}
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
}


def fit(
    model: nn.Module,
    task: Task,
    *,
    epochs: float,
    lr: float = 1e-3,
    optimizer: Optimizers = None,
    decay: str | Callable[[float], float] = "cosine",
    step: Step | None = None,
    also: Sequence[tuple[Iterable[nn.Parameter], Step]] = (),
    params: Iterable[nn.Parameter] | None = None,
    before_epoch: Callable[[int], None] | None = None,
    after_backward: Callable[[float], None] | None = None,
    after_step: Callable[[float], None] | None = None,
    label: str = "fit",
) -> nn.Module:
    """Trains `model` in place on `task.train` and returns it, every module in the mode (train or eval) that it came in.

    A model in evaluation mode trains as a whole. In a model in training mode, modules in evaluation mode stay in it (a
    frozen batch norm keeps its statistics). Inside `featherweight.tracking` every step's loss terms are logged.

    Of several processes (`accelerate launch`) each takes its part of the batches, and the gradients of all parameters,
    those of `also` included, are averaged before `after_backward`: n processes with a batch size b train like one with
    n b, where the loss is a mean over samples. Batch norms and losses that relate samples see the process's own batch.
    All start from the main process's weights and generators, and end with the same network.

    Args:
        epochs: passes over the training data; a fraction trains on that part of a pass.
        lr: the learning rate at the start.
        optimizer: "adam" (default), "adamw", "sgd" (Nesterov momentum 0.9, weight decay 5e-4),
            "momentum" (the same without decay), or `(params, lr) -> Optimizer`. Decay leaves what forms train of their
            own (steps, shifts) alone.
        decay: "cosine", "constant", "linear" or `progress -> factor` of the learning rate.
        step: the loss as named terms; `task.loss` when left out.
        also: further (parameters, step) pairs that are updated after every step, such as discriminators.
        params: what to train; every parameter that requires a gradient when left out.
        before_epoch: called with the number of the epoch.
        after_backward: called with the progress, when gradients are there and before they are applied.
        after_step: called with the progress after every update.

    Raises:
        MissingNeed: the task has no training data, or no labels where its loss needs them.
        CompressionError: a loss term is not finite (it is named).
    """
    from accelerate import Accelerator

    if task.train is None:
        raise MissingNeed("fit needs training data: pass Task(train=...)")
    positive("epochs", epochs, zero=True)
    if epochs == 0:
        return model
    was_training, modes, frozen = model.training, {m: m.training for _, m in own_modules(model)}, _frozen_modes(model)
    accelerator = Accelerator()
    step = step or task_loss(task)
    trained = [p for p in (params if params is not None else model.parameters()) if p.requires_grad]
    # gradients are averaged here: a wrapper that does it as they come knows the parameters of the model alone, and
    # nothing of adapters and peers, of networks that run in part and of losses that differentiate twice
    wrapped = accelerator.prepare_model(model, evaluation_mode=True)
    main = accelerator.prepare(make_optimizer(optimizer, trained, positive("lr", lr), _of_forms(model)))
    held = [(list(ps), other) for ps, other in also]
    others = [(accelerator.prepare(make_optimizer(optimizer, ps, lr)), ps, other) for ps, other in held]
    factor = DECAYS.get(decay) if isinstance(decay, str) else decay
    if factor is None:
        raise unknown("decay", str(decay), DECAYS)
    scales = [(group, group["lr"]) for opt in (main, *(o for o, _, _ in others)) for group in opt.param_groups]

    batches_per_epoch = _length(task.train)
    total, losses = max(1, round(epochs * batches_per_epoch)), Losses()
    shares = Shares(label, total, _named(model, trained))
    processes.same_network(model)
    processes.same_tensors([*trained, *(p for ps, _ in held for p in ps)])
    wrapped.train()
    for module in frozen:
        module.training = False
    for index, epoch, batch in track(_batches(task.train, total, before_epoch), label, total):
        progress = index / total
        for group, base in scales:
            group["lr"] = base * factor(progress)
        terms = step(wrapped, batch, progress)
        shares.look(terms, index, progress)
        loss = _total(terms)
        losses.step({name: term.detach() for name, term in terms.items()}, epoch, scales[0][0]["lr"])
        main.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        processes.mean_gradients(trained)
        if after_backward is not None:
            after_backward(progress)
        main.step()
        for other, ps, other_step in others:
            other.zero_grad(set_to_none=True)
            accelerator.backward(_total(other_step(wrapped, batch, progress)))
            processes.mean_gradients(ps)
            other.step()
        if after_step is not None:
            after_step(progress)
    losses.close()
    shares.close()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    main.zero_grad(set_to_none=True)
    processes.settle(model)
    processes.same_draws()
    return _put_back(model, was_training, modes)


def _named(model: nn.Module, trained: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    """The model's own parameters among those that are trained; adapters and peers are not what terms share."""
    wanted = {id(param) for param in trained}
    return {name: param for name, param in model.named_parameters() if id(param) in wanted}


def task_loss(task: Task) -> Step:
    """The step that minimises the task's loss and nothing else."""

    def step(model: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target = run(model, task, batch)
        return {"loss": loss_of(task, output, target)}

    return step


def make_optimizer(
    make: Optimizers, params: list[nn.Parameter], lr: float, undecayed: Container[int] = ()
) -> Optimizer:
    """The optimizer; weight decay leaves alone the parameters whose `id` is in `undecayed`, unless `make` decides."""
    if callable(make):
        return make(params, lr)
    if (make or "adam") not in OPTIMIZERS:
        raise unknown("optimizer", str(make), OPTIMIZERS)
    free = [param for param in params if id(param) in undecayed]
    rest = [param for param in params if id(param) not in undecayed]
    groups: Any = [{"params": rest}, {"params": free, "weight_decay": 0.0}] if free else params
    return OPTIMIZERS[make or "adam"](groups, lr)


def _of_forms(model: nn.Module) -> set[int]:
    """What forms train of their own, by `id`: decay would pull the step of a grid, or a shift, to zero."""
    return {id(param) for module in model.modules() if isinstance(module, Form) for param in module.parameters()}


def _length(batches: Iterable[Batch]) -> int:
    count = length(batches)
    count = sum(1 for _ in batches) if count is None else count
    if count == 0:
        raise BadData("the training data are empty: at least one batch is needed")
    return count


def _batches(
    batches: Iterable[Batch], total: int, before_epoch: Callable[[int], None] | None
) -> Iterator[tuple[int, int, Batch]]:
    """`total` batches as (index, epoch, batch), over as many epochs as it takes.

    Of `n` processes each takes every n-th batch. All take equally many steps, or one would wait for another for ever:
    what is left of an epoch is dropped, and `total` is rounded up to whole steps.

    Raises:
        BadData: an epoch has too few batches for a single step, or the data can be gone through only once.
    """
    count, mine, index = processes.count(), processes.index(), 0
    for epoch in itertools.count():
        processes.same_draws()  # so that data which shuffle come to all in one order
        if before_epoch is not None:
            before_epoch(epoch)
        position, held = -1, None
        for position, batch in enumerate(batches):
            held = batch if position % count == mine else held
            index += 1
            if position % count == count - 1:
                yield index - count, epoch, held
                if index >= total:
                    return
        if position + 1 < count:
            raise BadData(
                f"epoch {epoch} has {position + 1} training batches for {count} processes: pass at least one for each, "
                "from data that can be gone through more than once"
            )
        if index >= total:
            return


def _frozen_modes(model: nn.Module) -> list[nn.Module]:
    """The modules that stay in evaluation mode while the model trains: those that were in it when the model was not."""
    return [m for _, m in own_modules(model) if not m.training] if model.training else []


def _put_back(model: nn.Module, was_training: bool, modes: dict[nn.Module, bool]) -> nn.Module:
    """Every module in its own mode again; one that came in the meantime, or belongs to a form, in the model's."""
    model.train(was_training)
    for module in model.modules():
        module.training = modes.get(module, module.training)
    return model


def _total(terms: dict[str, Tensor]) -> Tensor:
    loss = torch.stack([term.float() for term in terms.values()]).sum()
    if not torch.isfinite(loss):
        bad = [name for name, term in terms.items() if not torch.isfinite(term)]
        raise CompressionError(f"the loss term {', '.join(bad) or 'sum'} is not finite: lower the learning rate")
    return loss
