"""Quantized CNN: product quantization whose codewords minimise the error of the responses, layer after layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import islice
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.allowed import Amount, Bits, Count, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.layerwise import called, unfit
from featherweight.core.ledger import note, skip
from featherweight.core.reconstruct import Moments, augmented, layer_rows, solved
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.core.vectors import (
    affordable,
    blocks,
    chosen,
    cluster_vectors,
    columns_axis,
    divided,
    hold,
    matrix_of,
    told,
)
from featherweight.errors import CompressionError
from featherweight.share import narrow

RIDGE = 1e-9
"""Of the pull of codewords to where they are, over the mean square of the inputs: unused ones stay."""


@recipe(
    paper="Wu et al., CVPR 2016, arXiv:1512.06473",
    family="quantize",
    needs={"calibration"},
    shrinks={"bits"},
    small={"calibration_batches": 2, "sweeps": 1, "codebook_share": 0.25, "fc_dim": 2},
)
def qcnn(
    model: nn.Module,
    task: Task,
    *,
    conv_dim: Count = 8,
    conv_bits: Bits = 7,
    fc_dim: Count = 4,
    fc_bits: Bits = 5,
    codebook_share: Share = 0.125,
    correct: bool = True,
    ridge: Amount = 0.1,
    sweeps: Count = 5,
    positions: Count = 10,
    calibration_batches: Count = 16,
    epochs: Amount = 0,
    lr: Positive = 1e-4,
    optimizer: Optimizers = None,
    where: WhereWeighted = None,
) -> nn.Module:
    """Quantizes layers front to back: codewords and indices that give the original network's outputs best.

    Jiaxiang Wu, Cong Leng, Yuhang Wang, Qinghao Hu, Jian Cheng, "Quantized Convolutional Neural Networks for Mobile
    Devices", CVPR 2016, arXiv:1512.06473. The input channels are cut into sub-spaces m; in each the weights are words
    of a codebook D_m, for all places of a kernel the same: `min sum_n |o_n - sum_m (D_m B_m)^T s_n^m|^2` (eq. 5, 6, 12)
    over codebooks and indices, sub-space by sub-space: D_m by least squares, B_m by trying all words. With error
    correction (sec. 3.4) the inputs s_n are those behind the layers that were quantized before, the responses o_n those
    of the original network. Then a layer needs K products for each sub-space, looked up and added (eq. 2, 9).

    Departs from the paper: all words of a sub-space are solved for together (the paper: one by one), and the indices of
    one place of the kernel at a time; both only ever lower the error. A ridge pulls the weights to where they were:
    with few samples the responses alone leave much undetermined (`ridge=0` is the paper's). The paper's K = 128 for
    convolutions and 32 for linear layers fall until the codebooks cost no more than `codebook_share` of the float
    weights; sub-spaces have the largest width up to `dim` that divides the channels. Layers that hold zeros are
    quantized by their weights alone, so that these stay zero. Biases stay as they are. `epochs` trains codewords of all
    layers, the paper's those of linear ones. A look-up is faster than a matrix product only where products are slow;
    until then the weights are rebuilt.

    Args:
        conv_dim: at most so many input channels in a sub-space of a convolution.
        conv_bits: bits of an index there: at most `2 ** conv_bits` codewords.
        fc_dim: at most so many inputs in a sub-space of a linear layer.
        fc_bits: bits of an index there.
        codebook_share: what the codebooks of a layer may cost, as a share of its float weights.
        correct: repair the error of the layers before, too.
        ridge: pull of the weights to where they were, as a share of the mean square of the inputs: without it few
            samples leave much of a wide layer undetermined.
        sweeps: how often all sub-spaces of a layer are gone through.
        positions: output positions drawn from every sample.
        calibration_batches: how many batches of the calibration (or training) data the responses are from.
        epochs: fine-tuning of codewords, biases and norms at the end.
        lr: its learning rate.
        optimizer: its optimizer, as in `fit`.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        UnknownName: a pattern matches nothing.
        CompressionError: no layer could be quantized.
    """
    masked = masked_names(model)
    bake(model)
    mask_zeros(model, masked)
    original, found, order, done = copy.deepcopy(model), sites(model, where), called(model, task), 0
    for path in (path for path in found if unfit(model, path, order)):
        skip(path, unfit(model, path, order))
    for path in (path for path in order if path in found and not unfit(model, path, order)):
        site, conv = found[path], not isinstance(found[path].module, nn.Linear)
        start = started(site, 2 ** (conv_bits if conv else fc_bits), conv_dim if conv else fc_dim, codebook_share)
        if start is None:
            continue
        prefix, target = (model, original) if correct else (original, None)
        data = islice(task.calibrating(), calibration_batches)
        moments = Moments.of(layer_rows(prefix, path, task, data, positions=positions, original=target))
        kept = site.weight != 0
        codebooks, index, errors = start if not kept.all() else improved(site, moments, *start[:2], sweeps, ridge)
        hold(model, site, codebooks, narrow(index), kept, columns_axis(site))
        done += 1
        note(f"{path}: {told(site, codebooks)}" + (f"; error {errors[0]:.3%} to {errors[-1]:.3%}" if errors else ""))
    if not done:
        raise CompressionError("no chosen layer could be quantized: see why each was left, or pass more codebook_share")
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="fine-tune") if epochs else model


def started(site: Site, words: int, dim: int, share: float) -> tuple[Tensor, Tensor, list[float]] | None:
    """Codebooks (m, k, d) and index (rows, m) by k-means of the weights; None, and a remark, if it is left alone."""
    weight, axis = site.weight, columns_axis(site)
    if not weight.any():
        skip(site.path, "all its weights are zero")
        return None
    matrix = matrix_of(weight, axis)
    if not (words := affordable(site, len(matrix), words, share)):
        return None
    dim = divided(matrix.shape[1], dim)
    kept = None if bool(weight.all()) else blocks(matrix_of(weight != 0, axis), dim)
    return *cluster_vectors(blocks(matrix, dim), words, kept), []


def improved(
    site: Site, moments: Moments, codebooks: Tensor, index: Tensor, sweeps: int, ridge: float = 0.0
) -> tuple[Tensor, Tensor, list[float]]:
    """Codebooks and index after so many sweeps over the sub-spaces, and the errors before and after each.

    An error is the mean squared error of the responses, as a share of their variance, with the ridge.
    """
    responses = Responses.of(site, moments, codebooks, index, ridge)
    errors = [responses.error()]
    for _ in range(sweeps):
        for m in range(len(codebooks)):
            responses.solve(m)
            for place in range(responses.index.shape[1]):
                responses.assign(m, place)
        errors.append(responses.error())
    return responses.codebooks, responses.index.flatten(0, 1), errors


@final
@dataclass
class Responses:
    """The squared error of a layer's responses, a quadratic function of its weights (outputs, places, channels).

    `gram` (places, channels, places, channels) is the mean product of inputs, `target` that of inputs and responses;
    `slope = target - gram now` is half the direction in which the error falls. `energy` is the responses' variance.
    `codebooks` (m, k, d) and `index` (outputs, places, m) make the weights `now`.
    """

    codebooks: Tensor
    index: Tensor
    gram: Tensor
    target: Tensor
    constant: float
    energy: float
    now: Tensor
    slope: Tensor

    @staticmethod
    def of(site: Site, moments: Moments, codebooks: Tensor, index: Tensor, ridge: float = 0.0) -> Responses:
        """From the sums over a layer's rows; its bias stays as it is. The ridge adds `ridge m |W - now|^2`."""
        out, channels = site.weight.shape[:2]
        places = site.weight[0, 0].numel()
        order = torch.arange(channels * places).view(channels, places).T.flatten()  # channels of a place side by side
        bias = augmented(site.module)[:, -1]
        weight = augmented(site.module)[:, :-1][:, order]
        gram = moments.xx[:-1, :-1][order][:, order] / moments.n
        pull = ridge * float(gram.diagonal().mean())
        gram.diagonal().add_(pull)
        gram = gram.view(places, channels, places, channels)
        target = (moments.xy[:-1] - moments.xx[:-1, -1:] * bias)[order].T / moments.n + pull * weight
        target = target.reshape(out, places, channels)
        constant = float((moments.yy - 2 * bias * moments.xy[-1]).sum() / moments.n + bias.square().sum())
        constant += pull * float(weight.square().sum())
        now = chosen(codebooks, index).transpose(0, 1).reshape(out, places, channels)
        slope = target - torch.einsum("opc,pcqd->oqd", now, gram)
        energy = float(moments.energy.sum()) or 1.0
        return Responses(codebooks, index.view(out, places, -1), gram, target, constant, energy, now, slope)

    def error(self) -> float:
        """The mean squared error of the responses, over their variance."""
        return max(0.0, self.constant - float((self.now * (self.target + self.slope)).sum())) / self.energy

    def span(self, m: int) -> slice:
        """The channels of a sub-space."""
        dim = self.codebooks.shape[-1]
        return slice(m * dim, (m + 1) * dim)

    def solve(self, m: int) -> None:
        """Moves all words of a sub-space to where the error is least, by least squares."""
        words, dim, span = *self.codebooks.shape[1:], self.span(m)
        used = F.one_hot(self.index[:, :, m].long(), words).double()
        together = torch.einsum("opk,oql->pkql", used, used)
        matrix = torch.einsum("pkql,pdqe->kdle", together, self.gram[:, span, :, span]).reshape(words * dim, -1)
        matrix.diagonal().add_(RIDGE * float(matrix.diagonal().mean()) + 1e-300)
        fall = torch.einsum("opk,opd->kd", used, self.slope[:, :, span]).reshape(1, -1)
        moved = solved(matrix, fall).view(words, dim)
        self.codebooks[m] += moved
        self._add(span, moved[self.index[:, :, m].long()])

    def assign(self, m: int, place: int) -> None:
        """Gives every output the word of least error in a sub-space at one place of the kernel."""
        words, span, own = self.codebooks[m], self.span(m), self.index[:, place, m].long()
        gram, now = self.gram[place, span, place, span], self.now[:, place, span]
        costs = (words @ gram * words).sum(1) - 2 * (self.slope[:, place, span] + now @ gram) @ words.T
        best = costs.argmin(1)
        held = costs.gather(1, torch.stack([best, own], 1))
        best = torch.where(held[:, 0] < held[:, 1], best, own)
        self.index[:, place, m] = best
        self._add(span, (words[best] - now)[:, None], place)

    def _add(self, span: slice, change: Tensor, place: int | None = None) -> None:
        """Adds to the weights of a sub-space, at one place or all."""
        at = slice(None) if place is None else slice(place, place + 1)
        self.now[:, at, span] += change
        self.slope -= torch.einsum("opd,pdqc->oqc", change, self.gram[at, span])
