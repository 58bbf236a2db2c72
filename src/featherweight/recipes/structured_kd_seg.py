"""Structured distillation of segmentation: pixels, pairs of places, and the whole score map, which a critic judges."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.features import Taps, exact
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.task import Batch, Task, eval_mode, first, prediction, run, to_device
from featherweight.core.taught import teacher_of
from featherweight.distill import Term, learn
from featherweight.errors import BadOption
from featherweight.ingredients.match.pairwise_affinity import pairwise_affinity
from featherweight.ingredients.match.softened import softened


@recipe(
    paper="Liu et al., CVPR 2019, arXiv:1903.04197",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1, "critic_width": 4},
)
def structured_kd_seg(
    model: nn.Module,
    task: Task,
    *,
    pixel: Amount = 80.0,
    pair: Amount = 0.5,
    holistic: Amount = 0.1,
    scale: Positive = 0.5,
    critic_width: Count = 64,
    penalty: Amount = 10.0,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains on `L + l_pi KL(p_T || p_S) + l_pa L_pa - l_d E D(z_S)`, by turns with the critic D of score maps.

    The divergence is the mean over pixels, L_pa `pairwise_affinity` of the last maps. The critic minimises
    `E D(z_S) - E D(z_T) + penalty E (||grad D|| - 1)^2`, the gradient taken between the two (a Wasserstein GAN); it
    sees the image beside the scores. Source: Structured Knowledge Distillation for Semantic Segmentation.

    Departs from the paper: weights are those of the authors' code; its pixel term, 10, is a sum over a batch of 8, here
    80 times the mean. The affinity has its true gradient, the code holds the norms of features constant. The critic has
    three convolutions of stride 2 and self-attention behind the last two, no spectral normalisation; it has the
    student's optimizer, Adam, and learning rate (the code: SGD with 1e-2 for the student, Adam with 4e-4 for the
    critic). No auxiliary head.

    Args:
        pixel: l_pi.
        pair: l_pa.
        holistic: l_d; 0 leaves the critic out.
        scale: side of the windows of the affinity, as a part of the map's.
        critic_width: channels of the critic's first layer.
        penalty: weight of the gradient penalty.
        epochs: passes over the training data.
        lr: learning rate of both.
        optimizer: as in `fit`, of both.

    Raises:
        BadOption: the networks do not score the same classes for every pixel.
    """
    batch = first(task.train or (), "training")
    ours, theirs = scored(model, task, batch), scored(teacher_of(model, task), task.of_teacher(), batch)
    if ours.shape[1:] != theirs.shape[1:]:
        told = " and ".join(str(tuple(z.shape[1:])) for z in (ours, theirs))
        raise BadOption(f"student and teacher put out {told}: both must score the same classes for the same pixels")
    terms: dict[str, Term] = {"pixels": Term(partial(softened, temperature=1.0), pixel)} if pixel else {}
    if pair:
        terms["pairs"] = Term(partial(pairwise_affinity, scale=scale), pair)
    if holistic:
        pictured = picture(task, batch)
        critic = Critic(ours.shape[1], 0 if pictured is None else pictured.shape[1], critic_width).to(ours.device)
        note(f"the critic has {sum(p.numel() for p in critic.parameters()):,} parameters, in training only")
        terms["holistic"], task = judged(task, critic, holistic, penalty)
    return learn(model, task, terms, epochs=epochs, lr=lr, optimizer=optimizer)


def scored(model: nn.Module, task: Task, batch: Batch) -> Tensor:
    """What the network says of a batch, (batch, classes, height, width).

    Raises:
        BadOption: that is of another shape.
    """
    with eval_mode(model):
        out = prediction(run(model, task, batch)[0])
    if out.dim() != 4 or out.shape[1] < 2:
        raise BadOption(
            f"structured_kd_seg needs scores of every pixel, (batch, classes, height, width), not {tuple(out.shape)}: "
            "choose kd for this network"
        )
    return out


def picture(task: Task, batch: Batch) -> Tensor | None:
    """The first input of a batch that is an image (batch, channels, height, width); None if there is none."""
    args, kwargs, _ = task.split(batch)
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() == 4), None)


def judged(task: Task, critic: Critic, weight: float, penalty: float) -> tuple[Term, Task]:
    """The student's term, and the task with a `fit` that trains the critic after every step, on the same outputs."""
    last: dict[str, Any] = {}
    plain = task.fit

    def holistic(student: Taps, teacher: Taps, batch: Batch, progress: float) -> Tensor:
        last["ours"], last["theirs"] = exact(student[""]).detach(), exact(teacher[""]).detach()
        last["image"] = to_device(picture(task, batch), student[""].device)
        return -critic(exact(student[""]), last["image"]).mean()

    def judge(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        return {"critic": telling(critic, last["ours"], last["theirs"], last["image"], penalty)}

    def by_turns(model: nn.Module, task: Task, *, epochs: float, **options: Any) -> nn.Module:
        return plain(model, task, epochs=epochs, also=[(list(critic.parameters()), judge)], **options)

    return Term(holistic, weight), replace(task, fit=by_turns)


def telling(critic: Critic, ours: Tensor, theirs: Tensor, image: Tensor | None, penalty: float) -> Tensor:
    """The critic's loss: `E D(z_S) - E D(z_T)` and the gradient penalty between the two."""
    at = torch.rand(len(ours), 1, 1, 1).to(ours)
    between = (at * theirs + (1 - at) * ours).requires_grad_(True)
    (slope,) = torch.autograd.grad(critic(between, image).sum(), between, create_graph=True)
    steep = (slope.flatten(1).square().sum(1) + 1e-12).sqrt() - 1
    return critic(ours, image).mean() - critic(theirs, image).mean() + penalty * steep.square().mean()


@final
class Critic(nn.Module):
    """A score for each score map (batch, classes, height, width), seen beside the image if that has channels."""

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        sizes = [classes + channels, width, 2 * width, 4 * width]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(sizes))
        self.attention = nn.ModuleList(SelfAttention(n) for n in sizes[2:])
        self.last = nn.Conv2d(sizes[-1], 1, 1)

    def forward(self, scores: Tensor, image: Tensor | None) -> Tensor:
        x = scores
        if image is not None:
            x = torch.cat([x, F.interpolate(image.to(x), x.shape[2:], mode="bilinear", align_corners=False)], 1)
        for index, convolution in enumerate(self.convolutions):
            x = F.leaky_relu(convolution(x), 0.1)
            x = self.attention[index - 1](x) if index else x
        return self.last(x).flatten(1).mean(1)


@final
class SelfAttention(nn.Module):
    """`x + g o(x)`: o(x) mixes the values of all places of a map by how well their keys fit, g starts at 0.

    Source: Zhang et al., Self-Attention Generative Adversarial Networks, ICML 2019.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value, self.gain = nn.Conv2d(channels, channels, 1), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x).flatten(2).transpose(1, 2) @ self.key(x).flatten(2)).softmax(-1)
        mixed = (self.value(x).flatten(2) @ weights.transpose(1, 2)).view_as(x)
        return x + self.gain * mixed
