"""Cross-layer sharing (ALBERT; Lan et al., ICLR 2020): the blocks of a stack have the same weights."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import form_names, own_modules
from featherweight.core.ledger import note, recording, skip
from featherweight.core.surgery import Layers, Where, targets
from featherweight.core.task import Task
from featherweight.errors import BadOption, CompressionError

Part = Literal["all", "attention", "ffn"]
STACKS = (nn.ModuleList, nn.Sequential)


@recipe(
    paper="Lan et al., ICLR 2020, arXiv:1909.11942, section 3.1",
    family="share",
    aliases=("albert_sharing",),
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
def albert_share(
    model: nn.Module,
    task: Task,
    *,
    share: Part = "all",
    groups: Count = 1,
    start: Literal["mean", "first"] = "mean",
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: Annotated[Where, Layers(STACKS)] = None,
) -> nn.Module:
    """Ties the weights of blocks of the same kind and sizes in a stack, then trains the network.

    Zhenzhong Lan, Mingda Chen, Sebastian Goodman, Kevin Gimpel, Piyush Sharma, Radu Soricut, "ALBERT: A Lite BERT for
    Self-supervised Learning of Language Representations", ICLR 2020, arXiv:1909.11942, section 3.1 and table 4: L
    blocks become one, applied L times; or only their attention, or only their feed-forward parts; or blocks of the same
    group. A shared parameter is trained, counted and stored once, its gradient is the sum over its uses. The work
    stays.

    Departs from the paper: the network given is trained already, so a shared weight starts at the mean of those that it
    stands for, or at that of the first block, and not at random. Stacks are the lists and sequences of the network
    whose blocks agree in type and in the shapes of all tensors (blocks of other kinds may stand between them), so
    convolution networks have them too. Running statistics of batch norms stay those of each use.

    Args:
        share: "all" (the paper's choice), "attention" (what lies in modules with "attention" or "attn" in their class
        or
            name) or "ffn" (all else).
        groups: into how many groups of consecutive blocks a stack is cut; each has weights of its own.
        start: of a shared weight: "mean" or "first".
        epochs: training after the sharing.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw", "sgd" or "momentum".
        where: which stacks (`nn.ModuleList`, `nn.Sequential`); the outermost that have equal blocks when left out.

    Raises:
        BadOption: the network has no stack, or its blocks have no such part.
        CompressionError: no stack has two blocks that are alike.
    """
    shared = 0
    for path, blocks in stacks(model, where).items():
        for first in range(groups):
            group = blocks[len(blocks) * first // groups : len(blocks) * (first + 1) // groups]
            shared += _tied(path, [model.get_submodule(name) for name in group], share, start) if group else 0
    if not shared:
        raise CompressionError(
            "no two blocks of a stack are alike and in one group, with weights of their own: choose another method, "
            "or fewer groups"
        )
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train shared blocks")


def stacks(model: nn.Module, where: Where = None) -> dict[str, list[str]]:
    """Sets of blocks that are alike, by the path of the stack they stand in and the number of the set."""
    found: dict[str, list[str]] = {}
    inside: list[str] = []
    with recording():  # that the layers of a stack are no stacks themselves is no remark
        chosen = targets(model, where, STACKS)
    for path, stack in chosen.items():
        if any(f"{path}.".startswith(f"{block}.") for block in inside):
            continue
        kinds: dict[str, list[str]] = {}
        for name, block in stack.named_children():
            if any(p.dim() > 1 for p in block.parameters()) and not _held(path, name, block):
                kinds.setdefault(_kind(block), []).append(f"{path}.{name}" if path else name)
        alike = [names for names in kinds.values() if len(names) > 1]
        inside += [name for names in alike for name in names]
        found |= {f"{path} ({number})" if len(alike) > 1 else path: names for number, names in enumerate(alike)}
    return found


def _held(path: str, name: str, block: nn.Module) -> bool:
    """Whether forms stand on weights of a block, which cannot be tied; that is told."""
    held = next((p for p, m in own_modules(block) if form_names(m)), None)
    if held is not None:
        skip(".".join(part for part in (path, name, held) if part), "a form stands on its weight: share before that")
    return held is not None


def _kind(block: nn.Module) -> str:
    """What two blocks must agree in."""
    held = block.state_dict(keep_vars=True)
    first = {id(t): name for name, t in reversed(held.items())}  # a tie inside a block is tied to its first name
    tensors = [f"{name} {tuple(t.shape)} {t.dtype} {first[id(t)]}" for name, t in held.items()]
    return "\n".join(
        [*(f"{path} {type(m).__qualname__} {m.extra_repr()}" for path, m in block.named_modules()), *tensors]
    )


def _tied(path: str, blocks: list[nn.Module], share: Part, start: str) -> int:
    """Ties the chosen parameters of blocks; how many are saved. Ties inside a block stay, and make one choice."""
    if len(blocks) < 2:
        return 0
    held = dict(blocks[0].named_parameters(remove_duplicate=False))
    wanted = {id(p) for name, p in held.items() if share in ("all", _part(blocks[0], name))}
    chosen = [name for name, p in held.items() if id(p) in wanted]
    if not chosen:
        where = path or "the model"
        raise BadOption(f'the blocks of {where} have no parameters of the part {share!r}: pass share="all"')
    before = _count(blocks)
    with torch.no_grad():
        means = {name: torch.stack([block.get_parameter(name) for block in blocks]).mean(0) for name in chosen}
        for name in chosen:
            kept = blocks[0].get_parameter(name)
            if start == "mean":
                kept.copy_(means[name])
            for block in blocks[1:]:
                path_to, _, leaf = name.rpartition(".")
                block.get_submodule(path_to)._parameters[leaf] = kept
    saved = before - _count(blocks)
    note(f"{path or 'the model'}: {len(blocks)} blocks share {len(wanted)} tensors each, {saved:,} parameters less")
    return saved


def _count(blocks: list[nn.Module]) -> int:
    """The parameters of blocks, each counted once."""
    return sum(p.numel() for p in {id(p): p for block in blocks for p in block.parameters()}.values())


def _part(block: nn.Module, name: str) -> Part:
    """Whether a parameter of a block belongs to its attention, by the modules that it lies in."""
    steps = name.split(".")[:-1]
    told = [type(block.get_submodule(".".join(steps[: i + 1]))).__name__ for i in range(len(steps))]
    named = any(word in text.lower() for text in (*told, *steps) for word in ("attention", "attn"))
    return "attention" if named else "ffn"
