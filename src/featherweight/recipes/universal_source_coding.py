"""Universal source coding of networks: hidden units have no names, so what their order would cost need not be stored.

Sourya Basu, Lav R. Varshney, "Universal Source Coding of Deep Neural Networks", DCC 2017, arXiv:1804.02800. The rows of
a layer of N hidden units are a multiset: of the N! orders, divided by those of equal rows, any is as good, and with
weights from a finite alphabet as many bits, `log2(N! / prod mult!)`, are saved by writing how many rows begin with each
symbol, how many of these go on with each, and so on down a tree. This method brings the units of every layer into the
order in which that tree is read, with the columns of the next layer, norms and biases; the coder of the paper,
`unlabeled_graph`, writes the counts.

The saving is small beside the weights: 3.9 kbit of 4.7 Mbit for 512 units of 4608 inputs and two bits. It is worth
having for narrow layers of few bits alone.

Departs from the paper: filters of convolutions are rows as well; where layers share their units (residual sums), the
rows of the first are in order and the others follow; units of a grouped convolution keep to their group. What departs
in the code itself, `unlabeled_graph` says.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.catalogue import recipe
from featherweight.core.channels import channel_groups
from featherweight.core.forms import Affine, Codes, Product, Table, along, bake, codes_of
from featherweight.core.ledger import note
from featherweight.core.reorder import Exchange, chosen, exchanges, reorder
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task


@recipe(
    paper="Basu and Varshney, DCC 2017, arXiv:1804.02800",
    family="code",
    coder="unlabeled_graph",
    small={"where": "*"},
)
def universal_source_coding(model: nn.Module, task: Task, *, where: WhereWeighted = None) -> nn.Module:
    """Brings hidden units into the order in which a coder of multisets reads them; the network computes what it did.

    Run it last, after quantization: what follows changes weights, and with them the order.

    Args:
        where: whose units; those of all linear and convolution layers when left out.

    Raises:
        BadOption: no units may trade places.
        TraceError: the network cannot be traced.
        CompressionError: all units are in this order as they are.
    """
    channels = channel_groups(bake(model), task.inputs())
    saved = 0.0
    for one in chosen(exchanges(model, channels), model, where):
        keys = ascending(rows_of(model, one))
        reorder(model, channels, one.members, keys)
        saved += told(one, rows_of(model, one))
    note(f"what order would cost: {saved:.0f} bits")
    return model


def rows_of(model: nn.Module, one: Exchange) -> Tensor:
    """What a file holds of each unit, as integers in the same order, (units, numbers)."""
    path, _, key = one.name.rpartition(".")
    module = model.get_submodule(path)
    weight = module.get_parameter(key).detach().cpu()
    return written(weight, codes_of(module, key)).reshape(len(weight), -1)[one.places].flatten(1)


def written(weight: Tensor, codes: Codes | None) -> Tensor:
    """The symbols that a file holds of a weight, or others in the same order; rows first."""
    match codes:
        case Codes(rule=Affine()):
            return codes.symbols
        case Codes(rule=Product()):
            return codes.symbols.movedim(codes.symbols.dim() - 2, 0)
        case Codes(rule=Table(values=values, axis=int(axis))):
            ranks = values.double().argsort(dim=1, stable=True).argsort(1)
            return ranks[along(torch.arange(len(values)), axis, weight.dim()), codes.symbols.long().view(weight.shape)]
    return integers(weight)


def integers(weight: Tensor) -> Tensor:
    """Floating-point numbers as integers in the same order; `-0.0` comes before `0.0`."""
    bits = weight.to(torch.float64).view(torch.int64)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


def ascending(rows: Tensor) -> Tensor:
    """The order of rows by their first number, among equals by their second, and so on.

    >>> ascending(torch.tensor([[2, 0], [1, 5], [1, 3]])).tolist()
    [2, 1, 0]
    """
    return torch.from_numpy(np.lexsort(rows.numpy().T[::-1]).copy())


def told(one: Exchange, rows: Tensor) -> float:
    """The bits that an order of rows is worth: `log2(N! / prod mult!)`; 0 for weights from no finite alphabet."""
    if 4 * len(rows.unique()) > rows.numel():
        note(f"{one.name}: its weights are nearly all different; quantize first, or order is worth little beside them")
        return 0.0
    return order_bits(rows)


def order_bits(rows: Tensor) -> float:
    """The logarithm to the base 2 of the number of different orders of rows.

    >>> round(order_bits(torch.tensor([[1], [2], [2], [3]])), 3)  # 4! / 2!
    3.585
    """
    counts = rows.unique(dim=0, return_counts=True)[1].double()
    ways = torch.lgamma(torch.tensor(len(rows) + 1.0, dtype=torch.float64)) - torch.lgamma(counts + 1).sum()
    return float(ways) / float(np.log(2))
