"""The oracle: remove every unit by itself, look at the loss, and take for good the one that changes it least.

Michael C. Mozer, Paul Smolensky, "Skeletonization: A Technique for Trimming the Fat from a Network via Relevance
Assessment", NIPS 1988, has the principle: `s_k = L(without unit k) - L`; Pavlo Molchanov et al., ICLR 2017,
arXiv:1611.06440, call the ranking by its size the oracle. One pass over the data for each unit and round: the measure
of other criteria, not a product.

Departs from the paper: units are whole channels, with all layers that a residual sum couples, removed at once; the
loss is taken at evaluation on calibration batches; the units are scored anew in rounds, of which every one removes
several. Interactions are not seen: two units with opposite effects both score high, though removing both changes
nothing, and of two that can stand for each other both score 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.progress import track
from featherweight.core.site import Site
from featherweight.core.study import Study


@ingredient("score", grain="filter")
def loss_change(site: Site) -> Tensor:
    """By how much the loss changes, either way, when an output's channel is removed, (outputs,)."""
    return loss_increase(site).abs()


@ingredient("score", grain="filter")
def loss_increase(site: Site) -> Tensor:
    """By how much the loss rises when an output's channel is removed, negative where it falls, (outputs,)."""
    ids = site.data.channels().outputs.get(site.path, torch.full((len(site.rows),), -1))
    return torch.where(ids >= 0, site.data.once(increases)[ids], 0.0)


def increases(study: Study) -> Tensor:
    """The rise of the loss without each channel of the study's layers, (channels,); 0 for all others."""
    channels, weighted = study.channels(), set(study.order())
    known = [channels.outputs[path] for path in study.paths if path in channels.outputs]
    scored = torch.cat([*known, torch.empty(0, dtype=torch.long)]).unique()
    found, whole = torch.zeros(channels.count, dtype=torch.float64), study.loss()
    outputs = {path: ids for path, ids in channels.outputs.items() if path in weighted}
    wanted = scored[scored >= 0].tolist()
    for channel in track(wanted, "oracle", len(wanted)):
        gates = {path: (ids != channel).float() for path, ids in outputs.items() if (ids == channel).any()}
        with study.gated(gates):
            found[channel] = study.loss() - whole
    return found


oracle = method(
    "prune",
    score=loss_change,
    grain="filter",
    scope="global",
    coupled="max",
    prune_ratio=0.3,
    schedule="linear",
    rounds=8,
    epochs=0,
    finetune=10,
    lr=1e-3,
    optimizer="sgd",
    paper="Mozer and Smolensky, NIPS 1988; Molchanov et al., ICLR 2017, arXiv:1611.06440",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"rounds": 2, "finetune": 1, "round_to": 1, "calibration_batches": 2},
)
