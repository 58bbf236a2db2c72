"""What a run is told: one definition for `fw.compress`, `fw.run`, recipe files and the flags of the command line.

Nothing heavy is imported here, so that the command line can be built from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from annotated_types import Ge, Lt, MinLen
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from featherweight import budget
from featherweight.allowed import Count, File, told
from featherweight.core.tracking import Name
from featherweight.errors import BadOption, FeatherweightError, unknown

NETWORK = "zoo name (lenet5, resnet:depth=20,width=0.5), file.py:function, package.module:function or a .fw file"
FUNCTION = r"^.+:[A-Za-z_]\w*$"  # of a method: file.py:function or package.module:function
EPHEMERAL = {"out", "resume", "tracker", "tracker_dir"}  # what a result does not depend on


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Step(_Keys):
    """One method of a chain with its options."""

    method: str = Field(description="an id of the catalogue, or a function: file.py:function")
    options: dict[str, Any] = Field({}, description="what differs from the method's defaults")


def _step(given: Any) -> Any:
    if isinstance(given, str):
        return {"method": given}
    return {"method": given[0], "options": given[1]} if isinstance(given, tuple) and len(given) == 2 else given


class Sources(_Keys):
    """Where the network, its data and the methods come from."""

    model: str = Field(description="the network to compress: " + NETWORK)
    weights: File | None = Field(None, description="safetensors file or torch state dict of the network")
    train: Annotated[int, Ge(0)] | None = Field(
        None, description="train the network first for so many epochs (10 for a zoo network without weights)"
    )
    data: str = Field(description="data set (mnist5k, mnist, fashion_mnist) or function that returns a Task")
    batch_size: Count = Field(128, description="of the zoo's data sets")
    student: str | None = Field(None, description="the network that is trained in place of the model, then its teacher")
    student_weights: File | None = Field(None, description="weights file of the student")
    teacher: str | None = Field(
        None,
        description="the network that teaches, in methods that ask for one and beside all other training: original "
        "(the model as it was), or a word as for model",
    )
    teacher_weights: File | None = Field(None, description="weights file of the teacher")
    chain: Annotated[list[Annotated[Step, BeforeValidator(_step)]], MinLen(1)] = Field(
        description="the methods in order, each an id or a mapping with method and options; kd where a student is named"
    )


class Settings(_Keys):
    """How the chain runs: the keyword arguments of `fw.compress`."""

    until: str | None = Field(None, description="stop when this holds: size<=0.1x, latency<=5ms, macs<=2M")
    guard: str | None = Field(None, description="roll a method back that breaks this: drop<=0.5pt")
    strict: bool = Field(False, description="the guard must hold at the upper end of the 95 % interval")
    seed: Annotated[int, Ge(0), Lt(1 << 32)] = Field(0, description="of every random choice")
    teacher_share: Annotated[float, Ge(0), Lt(1)] | None = Field(
        None,
        description="share of the teacher in the loss of every training that has none of its own (0.9 where a teacher "
        "is named, otherwise 0)",
    )
    threads: Count | None = Field(None, description="threads of PyTorch; the bytes of a result depend on it")
    measure: bool = Field(True, description="count cost and bytes and time latency; otherwise only the metric")
    onnx: bool = Field(True, description="write and check the ONNX file")
    without_class: bool = Field(
        False, description="compress the network's graph in place of its class, whose code may not follow a removal"
    )
    out: File | None = Field(None, description="folder for model.fw, model.onnx, report.json and the checkpoints")
    resume: bool = Field(False, description="go on from the last finished method of this run")
    tracker: Name | Annotated[list[Name], MinLen(1)] | None = Field(
        None, description="log losses and figures with: tensorboard, wandb, mlflow, ..."
    )
    tracker_dir: File | None = Field(
        None, description="folder of trackers that write files; out/tracking when left out"
    )


class Recipe(Settings, Sources):
    """A run as data: what is read from a file, given to `fw.run`, or collected from the command line."""

    def dump(self, without: Iterable[str] = ()) -> dict[str, Any]:
        """What the result depends on, as plain data; defaults are left out."""
        return self.model_dump(exclude_defaults=True, exclude=EPHEMERAL | {*without})


def check_settings(given: Mapping[str, Any]) -> None:
    """Refuses a setting of the wrong type or outside its range.

    Raises:
        FeatherweightError: the first that is wrong, its `place` set.
    """
    for problem in problems(Settings, given):
        raise problem


def problems(kind: type[BaseModel], given: Mapping[str, Any]) -> Iterator[FeatherweightError]:
    """Everything that is wrong with the keys and values, each as an error with its `place`."""
    try:
        kind.model_validate(dict(given))
    except ValidationError as error:
        found: dict[tuple[str | int, ...], FeatherweightError] = {}
        for detail in error.errors():
            place = _place(detail["loc"])
            found.setdefault(place, _problem(kind, place, detail))
        for place, problem in found.items():
            problem.place = place
            yield problem
    for name in ("until", "guard"):
        if isinstance(text := given.get(name), str):
            try:
                budget.parse(text)
            except FeatherweightError as error:
                error.place = (name,)
                yield error


def _place(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Where in a recipe: without the alternatives of a union, which pydantic names too."""
    return loc[: 3 if loc[0] == "chain" else 1]


def _problem(kind: type[BaseModel], place: tuple[str | int, ...], detail: Any) -> FeatherweightError:
    inside = Step if len(place) == 3 else kind
    name, value = place[-1], detail["input"]
    if detail["type"] == "extra_forbidden":
        return unknown("key of a step" if inside is Step else "key of a recipe", str(name), inside.model_fields)
    if len(place) == 2:
        return BadOption(f"{_short(value)} is no step of a chain: give the id of a method, or method: and options:")
    if detail["type"] == "missing":
        return BadOption(f"{name} is missing: {inside.model_fields[str(name)].description}")
    found = inside.model_json_schema()["properties"][name]
    if isinstance(value, str) and name == "tracker":
        return unknown("tracker", value, [word for one in found["anyOf"] for word in one.get("enum", ())])
    wanted = "a list of methods" if name == "chain" else "a mapping" if name == "options" else told(found)
    return BadOption(f"{name}={_short(value)}: must be {wanted}")


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 80 else text[:77] + "..."


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, every method with its options, from the catalogue."""
    from featherweight import catalogue

    found = _untitled(Recipe.model_json_schema())
    del found["$defs"]
    entries = [*catalogue.entries("method").values(), *catalogue.entries("verb").values()]
    names = [name for entry in entries for name in (entry.id, *entry.aliases)]
    steps: list[dict[str, Any]] = [{"enum": names, "description": "a method with its defaults"}]
    steps += [_method(entry) for entry in entries]
    own = {"type": "string", "pattern": FUNCTION, "description": "file.py:function or package.module:function"}
    steps += [{"anyOf": [own, _object({"method": own, "options": {"type": "object"}}, ["method"], "a function")]}]
    found["properties"]["chain"]["items"] = {"oneOf": steps}
    found["required"].remove("chain")
    found["anyOf"] = [{"required": ["chain"]}, {"required": ["student"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A featherweight recipe", **found}


def _method(entry: Any) -> dict[str, Any]:
    """A step of one method."""
    options = {option.name: option.schema() for option in entry.options()}
    names = [entry.id, *entry.aliases]
    method = {"const": entry.id} if len(names) == 1 else {"enum": names}
    inner = _object(options, [], "what differs from the defaults")
    return _object({"method": {**method, "description": entry.paper}, "options": inner}, ["method"], entry.doc)


def _object(properties: dict[str, Any], required: list[str], description: str) -> dict[str, Any]:
    made = {"type": "object", "description": description, "properties": properties, "additionalProperties": False}
    return {**made, "required": required} if required else made


def _untitled(found: Any) -> Any:
    """A schema without the titles that only repeat the names."""
    if isinstance(found, list):
        return [_untitled(one) for one in found]
    if not isinstance(found, dict):
        return found
    return {key: _untitled(one) for key, one in found.items() if key != "title"}
