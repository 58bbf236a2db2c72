"""Residual branches: which layers have a shortcut around them, and what is left of a block without its branch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.core.flow import Step, Visit, follow
from featherweight.core.forms import own_modules
from featherweight.core.layers import layer_spec
from featherweight.core.ledger import skip
from featherweight.core.surgery import swap
from featherweight.core.task import as_call, eval_mode
from featherweight.errors import CompressionError, FormatError


@final
@dataclass(frozen=True)
class Branch:
    """One residual block `after(shortcut(x) + branch(x))`, a module that is called once.

    `layers` are the paths of the branch's layers that hold parameters, in the order of their calls: the last one puts
    out what is added. `rest`: the paths of the shortcut's layers; `after`: "nothing" or "relu", what follows.
    """

    block: str
    layers: tuple[str, ...]
    rest: tuple[str, ...]
    after: str


def branches(model: nn.Module, example_inputs: Any) -> list[Branch]:
    """The residual blocks of a model whose branch can be removed; others are skipped with the reason."""
    single = {path: m for path, m in own_modules(model) if path and not any(True for _ in m.children())}
    leaves = {path: m for path, m in single.items() if not isinstance(m, nn.Identity)}  # which make no tensor
    flow = follow(model, example_inputs, leaves)
    calls = [visit.path for visit in flow.visits]
    found, sums = [], set()
    for visit in flow.visits:  # inner modules before those around them
        if not visit.path or visit.path in single or calls.count(visit.path) > 1:
            continue
        steps = flow.steps[visit.first : visit.last]
        adds = [step for step in steps if step.name == "add"]
        if len(adds) != 1 or adds[0] in sums:
            continue
        sums.add(adds[0])
        branch = _branch(model, visit, steps)
        if isinstance(branch, str):
            skip(visit.path, f"its residual branch stays: {branch}")
        else:
            found.append(branch)
    return found


def _branch(model: nn.Module, visit: Visit, steps: Sequence[Step]) -> Branch | str:
    """The block that a module's call is, or why it is none whose branch can go."""
    place = next(i for i, step in enumerate(steps) if step.name == "add")
    total = steps[place]
    sides = [found for n in total.reads if (found := steps_behind(n, visit.reads, steps)) is not None]
    if len(sides) != 2 or any(c not in (1, 1.0) for c in total.constants):
        return "its sum is not one of two tensors that the block computes"
    weighted = [[s.layer for s in side if s.layer and _held(model, s.layer)] for side in sides]
    longer = int(len(weighted[1]) > len(weighted[0]))
    branch, short, tail = sides[longer], sides[1 - longer], _tail(model, steps[place + 1 :], total, visit)
    try:
        for step in short:
            layer_spec(model.get_submodule(step.layer or ""))
    except FormatError as error:
        return str(error)
    wrong = {
        "both sides of its sum have as many layers": len(weighted[0]) == len(weighted[1]),
        "what it adds is not what a layer with parameters puts out": not branch
        or branch[-1].layer is None
        or branch[-1].layer not in weighted[longer],
        "its shortcut computes something outside of layers": any(s in branch or s.layer is None for s in short),
        "more than a ReLU follows its sum": tail is None,
    }
    reason = next((text for text, holds in wrong.items() if holds), "")
    rest = tuple(str(step.layer) for step in short)
    return reason or Branch(visit.path, tuple(str(path) for path in weighted[longer]), rest, tail or "")


def steps_behind(number: int, start: int | None, steps: Sequence[Step]) -> list[Step] | None:
    """The steps, in order, from the block's input to a tensor; None if it needs any other tensor."""
    made = {n: step for step in steps for n in step.makes}
    wanted, found = [number], set()
    while wanted:
        n = wanted.pop()
        if n == start:
            continue
        if n not in made:
            return None
        if made[n] not in found:
            found.add(made[n])
            wanted += made[n].reads
    return [step for step in steps if step in found]


def _tail(model: nn.Module, steps: Sequence[Step], total: Step, visit: Visit) -> str | None:
    if not steps:
        return "nothing" if visit.makes in total.makes else None
    (*more, last) = steps
    relu = last.name == "relu" or (last.layer is not None and type(model.get_submodule(last.layer)) is nn.ReLU)
    straight = last.reads == total.makes and visit.makes in last.makes
    return "relu" if relu and straight and not more else None


def _held(model: nn.Module, path: str) -> bool:
    return any(True for _ in model.get_submodule(path).parameters())


def without_branch(model: nn.Module, branch: Branch) -> nn.Module:
    """What a block computes if its branch puts out zeros: ordinary layers."""
    layers: list[nn.Module] = [copy.deepcopy(model.get_submodule(path)) for path in branch.rest]
    layers += [nn.ReLU()] if branch.after == "relu" else []
    if len(layers) == 1:
        return layers[0]
    return nn.Sequential(*layers) if layers else nn.Identity()


def remove_branches(model: nn.Module, gone: Sequence[Branch], example_inputs: Any) -> None:
    """Puts in the place of blocks, whose branches put out zeros, what they compute without them.

    Raises:
        CompressionError: the network's output would change; it is as it was.
    """
    before = list(_outputs(model, example_inputs))
    for branch in gone:
        old = model.get_submodule(branch.block)
        swap(model, branch.block, without_branch(model, branch))
        for a, b in zip(before, _outputs(model, example_inputs), strict=True):
            if not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
                swap(model, branch.block, old)
                raise CompressionError(
                    f"the branch of {branch.block} is not zero: its removal would move the output by "
                    f"{float((a - b).abs().max()):.1e}"
                )


def _outputs(model: nn.Module, example_inputs: Any) -> Iterator[Tensor]:
    args, kwargs = as_call(example_inputs)
    with eval_mode(model):
        yield from (leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor))
