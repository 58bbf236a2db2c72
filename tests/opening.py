"""Opens a .fw file in every way there is and says what came of it: a sound model, or one sentence of ours."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from featherweight.coding import inspect, load, save, unpack, unpack_codes, unpack_tensor
from featherweight.coding.restoring import slots
from featherweight.coding.unpacking import allowance
from featherweight.errors import FeatherweightError

LONGEST = 1500  # characters of a sentence
SECONDS = 3.0
BYTES = 500 << 20
VAGUE = "what it describes fits no model"


@dataclass
class Outcome:
    """What came of one file: `answers` are (way, "ok" or the class of the error, sentence)."""

    answers: list[tuple[str, str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of the slowest way
    grown: int = 0

    @property
    def loaded(self) -> bool:
        return any(way == "into" and kind == "ok" for way, kind, _ in self.answers)


def status(key: str) -> int:
    """A figure of this process, in bytes: VmRSS now, VmHWM at its highest since `forget_peak`."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) << 10 if found else 0


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def opened(path: Path, fresh: Callable[[], nn.Module] | None, baseline: int | None = None) -> Outcome:
    """Opens a file in every way; judges time (of the processor, so that a busy machine does not count) and memory.

    Args:
        baseline: the memory of the process, in bytes, above which growth counts; what it has now unless said.
    """
    outcome = Outcome()
    told = fresh() if fresh is not None else None  # what tells the shapes of a compact file
    size = path.stat().st_size
    forget_peak()
    before = status("VmRSS") if baseline is None else baseline
    ways: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        "unpack": (lambda: unpack(path, into=told), lambda found: _bounded(found.values(), size, told)),
        "codes": (lambda: unpack_codes(path, into=told), _nothing),
        "inspect": (lambda: inspect(path, into=told), _nothing),
        "alone": (lambda: load(path), lambda model: _sound(model, path, told)),
    }
    if fresh is not None:
        model = fresh()
        ways["into"] = (lambda: load(path, into=model), lambda model: _sound(model, path, told))
    for way, (call, check) in ways.items():
        _answer(outcome, way, call, check)
    outcome.grown = status("VmHWM") - before
    if outcome.seconds > SECONDS:
        outcome.wrong.append(f"took {outcome.seconds:.1f} s")
    if outcome.grown > BYTES:
        outcome.wrong.append(f"grew by {outcome.grown >> 20} MB")
    return outcome


def opened_tensor(data: bytes) -> Outcome:
    """The same for the bytes of one tensor."""
    outcome = Outcome()
    _answer(outcome, "tensor", lambda: unpack_tensor(data), lambda tensor: _bounded([tensor], len(data)))
    return outcome


def _least(call: Callable[[], Any], took: float) -> float:
    """The least of three tries where the first was slow: what is compiled or imported once is not the file's."""
    for _ in range(2 if took > SECONDS else 0):
        start = time.process_time()
        with suppress(FeatherweightError):
            call()
        took = min(took, time.process_time() - start)
    return took


def _nothing(found: Any) -> None:
    """All that there is to check of what was only looked at."""


def _answer(outcome: Outcome, way: str, call: Callable[[], Any], check: Callable[[Any], None]) -> None:
    start = time.process_time()
    try:
        found = call()
        outcome.seconds = max(outcome.seconds, _least(call, time.process_time() - start))
        check(found)
    except FeatherweightError as error:
        outcome.seconds = max(outcome.seconds, _least(call, time.process_time() - start))
        sentence = str(error)
        outcome.answers.append((way, type(error).__name__, sentence))
        if len(sentence) > LONGEST or not sentence.isprintable():
            outcome.wrong.append(f"{way}: a sentence of {len(sentence)} characters: {sentence[:200]!r}")
        if error.__cause__ is not None or VAGUE in sentence:
            outcome.wrong.append(f"{way}: vague about {_place(error.__cause__ or error)}")
    except BaseException as error:  # panics of compiled coders are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        outcome.wrong.append(f"{way}: {_place(error)}")
        outcome.answers.append((way, type(error).__name__, str(error)))
    else:
        outcome.answers.append((way, "ok", ""))


def _place(error: BaseException) -> str:
    """The error and the last two lines of ours that it passed."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "featherweight" in name or "opening" in name:
            lines.append(f"{Path(name).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__} at {' '.join(lines[-2:])}: {str(error)[:150]}"


class Unsound(Exception):
    """A model came back that the file does not describe, or that is no model."""


def _bounded(tensors: Any, size: int, told: nn.Module | None = None) -> None:
    size += 0 if told is None else sum(place.tensor.numel() for place in slots(told)) // 16
    taken = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
    if taken > allowance(size):
        raise Unsound(f"{taken} bytes of tensors from a file of {size} bytes")


def _sound(model: nn.Module, path: Path, told: nn.Module | None) -> None:
    """Shapes and types as the file says, nothing left without memory, and it can be saved and read again."""
    rows = {(tuple(row["shape"]), row["dtype"]) for row in inspect(path, into=told, limit=1 << 40)["tensors"]}
    places = slots(model)
    for place in places:
        found = tuple(place.tensor.shape), str(place.tensor.dtype).removeprefix("torch.")
        if place.tensor.is_meta or found not in rows:
            raise Unsound(f"{place.name} is {found}, which no tensor of the file is")
    _bounded([place.tensor for place in places], path.stat().st_size + sum(p.tensor.numel() for p in places) // 256)
    if not isinstance(model.state_dict(), dict) or any(not isinstance(m, nn.Module) for m in model.modules()):
        raise Unsound("the model has no state")
    again = path.with_suffix(".again")
    try:
        save(model, again)
    except FeatherweightError:  # weights that are not finite: they may be read, and are not written
        return
    if not {place.name for place in places} <= unpack(again, limit=1 << 40).keys():
        raise Unsound("the model does not come back under its names")
