"""A teaching assistant: a discriminator of features, which the student's are to pass as the teacher's."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import fill, recipe
from featherweight.core.adversary import Discriminator, from_teacher
from featherweight.core.features import matched, vectors
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.surgery import Layer
from featherweight.core.task import Batch, Task, device_of, eval_mode, first, loss_of
from featherweight.core.taught import teacher_of
from featherweight.distill import named, tapped


@recipe(
    paper="Wang, Xu, Xu and Tao, AAAI 2018",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
def portable_gan(
    model: nn.Module,
    task: Task,
    *,
    guided: Annotated[str, Layer("student")] | None = None,
    hint: Annotated[str, Layer("teacher")] | None = None,
    gamma: Amount = 0.1,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains on `H(y, p_S) - gamma log D(f_S)` and in turn D on `log D(f_T) + log(1 - D(f_S))`.

    D does not see whose features are whose: features of the right distribution at the wrong samples mislead it as well,
    so that only the labels tie them to samples.
    Source: Adversarial Learning of Portable Student Networks.

    Departs from the paper: only its abstract was available, losses and constants are from memory; the student's term is
    the one that does not saturate; features are those before the logits; a linear layer joins unequal widths, trained
    along and dropped; D has the student's learning rate.

    Args:
        guided: the student's layer; the last one before the logits when left out.
        hint: the teacher's layer; the last one before the logits when left out.
        gamma: weight of the adversarial term.
        epochs: passes over the training data.
        lr: learning rate of both.
        optimizer: as in `fit`, of both.
    """
    teacher = teacher_of(model, task)
    batch = first(task.train or (), "training")
    if guided is None or hint is None:
        found = matched(model, teacher, task, batch, "last")[0]
        guided, hint = guided or found[0], hint or found[1]
    named(model, [guided], "student")
    named(teacher, [hint], "teacher")
    device = device_of(model)

    def shown(batch: Batch) -> Tensor:
        with eval_mode(teacher):
            return vectors(tapped(teacher, teacher, task.of_teacher(), batch, [hint], whole=False)[0][hint]).to(device)

    with eval_mode(model):
        ours, theirs = vectors(tapped(model, model, task, batch, [guided], whole=False)[0][guided]), shown(batch)
    same = ours.shape[1] == theirs.shape[1]
    adapter = nn.Identity() if same else fill("adapter", "one_by_one_match")(ours, theirs).to(device)
    judge = Discriminator(theirs.shape[1], hidden=(128, 64)).to(device)
    extra = sum(p.numel() for part in (adapter, judge) for p in part.parameters())
    note(f"a discriminator of {guided} and {hint}; {extra:,} parameters in training only")

    def learn(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        seen, output, target = tapped(student, model, task, batch, [guided])
        terms = {"labels": loss_of(task, output, target)}
        if gamma:
            terms["assistant"] = gamma * from_teacher(judge(adapter(vectors(seen[guided])))[0], 1.0)
        return terms

    def judged(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        seen, _, _ = tapped(student, model, task, batch, [guided], whole=False)
        fake, real = adapter(vectors(seen[guided])).detach(), shown(batch)
        return {"discriminator": from_teacher(judge(real)[0], 1.0) + from_teacher(judge(fake)[0], 0.0)}

    params = [*model.parameters(), *adapter.parameters()]
    also = [(list(judge.parameters()), judged)]
    return task.fit(
        model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=learn, also=also, params=params, label="distill"
    )
