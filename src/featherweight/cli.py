"""The command line: one thin command over each public verb. PyTorch is imported only when a command needs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from featherweight.errors import FeatherweightError
from featherweight.recipe_model import NETWORK, Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Makes trained PyTorch networks small and fast, and proves it.",
)

INTERRUPTED = 130  # the exit code of Ctrl-C
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, results only")]


def main() -> None:
    """Runs the command line: errors of ours are one sentence and exit code 2, an interruption is exit code 130."""
    try:
        app(standalone_mode=True)
    except FeatherweightError as error:
        print(f"featherweight: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("featherweight: interrupted; the same command with --resume goes on from here", file=sys.stderr)
        raise


def _flags(command: Callable[..., None], first: str, kind: Any, told: str) -> Callable[..., None]:
    """Gives a command its argument, and a flag for every key of a recipe: same names, meanings and types."""
    parameters = [_parameter(first, kind, typer.Argument(help=told))]
    for key, field in Recipe.model_fields.items():
        name, kind = ("method", list[str]) if key == "chain" else (key, FLAGS.get(key, str))
        told = "id:option=value,option=value; repeat it for a chain" if key == "chain" else str(field.description)
        words = f"--{name.replace('_', '-')}" + (f"/--no-{name}" if kind is bool else "")
        if name != first:
            parameters.append(_parameter(name, kind | None, typer.Option(None, words, help=told, show_default=False)))
    parameters.append(_parameter("quiet", bool, typer.Option(False, "--quiet", "-q", help="no progress, results only")))
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


FLAGS: dict[str, Any] = {"train": int, "batch_size": int, "seed": int, "threads": int, "tracker": list[str]}
FLAGS["teacher_share"] = float
FLAGS |= dict.fromkeys(("strict", "measure", "onnx", "without_class", "resume"), bool)


def _parameter(name: str, kind: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)


def compress(quiet: bool, **flags: Any) -> None:
    """Compress a network with one method or a chain, measure it, write model.fw, model.onnx and the report."""
    _run(None, flags, quiet)


def run(recipe: Path, quiet: bool, **flags: Any) -> None:
    """Carry out a recipe (YAML). Flags stand above its keys."""
    _run(recipe, flags, quiet)


def _run(recipe: Path | None, flags: dict[str, Any], quiet: bool) -> None:
    from featherweight import commands
    from featherweight.core import processes

    result, out = commands.run(recipe, flags, show=not quiet)
    if processes.is_main():
        commands.show_ledger(result.report, out)
    if not result.reached:
        raise FeatherweightError(
            f"the budget was not reached ({'; '.join(result.report['budget']['binds'])}): the nearest result is in "
            f"{out}, add a method to the chain or allow more"
        )


app.command(
    epilog="Example: `featherweight compress lenet5 --data mnist5k --method magnitude_iterative:sparsity=0.9 "
    "--method kmeans_share:weight_bits=4 --until 'size<=0.03x' --guard 'drop<=0.5pt' --out runs/lenet5`"
)(_flags(compress, "model", str, NETWORK))
app.command(epilog="Example: `featherweight run examples/lenet5.yaml`, `featherweight run mine.yaml --seed 1 --out b`")(
    _flags(run, "recipe", Path, "a recipe file; docs/recipes.md says what is in it")
)


@app.command(epilog="Example: `featherweight schema > recipe.schema.json`")
def schema() -> None:
    """Print the JSON schema of recipes, with every method and option, so that an editor completes and checks them."""
    from featherweight import recipe_model

    print(json.dumps(recipe_model.schema(), indent=1))


@app.command(epilog="Example: `featherweight methods tucker2_vbmf`, `featherweight methods --family prune --json`")
def methods(
    id: Annotated[str | None, typer.Argument(help="one id, with all its options")] = None,
    family: Annotated[
        str | None, typer.Option(help="only this family: prune, quantize, factorize, share, distill, code")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """List what there is: methods, their parts, coders and executors, with what each needs and makes smaller."""
    from featherweight import commands

    found = commands.methods(id, family)
    if as_json:
        print(json.dumps(found, indent=1))
    elif id is not None:
        commands.show_method(found[0])
    else:
        commands.show_methods(found)


@app.command(
    epilog="Examples: `featherweight inspect runs/demo/model.fw`; "
    "`featherweight inspect model.fw --json > bytes.json` for everything that the file says, as data"
)
def inspect(
    file: Annotated[Path, typer.Argument(help="a .fw file, full or bare")],
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, the description of the model too")] = False,
) -> None:
    """Show where every byte of a .fw file goes: code, tables, side information, structure; the entropy beside it."""
    from featherweight import coding, commands

    found = coding.inspect(file)
    if as_json:
        print(json.dumps(found, indent=1, default=str))
    else:
        commands.show_file(found)


@app.command(epilog="Example: `featherweight verify runs/demo`")
def verify(
    directory: Annotated[Path, typer.Argument(help="a folder that `compress` wrote")], quiet: Quiet = False
) -> None:
    """Check a result again: checksums, sizes, the metric of the file and of the ONNX model, against report.json."""
    from featherweight import commands

    for line in commands.verify(directory, show=not quiet):
        print(line)


@app.command(
    epilog="Examples: `featherweight report runs/demo` writes runs/demo/report.html; "
    "`featherweight report runs/a runs/b --out both.html` compares two runs"
)
def report(
    run: Annotated[Path, typer.Argument(help="a folder that `compress` wrote")],
    other: Annotated[Path | None, typer.Argument(help="another one, to compare the first with")] = None,
    out: Annotated[
        Path | None, typer.Option(help="the page to write (RUN/report.html; comparison.html for two runs)")
    ] = None,
) -> None:
    """Write the page of a run from its report.json, or one page that shows two runs side by side."""
    from featherweight import commands

    print(commands.report(run, other, out))


@app.command(epilog="Example: `featherweight unpack model.fw --into lenet5 --onnx out.onnx --weights out.safetensors`")
def unpack(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    onnx: Annotated[Path | None, typer.Option(help="write an ONNX model here")] = None,
    weights: Annotated[Path | None, typer.Option(help="write the plain weights here (safetensors)")] = None,
    into: Annotated[str | None, typer.Option(help=f"the network that was compressed: {NETWORK}")] = None,
) -> None:
    """Make plain weights or an ONNX model of a .fw file."""
    from featherweight import commands

    for line in commands.unpack(file, onnx, weights, into):
        print(line)


@app.command(
    epilog="Example: `featherweight export resnet20 --weights w.safetensors --data fashion_mnist --onnx out.onnx`"
)
def export(
    network: Annotated[str, typer.Argument(help=NETWORK)],
    onnx: Annotated[Path, typer.Option(help="the file to write")],
    data: Annotated[str, typer.Option(help="data set, for example inputs")],
    weights: Annotated[Path | None, typer.Option(help="safetensors file or torch state dict")] = None,
) -> None:
    """Write a network as ONNX, checked against PyTorch."""
    from featherweight import commands

    print(commands.export(network, onnx, data, weights))


@app.command(epilog="Example: `featherweight bench runs/demo --threads 1 --batch 1 --batch 64`")
def bench(
    directory: Annotated[Path, typer.Argument(help="a folder that `compress` wrote")],
    threads: Annotated[int, typer.Option(min=1, help="threads of either runtime")] = 1,
    batch: Annotated[list[int], typer.Option(min=1, help="batch size; repeat it for several")] = [1, 64],  # noqa: B006
    seconds: Annotated[float, typer.Option(min=0.1, help="time per pair")] = 5.0,
) -> None:
    """Time the original and the result side by side, in PyTorch and ONNX Runtime."""
    from featherweight import commands

    commands.show_latency(commands.bench(directory, threads=threads, batches=batch, seconds=seconds))


@app.command(epilog="Example: `featherweight accelerate runs/bnn --threads 1 --batch 1`")
def accelerate(
    directory: Annotated[Path, typer.Argument(help="a folder that `compress` wrote")],
    threads: Annotated[int, typer.Option(min=1, help="threads of PyTorch and of packed layers")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="batch size")] = 1,
    keep_slower: Annotated[bool, typer.Option("--keep-slower", help="also layers that are slower when packed")] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="time per layer")] = 0.2,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Execute the layers of a result as they were compressed, and show which are faster so."""
    from featherweight import commands

    found = commands.accelerate(directory, threads=threads, batch=batch, keep_slower=keep_slower, seconds=seconds)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        commands.show_accelerated(found)


if __name__ == "__main__":
    main()
