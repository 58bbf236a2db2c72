"""How a tensor is held while it is being compressed: soft weights and activations on torch parametrizations and hooks.

A *form* turns free parameters into a weight (a mask, a grid, a codebook), or rewrites an activation or its gradient.
`attach` puts it on a module, `bake` makes plain tensors of the weights again and leaves the exact integers beside them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.catalogue import entries
from featherweight.core.ledger import note
from featherweight.errors import BadOption, FormatError, shown, unknown

# --- the exact integers behind a weight -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Affine:
    """`weight = (symbol - zero_point) * scale`, one scale and zero point in all or one per index of `axis`.

    With `block` (and no axis) there is one per run of `block` consecutive weights, row-major. The difference of two
    integers is exact, whatever their types: in torch, bytes would wrap around. A zero point of float64 says that the
    product is taken in float64 too: many steps away from zero, that is what tells one step from the next.
    """

    scale: Tensor
    zero_point: Tensor
    axis: int | None = None
    block: int | None = None

    def spread(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Scales or zero points, shaped to broadcast over a weight of `shape`."""
        if self.block is None or values.numel() == 1:
            return along(values, self.axis, len(shape))
        if values.numel() * self.block != prod(shape):
            raise FormatError(
                f"{values.numel()} scales of {self.block} weights each do not make a weight of {prod(shape)}"
            )
        return values.repeat_interleave(self.block).view(shape)

    def decode(self, symbols: Tensor, shape: tuple[int, ...]) -> Tensor:
        scale, zero = self.spread(self.scale, shape), self.spread(self.zero_point, shape)
        whole = not zero.is_floating_point()
        difference = (symbols.long() if whole else symbols.to(zero.dtype)).view(shape) - zero
        if zero.dtype == torch.float64:
            return (difference * scale.double()).to(self.scale.dtype)
        return difference.to(self.scale.dtype) * scale


@dataclass(frozen=True)
class Table:
    """`weight = values[symbol]`, values of shape (k,); with `axis` a table for each of its indices, shape (size, k)."""

    values: Tensor
    axis: int | None = None

    def decode(self, symbols: Tensor, shape: tuple[int, ...]) -> Tensor:
        chosen = symbols.long().view(shape)
        if self.axis is None:
            return self.values[chosen]
        return self.values[along(torch.arange(len(self.values)), self.axis, len(shape)), chosen]


@dataclass(frozen=True)
class Product:
    """Product codebook: `codebooks` (m, k, d) hold k vectors for each block of d columns of the flattened weight.

    `symbols` are (out, m); `weight[o, block j] = codebooks[j, symbols[o, j]]`. Codebooks of shape (t, m, k, d) are t
    stages with symbols of shape (t, out, m): what the stages give is added, the first two first. With `axis` the
    columns are that dimension of the weight, and the rows all others in their order (sub-vectors of channels that all
    places of a kernel share: `axis=1` of a convolution has out * height * width rows).
    """

    codebooks: Tensor
    axis: int | None = None

    def decode(self, symbols: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.codebooks.dim() == 4:
            stages = zip(self.codebooks, symbols, strict=True)
            return reduce(torch.add, (Product(books, self.axis).decode(own, shape) for books, own in stages))
        blocks = [self.codebooks[j, symbols[:, j].long()] for j in range(self.codebooks.shape[0])]
        return self.placed(torch.cat(blocks, 1), shape)

    def rows(self, shape: tuple[int, ...]) -> int:
        """How many rows a weight of this shape has."""
        return shape[0] if self.axis is None else prod(shape[: self.axis] + shape[self.axis + 1 :])

    def placed(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A matrix (rows, columns) as a weight of this shape."""
        if self.axis is None:
            return matrix.reshape(shape)
        others = shape[: self.axis] + shape[self.axis + 1 :]
        placed = matrix.reshape(*others, shape[self.axis]).movedim(-1, self.axis)
        return placed.reshape(-1).view(
            shape
        )  # kernels choose by strides, which `contiguous` leaves where a size is one


Rule = Affine | Table | Product


@dataclass(frozen=True)
class Codes:
    """The exact integers behind a weight of `shape`, and the rule that turns them into it, bit for bit."""

    symbols: Tensor
    rule: Rule
    shape: tuple[int, ...]

    def decode(self) -> Tensor:
        """The weight, of `shape`."""
        return self.rule.decode(self.symbols, self.shape)

    def masked(self, keep: Tensor) -> Codes:
        """The same codes with zeros where `keep` is False; a rule without a zero becomes a table that has one."""
        rule = self.rule
        if isinstance(rule, Affine):
            zero = rule.spread(rule.zero_point, self.shape)
            if bool((zero == zero.round()).all()):
                symbols = torch.where(keep, self.symbols.view(self.shape), zero.to(self.symbols.dtype))
                return replace(self, symbols=symbols)
        if isinstance(rule, Table) and rule.axis is not None:
            zeros = rule.values.new_zeros(len(rule.values), 1)
            symbols = torch.where(keep, self.symbols.view(self.shape).int(), rule.values.shape[1])
            return Codes(symbols, Table(torch.cat([rule.values, zeros], 1), rule.axis), self.shape)
        return from_values(torch.where(keep, self.decode(), 0.0))


def along(values: Tensor, axis: int | None, dims: int) -> Tensor:
    """Values, one in all or one per index of `axis`, shaped to broadcast over a tensor of `dims` dimensions."""
    if axis is None or values.dim() == 0:
        return values
    return values.view([-1 if d == axis else 1 for d in range(dims)])


def from_values(weight: Tensor) -> Codes:
    """The codes of any tensor: a table of its distinct values. Bit-exact (`-0.0` and `0.0` are one value: 0.0).

    >>> codes = from_values(torch.tensor([0.5, 0.0, 0.5]))
    >>> codes.symbols.tolist(), codes.rule.values.tolist()
    ([1, 0, 1], [0.0, 0.5])
    """
    values, symbols = torch.unique(weight.detach() + 0.0, return_inverse=True)
    return Codes(symbols, Table(values), tuple(weight.shape))


def codes_of(module: nn.Module, name: str = "weight") -> Codes | None:
    """The codes that `bake` left beside a tensor, or None; dropped, and that is noted, if the tensor changed since."""
    store: dict[str, Codes] = getattr(module, "_fw_codes", {})
    codes = store.get(name)
    if codes is None:
        return None
    tensor = getattr(module, name)
    if codes.shape == tuple(tensor.shape) and torch.equal(codes.decode(), tensor.detach().cpu()):
        return codes
    del store[name]
    note(f"the codes of a {type(module).__name__}.{name} were dropped: the weight has changed since it was quantized")
    return None


def declare_codes(module: nn.Module, name: str, codes: Codes) -> None:
    """Leaves codes beside a plain tensor."""
    module.__dict__["_fw_codes"] = {**module.__dict__.get("_fw_codes", {}), name: codes}


# --- forms ------------------------------------------------------------------------------------------------------------


class Form(nn.Module, ABC):
    """How one tensor is held. Final classes list their plain attributes in `settings`, so that a form can be stored.

    `stands` says on what a form from a file may stand: "weight", and the places of `ACTIVATIONS`. A form that takes its
    sizes from a weight must not meet an activation: the file would choose how much memory that takes.
    """

    order: ClassVar[int] = 1
    stores: ClassVar[Literal["weight", "free"]] = "weight"
    settings: ClassVar[tuple[str, ...]] = ()
    stands: ClassVar[tuple[str, ...]] = ("weight", "input", "output", "grad")
    known: ClassVar[dict[str, type[Form]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Form.known.setdefault(cls.__name__, cls)  # tracing makes subclasses of the same name, which are not forms

    @abstractmethod
    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        """The tensor that the module sees; `keep` is the mask, so that scales are taken over survivors."""

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The free parameters for a given weight."""
        return (weight,)

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        """The integers behind `forward(*free)`, bit for bit; None for a form that has none."""
        return None

    def settled(self) -> Form:
        """What stands in the place of a form on an activation once training is over; `bake` puts it there.

        A grid with a learned range becomes a grid of fixed numbers, which file and export know; outputs stay the same.
        """
        return self

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able settings and named tensors, from which `restored` makes the same form again."""
        tensors = {f"p.{k}": v for k, v in self.named_parameters()} | {f"b.{k}": v for k, v in self.named_buffers()}
        return {name: getattr(self, name) for name in self.settings}, tensors

    def unsound(self) -> str:
        """Why a form that was restored cannot work ("without ...", "whose ..."); empty if it can.

        A form whose numbers come from a file says here what they must be.
        """
        return ""

    @staticmethod
    def restored(name: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Form:
        """The form of which `state` was taken.

        Raises:
            UnknownName: no form has this name.
            FormatError: it has other settings or tensors.
        """
        if name not in Form.known:
            entries()  # an ingredient's form is known once its file was imported
        if name not in Form.known:
            raise unknown("form", name, Form.known)
        form: Form = Form.known[name].__new__(Form.known[name])
        nn.Module.__init__(form)
        if settings.keys() != set(form.settings):
            raise FormatError(f"a form {name} has the settings {', '.join(form.settings) or 'none'}, given others")
        for key in form.settings:
            setattr(form, key, settings[key])
        for key, tensor in tensors.items():
            kind, _, field = key.partition(".")
            if hasattr(form, field) or not field.isidentifier():
                raise FormatError(f"a form {name} cannot have a tensor {shown(field)}")
            if kind == "p":
                form.register_parameter(field, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
            else:
                form.register_buffer(field, tensor)
        return form


class Mask(Form):
    """Zeros that stay zeros.

    With `grad="dense"` pruned weights still learn: splicing, soft and iterative methods need it.
    """

    stands = ("weight",)
    order = 2
    settings = ("grad",)
    keep: Tensor

    def __init__(self, keep: Tensor, grad: Literal["kept", "dense"] = "kept") -> None:
        super().__init__()
        self.grad = grad
        self.register_buffer("keep", keep.detach().bool().clone())  # its own: masks change in place

    def unsound(self) -> str:
        whole = self.grad in ("kept", "dense") and self._buffers.keys() == {"keep"} and self.keep.dtype == torch.bool
        return "" if whole else "whose mask or gradient is missing or of another type"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        masked = torch.where(self.keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
        return masked if self.grad == "kept" else weight + (masked - weight).detach()


class Codebook(Form):
    """Trained sharing: `weight = centroids[index]`; the gradient of a centroid is the sum over its weights.

    Source: Han et al., ICLR 2016, arXiv:1510.00149, eq. 3. The free parameters are the centroids, shape (k,).
    """

    stands = ("weight",)
    stores = "free"
    index: Tensor

    def __init__(self, centroids: Tensor, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self._start = centroids.detach().clone()

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (self._start,)

    def unsound(self) -> str:
        whole = self._buffers.keys() == {"index"} and not self.index.is_floating_point() and not self.index.is_complex()
        return "" if whole else "without integers as its index"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (centroids,) = free
        return centroids[self.index.long()]

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (centroids,) = free
        return Codes(self.index.detach().cpu(), Table(centroids.detach().cpu()), tuple(self.index.shape))


class Stack(nn.Module):
    """The forms of one tensor, innermost first: reshape 0 < snap 1 < mask 2."""

    def __init__(self, forms: list[Form]) -> None:
        super().__init__()
        ordered: list[Form] = sorted(forms, key=lambda form: form.order)
        self.forms = nn.ModuleList(ordered)
        self.start: tuple[Tensor, ...] = ()

    def held(self) -> list[Form]:
        return [form for form in self.forms if isinstance(form, Form)]

    @property
    def keep(self) -> Tensor | None:
        return next((form.keep for form in self.held() if isinstance(form, Mask)), None)

    def forward(self, *free: Tensor) -> Tensor:
        keep = self.keep
        value: tuple[Tensor, ...] = free
        for form in self.held():
            value = (form(*value, keep=keep),)
        return value[0]

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What torch registers at first: the free parameters of the moment, which `_register` then ties in."""
        return self.start[0] if len(self.start) == 1 else self.start

    def codes(self, *free: Tensor) -> Codes | None:
        codes, value = None, free
        for form in self.held():
            if isinstance(form, Mask):
                codes = codes.masked(form.keep.cpu()) if codes is not None else None
            else:
                codes = form.codes(*value, keep=self.keep)
            value = (form(*value, keep=self.keep),)
        return codes


# --- attach and bake --------------------------------------------------------------------------------------------------

ACTIVATIONS = ("input", "output", "grad")
REMOVE = "torch.nn.utils.parametrize.remove_parametrizations"


def attach(module: nn.Module, form: Form, at: str = "weight", *, root: nn.Module | None = None) -> None:
    """Puts a form on a tensor (`weight`, any parameter's name) or on the `input`, `output` or `grad`ient of a module.

    Forms on one tensor stack in their own order; a second form of the same order replaces the first.
    With `root`, every module of it that owns the same parameter gets the same forms.

    Raises:
        BadOption: the module has no such parameter, or carries a parametrization that is no form.
    """
    if at in ACTIVATIONS:
        _attach_activation(module, form, at)
        return
    if reason := foreign(module, at):
        raise BadOption(f"{type(form).__name__} cannot be attached to a {type(module).__name__}: {reason}")
    if not has_forms(module, at) and not isinstance(getattr(module, at, None), nn.Parameter):
        raise BadOption(f"{type(module).__name__} has no parameter {at!r} to attach {type(form).__name__} to")
    held = [(module, at)] if root is None else owners(root, module, at)
    forms, free = _merged(module, form, at)
    stack = Stack(forms)
    for owner, name in held:
        _register(owner, name, stack, free)


def has_forms(module: nn.Module, name: str = "weight") -> bool:
    """Whether forms stand on this tensor."""
    return name in _lists(module)


def form_names(module: nn.Module) -> list[str]:
    """The names of the tensors of a module that forms stand on."""
    return list(_lists(module))


def forms_of(module: nn.Module, name: str = "weight") -> list[Form]:
    """The forms that stand on a tensor, innermost first."""
    return _stack(module, name).held() if has_forms(module, name) else []


def mask_of(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The mask that stands on a tensor (True: kept), or None."""
    return next((form.keep for form in forms_of(module, name) if isinstance(form, Mask)), None)


def _lists(module: nn.Module) -> dict[str, Any]:
    """The forms of a module by tensor name; weight_norm, spectral_norm and others are none of ours."""
    held = module._modules.get("parametrizations")  # what `is_parametrized` asks, without a detour by exceptions
    chains: dict[str, Any] = dict(held.items()) if isinstance(held, nn.ModuleDict) else {}
    return {name: chain for name, chain in chains.items() if isinstance(chain[0], Stack)}


def foreign(module: nn.Module, name: str = "weight") -> str:
    """Why no form can stand on a tensor that something else computes; empty if nothing does.

    A module with forms cannot share its generated class with other parametrizations, whichever tensor these are on.
    """
    if parametrize.is_parametrized(module) and len(module.parametrizations) > len(_lists(module)):  # type: ignore[arg-type]
        return f"it carries torch's own parametrization: remove it first with {REMOVE}"
    tensor = None if has_forms(module, name) else getattr(module, name, None)
    if isinstance(tensor, Tensor) and name not in module._parameters and name not in module._buffers:
        return f"a hook computes its {name}: remove it first (torch.nn.utils.remove_weight_norm, remove_spectral_norm)"
    return ""


def own_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by path, without those of which forms consist."""
    hidden: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        prefix = f"{path}." if path else ""
        hidden |= {f"{prefix}parametrizations"} if _lists(module) else set()
        hidden |= {f"{prefix}fw_{at}" for at in ACTIVATIONS}
        parent = path.rpartition(".")[0]
        if path in hidden or parent in hidden:
            hidden.add(path)
        else:
            yield path, module


def _stack(module: nn.Module, name: str) -> Stack:
    stack: Stack = _lists(module)[name][0]
    return stack


def originals(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The free parameters under the forms of a tensor."""
    held = _lists(module)[name]
    return (
        [held.original] if hasattr(held, "original") else [getattr(held, f"original{i}") for i in range(held.ntensors)]
    )


def _merged(module: nn.Module, form: Form, at: str) -> tuple[list[Form], list[nn.Parameter]]:
    """The forms after adding one, and their free parameters."""
    present = forms_of(module, at)
    if not present:
        parameter = getattr(module, at)
        return [form], _free(form, parameter)
    others = [f for f in present if f.order != form.order]
    inner = min(f.order for f in present)
    if form.order > inner and others:
        return [*others, form], originals(module, at)
    under = originals(module, at)  # the new form becomes the innermost
    replaced = next((f for f in present if f.order == form.order), None)
    base = under[0] if replaced is None or replaced.stores == "weight" else getattr(module, at).detach()
    return [*others, form], _free(form, base)


def _free(form: Form, base: Tensor) -> list[nn.Parameter]:
    free = form.free(base)
    if len(free) == 1 and free[0] is base and isinstance(base, nn.Parameter):
        return [base]
    return [nn.Parameter(f.detach().clone()) for f in free]


def owners(root: nn.Module, module: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Every (module, name) that holds the same parameter, forms or not."""
    wanted = originals(module, name)[0] if has_forms(module, name) else getattr(module, name)
    found = []
    for owner in root.modules():
        if isinstance(owner, parametrize.ParametrizationList):
            continue
        found += [(owner, n) for n, p in owner._parameters.items() if p is wanted]
        found += [(owner, n) for n in _lists(owner) if originals(owner, n)[0] is wanted]
    return found


def _register(module: nn.Module, name: str, stack: Stack, free: list[nn.Parameter]) -> None:
    """Registers a stack over given free parameters, on a class that no copy of the module shares."""
    rest = {n: (_stack(module, n), originals(module, n)) for n in _lists(module) if n != name}
    if _lists(module):
        _plain(module)
    for tensor_name, (held, parameters) in {**rest, name: (stack, free)}.items():
        with torch.no_grad():
            value = held(*parameters)
            held.start = tuple(p.detach().clone() for p in parameters)
        module.register_parameter(tensor_name, nn.Parameter(value.detach().clone()))
        parametrize.register_parametrization(module, tensor_name, held, unsafe=True)
        held.start = ()
        target = _lists(module)[tensor_name]
        names = ["original"] if hasattr(target, "original") else [f"original{i}" for i in range(target.ntensors)]
        for own, parameter in zip(names, parameters, strict=True):
            target._parameters[own] = parameter


def _plain(module: nn.Module) -> None:
    """Takes the forms off, restoring the class on this instance alone: copies share the generated class."""
    values = {n: getattr(module, n).detach().clone() for n in _lists(module)}
    trainable = {n: any(p.requires_grad for p in originals(module, n)) for n in values}
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=trainable[name]))


def bake(model: nn.Module) -> nn.Module:
    """Makes plain tensors of all weights, in place: outputs unchanged, codes left beside the weights, ties kept.

    Forms on activations stay, settled and frozen: they are part of what the network computes.
    """
    settle(model)
    tied: dict[int, nn.Parameter] = {}
    alive: list[list[nn.Parameter]] = []
    for module in list(model.modules()):
        if form_names(module):
            free = {name: originals(module, name) for name in _lists(module)}
            with torch.no_grad():
                codes = {name: _stack(module, name).codes(*held) for name, held in free.items()}
            _plain(module)
            for name, held in free.items():
                # keeping the free parameters in `alive` keeps their identities unique until all owners are plain
                alive.append(held)
                module.register_parameter(name, tied.setdefault(id(held[0]), getattr(module, name)))
                if (found := codes[name]) is not None:
                    declare_codes(module, name, found)
                    if codes_of(module, name) is not None:  # zeros take the sign that the codes give them
                        getattr(module, name).data.copy_(found.decode())
        for at in ACTIVATIONS:
            if f"fw_{at}" in module._modules:
                module.get_submodule(f"fw_{at}").requires_grad_(False)
    return model


def take_off(model: nn.Module, module: nn.Module, name: str) -> None:
    """Takes the forms off one tensor, for every module that owns it: the value stays, a plain parameter."""
    if not has_forms(module, name):
        return
    value = nn.Parameter(getattr(module, name).detach().clone())
    for owner, own in owners(model, module, name):
        rest = {n: (_stack(owner, n), originals(owner, n)) for n in _lists(owner) if n != own}
        _plain(owner)
        owner.register_parameter(own, value)
        for other, (stack, free) in rest.items():
            _register(owner, other, stack, free)


def settle(model: nn.Module) -> None:
    """Puts the settled form in the place of every form on an activation; one that modules share stays shared."""
    done: dict[Form, Form] = {}
    for path, forms in activation_forms(model).items():
        for at, form in forms.items():
            if form not in done:
                done[form] = form.settled()
            model.get_submodule(path)._modules[f"fw_{at}"] = done[form]


def masked_names(model: nn.Module) -> list[tuple[str, str]]:
    """(module path, tensor name) of every tensor that carries a mask."""
    found = []
    for path, module in model.named_modules():
        found += [(path, n) for n in _lists(module) if mask_of(module, n) is not None]
    return found


def mask_zeros(model: nn.Module, names: list[tuple[str, str]]) -> None:
    """Masks the zeros of the named tensors, so that training after a change of shape does not bring them back."""
    for path, name in names:
        try:
            module = model.get_submodule(path)
        except AttributeError:  # the layer was removed or replaced
            continue
        if isinstance(getattr(module, name, None), nn.Parameter):
            attach(module, Mask(getattr(module, name) != 0), at=name, root=model)


# --- activations ------------------------------------------------------------------------------------------------------


def _attach_activation(module: nn.Module, form: Form, at: str) -> None:
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise BadOption(
            f"a {type(module).__name__} would run the form as one of its layers: attach it to a layer inside"
        )
    known = f"fw_{at}" in module._modules
    module.add_module(f"fw_{at}", form)
    if known:
        return
    if at == "input":
        module.register_forward_pre_hook(_on_input)
    elif at == "output":
        module.register_forward_hook(_on_output)
    else:
        module.register_forward_hook(_on_grad)


def take_off_activation(module: nn.Module, at: str) -> None:
    """Takes the form off a module's `input`, `output` or `grad`; nothing happens where there is none."""
    if module._modules.pop(f"fw_{at}", None) is None:
        return
    hook = HOOKS[at]
    held = module._forward_pre_hooks if at == "input" else module._forward_hooks
    for number in [number for number, one in held.items() if one is hook]:
        del held[number]


def activation_form(module: nn.Module, at: str) -> Form | None:
    """The form on a module's `input`, `output` or `grad`, or None."""
    return module._modules.get(f"fw_{at}")  # type: ignore[return-value]


def activation_forms(model: nn.Module) -> dict[str, dict[str, Form]]:
    """The forms on activations: {module path: {"input" | "output" | "grad": form}}."""
    found: dict[str, dict[str, Form]] = {}
    for path, module in model.named_modules():
        forms = {at: form for at in ACTIVATIONS if (form := activation_form(module, at)) is not None}
        if forms:
            found[path] = forms
    return found


# The hooks are functions that look their form up on the module, so that a deep copy finds its own.
def _on_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    value = module._modules["fw_input"](args[0])  # type: ignore[misc]
    if isinstance(value, tuple):  # a form may put something aside for the form on the output of the same call
        value, module.__dict__["_fw_aside"] = value
    return (value, *args[1:])


def _on_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    form, aside = module._modules["fw_output"], module.__dict__.pop("_fw_aside", None)
    return form(output) if aside is None else form(output, aside)  # type: ignore[misc]


def _on_grad(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and output.requires_grad):
        return output
    return _QuantizedGradient.apply(output, module._modules["fw_grad"])


HOOKS: dict[str, Any] = {"input": _on_input, "output": _on_output, "grad": _on_grad}


class _QuantizedGradient(torch.autograd.Function):
    """The identity, whose gradient passes through a form."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, form: Form) -> Tensor:
        ctx.form = form
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.form(grads[0]), None
