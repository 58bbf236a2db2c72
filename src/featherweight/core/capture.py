"""One layer's inputs and outputs, streamed batch by batch: nothing is kept that the caller does not keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from featherweight.core.progress import track
from featherweight.core.surgery import taps
from featherweight.core.task import Batch, Task, as_call, device_of, eval_mode, length, run, to_device

UNCALLED = "its weight is used without a call of the layer"


def called(model: nn.Module, example_inputs: Any) -> list[nn.Module]:
    """The modules that a pass through the model in evaluation mode calls, in the order in which they first return.

    With gradients, without which torch's attention takes another way.
    """
    seen: dict[nn.Module, None] = {}
    handles = [m.register_forward_hook(lambda module, *_: seen.setdefault(module)) for m in model.modules()]
    modes = {module: module.training for module in model.modules()}
    args, kwargs = to_device(as_call(example_inputs), device_of(model))
    try:
        model.eval()(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return list(seen)


class _Reached(Exception):
    pass


def layer_io(
    model: nn.Module, path: str, task: Task, batches: Iterable[Batch], *, original: nn.Module | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (input, output) of the layer at `path`, one pair a batch, without running what comes after it.

    With `original` the pair is asymmetric: inputs behind the compressed prefix of `model`, outputs of the original
    network (so that a layer-wise reconstruction also repairs the error of the layers before it).
    """
    for batch in batches:
        seen, output = _call(model, path, task, batch)
        if original is not None:
            _, output = _call(original, path, task, batch)
        yield seen, output


def _call(model: nn.Module, path: str, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.extend([args[0], output])
        raise _Reached

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        with eval_mode(model):
            run(model, task, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0].detach(), found[1].detach()


def observe(
    model: nn.Module,
    paths: list[str],
    task: Task,
    batches: Iterable[Batch],
    see: Callable[[str, Tensor], None],
    *,
    at: str = "input",
    label: str = "calibrate",
) -> int:
    """Shows `see(path, tensor)` the inputs (or outputs) of many layers in one pass; returns the number of batches."""
    count = 0
    with eval_mode(model), taps(model, paths, at) as seen:
        for batch in track(batches, label, length(batches)):
            seen.clear()
            run(model, task, batch)
            for path, value in seen.items():
                see(path, value)
            count += 1
    return count
