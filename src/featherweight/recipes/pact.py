"""PACT: the ends of activation grids are trained, and pulled in."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Bits, Count, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Form, activation_forms
from featherweight.core.grids import ActivationGrid, Seen
from featherweight.core.ledger import note
from featherweight.core.norms import fit_and_settle
from featherweight.core.site import PerLayer
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Batch, Task, loss_of, run
from featherweight.core.taught import taught
from featherweight.ingredients.grid.dorefa import dorefa_weights
from featherweight.ingredients.range.observed import mse
from featherweight.quantize import quantize


@recipe(
    paper="Choi et al., 2018, arXiv:1805.06085",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1, "calibration_batches": 2},
)
def pact(
    model: nn.Module,
    task: Task,
    *,
    weight_bits: PerLayer[Bits] = 4,
    act_bits: Bits = 4,
    penalty: Amount = 1e-4,
    keep_first_last: bool = True,
    calibration_batches: Count = 16,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    teacher_share: Share = 0.0,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Trains weights on DoReFa's grids and activations on `[0, alpha]`, each layer's alpha trained along.

    Jungwook Choi, Zhuo Wang, Swagath Venkataramani, Pierce I-Jen Chuang, Vijayalakshmi Srinivasan, Kailash
    Gopalakrishnan, "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018, arXiv:1805.06085:
    `y = clip(x, 0, alpha)` (eq. 1), in `2^k - 1` equal steps (eq. 2), `dy/dalpha = 1` where x >= alpha, else 0 (eq. 3),
    and `penalty / 2 * alpha^2` in the loss. Weights are those of DoReFa-Net; the first and the last layer stay float.

    Departs from the paper: alpha starts where calibration says (the paper: 10), at the end of the grid of least squared
    error; training starts from the network that is given, with Adam. The penalty is a number of its own (the paper uses
    the weight decay's). Inputs that go below zero, which a network has where no ReLU stands before a layer, are clipped
    to `[-alpha, alpha]` on signed integers. Afterwards the running statistics of batch norms are taken
    anew, and each alpha is a fixed grid, which file and ONNX read.

    Args:
        weight_bits: bits of a weight; or layer patterns with bits each.
        act_bits: bits of an activation.
        penalty: weight of the squares of all alphas in the loss.
        keep_first_last: leave the first and the last layer that run in float, as the paper does.
        calibration_batches: how many batches alpha starts from.
        epochs: training on the grids, the learning rate falling to zero.
        lr: learning rate.
        optimizer: as in `fit`.
        teacher_share: share of the teacher's softened class probabilities in the loss, the labels have the rest.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        CompressionError: nothing is left to quantize.
    """
    losses = taught(task, model, teacher_share) if epochs else None
    chosen: dict[str, Any] = {"weight_bits": weight_bits, "keep_first_last": keep_first_last, "where": where}
    batches = calibration_batches  # of the network as it is: training leads back to its activations
    quantize(model, task, weights=None, acts=clipped, act_bits=act_bits, calibration_batches=batches, **chosen)
    quantize(model, task, weights=dorefa_weights, **chosen)
    forms = [form for held in activation_forms(model).values() for form in held.values()]
    alphas = [form.alpha for form in forms if isinstance(form, ClippedActivations)]

    def step(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        terms = losses(student, batch, progress) if losses else {"loss": loss_of(task, *run(student, task, batch))}
        pull = penalty / 2 * torch.stack([alpha.square() for alpha in alphas]).sum() if alphas else torch.zeros(())
        return terms | {"alpha": pull} if penalty and alphas else terms

    start = [float(alpha.detach()) for alpha in alphas]
    fit_and_settle(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, label="train on the grids")
    moved = [f"{before:.3g} -> {float(alpha.detach()):.3g}" for before, alpha in zip(start, alphas, strict=True)]
    note("alpha, layer by layer: " + ", ".join(moved))
    return model


def clipped(seen: Seen, bits: int) -> Form:
    """Activations clipped at a trained alpha, that starts at the end of the grid of least squared error."""
    end = mse(seen, bits).steps()
    negative = bool(seen.parts) and seen.low < 0
    alpha = end.scale * max(end.high - end.zero_point, end.zero_point - end.low)
    return ClippedActivations(alpha, bits, signed=negative)


@final
class ClippedActivations(Form):
    """`clip(x, 0, alpha)`, or `clip(x, -alpha, alpha)` if signed, in equal steps; settles as a fixed grid."""

    stands = ("input", "output")
    settings = ("bits", "signed")
    alpha: nn.Parameter

    def __init__(self, alpha: float, bits: int, *, signed: bool) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.alpha = nn.Parameter(torch.tensor(alpha, dtype=torch.float32))

    def unsound(self) -> str:
        held = self._parameters.keys() == {"alpha"} and not self._buffers and self.alpha.numel() == 1
        sound = held and self.alpha.is_floating_point() and bool(self.alpha.isfinite().all())
        return (
            "" if sound and self.bits in range(1, 17) and isinstance(self.signed, bool) else "whose alpha is impossible"
        )

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest integer."""
        high = max(1, 2 ** (self.bits - 1) - 1) if self.signed else 2**self.bits - 1
        return (-high if self.signed else 0), high

    def scale(self) -> Tensor:
        """One step, positive whatever training made of alpha."""
        return self.alpha.abs().clamp_min(1e-18) / self.ends[1]

    def settled(self) -> Form:
        return ActivationGrid(float(self.scale().detach()), 0, *self.ends)

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (value,) = free
        if not value.is_floating_point():
            return value
        scale, zero = self.scale(), torch.zeros((), dtype=torch.int32, device=self.alpha.device)
        held = value.float()
        # the operator of ActivationGrid: what is trained is what settles, bit for bit
        snapped = torch.fake_quantize_per_tensor_affine(held.detach(), scale.detach(), zero, *self.ends)
        if not torch.is_grad_enabled():
            return snapped.to(value.dtype)
        return _ClipGradient.apply(held, self.alpha, snapped, self.signed).to(value.dtype)


class _ClipGradient(torch.autograd.Function):
    """Hands on `snapped`, with the gradients of clipping a value at alpha."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, alpha: Tensor, snapped: Tensor, signed: bool) -> Tensor:
        ctx.save_for_backward(value, alpha)
        ctx.signed = signed
        return snapped.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grads
        value, alpha = ctx.saved_tensors
        end, none = alpha.abs(), torch.zeros_like(gradient)
        above, below = value >= end, value <= (-end if ctx.signed else 0)
        of_end = torch.where(above, gradient, none).sum()
        of_end = of_end - torch.where(below, gradient, none).sum() if ctx.signed else of_end
        return torch.where(above | below, none, gradient), of_end * alpha.sign(), None, None
