"""Recipes: one definition for Python, YAML, the flags and the schema; errors with their lines; the same bytes again."""

import difflib
import inspect
import itertools
import json
import random
import time
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

import featherweight as fw
from conftest import small_mlp, small_task
from featherweight import catalogue, pipeline, recipe_text
from featherweight.cli import app
from featherweight.core.fit import OPTIMIZERS, Optimizers
from featherweight.errors import BadData, BadOption, BadRecipe, FeatherweightError, UnknownName
from featherweight.recipe_model import Recipe, Settings
from featherweight.running import load

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))
MASKS = {"method": "magnitude_iterative", "options": {"sparsity": 0.8, "rounds": 1, "epochs": 0, "finetune": 0}}
OWN = f"{Path(__file__).parent / 'conftest.py'}:"
TINY = {"model": OWN + "small_mlp", "data": OWN + "small_task", "train": 1, "measure": False, "onnx": False}


def loaded(folder: Path, text: str) -> Recipe:
    (folder / "r.yaml").write_text(text)
    return load(folder / "r.yaml", {})[0]


def problems(folder: Path, text: str) -> list[str]:
    """What is said of a recipe, a line each."""
    with pytest.raises(FeatherweightError) as caught:
        loaded(folder, text)
    first, *rest = str(caught.value).split("\n")
    return [line.strip() for line in rest] or [first]


# --- one definition ---------------------------------------------------------------------------------------------------


def test_the_settings_of_a_recipe_are_the_arguments_of_compress():
    """Same names, same defaults; what only Python can hand over is not in a recipe."""
    parameters = inspect.signature(fw.compress).parameters
    keywords = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keywords.keys() - {"student", "show"} == Settings.model_fields.keys()
    for name, field in Settings.model_fields.items():
        assert field.default == keywords[name], name


def test_every_key_is_a_flag():
    shown = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for key in Recipe.model_fields:
        assert f"--{'method' if key == 'chain' else key.replace('_', '-')}" in shown, key


def test_names_of_optimizers_are_those_of_the_loop():
    assert get_args(get_args(Optimizers)[0]) == tuple(OPTIMIZERS)


# --- errors have lines ------------------------------------------------------------------------------------------------

HEAD = "model: lenet5\ndata: mnist5k\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            HEAD + "chain:\n  - int8\n  - method: magnitude_iterative\n    options:\n      sparsty: 0.9\n",
            "line 7, column 7, chain[1].options.sparsty: unknown option of magnitude_iterative 'sparsty': did you mean "
            "'sparsity'?",
        ),
        (
            HEAD + "chain: [{method: magnitude_iterative, options: {sparsity: 1.5}}]\n",
            "line 3, column 49, chain[0].options.sparsity: sparsity=1.5: must be a fraction in [0, 1), or a mapping "
            "with a fraction in [0, 1) for each layer pattern",
        ),
        (
            HEAD + "chain:\n  - method: kmeans_share\n    options: {weight_bits: {fc1: 44}}\n",
            "line 5, column 29, chain[0].options.weight_bits.fc1: weight_bits['fc1']=44: must be a whole number from 1 "
            "to 16",
        ),
        (
            HEAD + "chain:\n  - kmeans_shar\n",
            "line 4, column 5, chain[0].method: unknown method 'kmeans_shar': did you mean 'kmeans_share'",
        ),
        (
            HEAD + "chain:\n  - {method: kd, opts: {}}\n",
            "line 4, column 18, chain[0].opts: unknown key of a step 'opts': did you mean 'options'?",
        ),
        (
            HEAD + "chain: [int8]\nuntill: size<=0.1x\n",
            "line 4, column 1, untill: unknown key of a recipe 'untill': did you mean 'until'?",
        ),
        (HEAD + "chain: [int8]\nseed: one\n", "line 4, column 1, seed: seed='one': must be a whole number"),
        (HEAD + "chain: [int8]\nstrict: yes\n", "strict: strict='yes': must be true or false"),
        (HEAD + "chain: [int8]\nguard: drop<1\n", "line 4, column 1, guard: 'drop<1' is no budget: expected"),
        (HEAD + "chain: [int8]\nthreads: 0\n", "threads: threads=0: must be a whole number of at least 1"),
        (HEAD + "chain: [int8]\ntracker: tensorbord\n", "tracker: unknown tracker 'tensorbord': did you mean"),
        (HEAD + "chain: [[int8]]\n", "line 3, column 9, chain[0]: ['int8'] is no step of a chain"),
        (HEAD + "chain: []\n", "chain: chain=[]: must be a list of methods"),
        ("data: mnist5k\nchain: [int8]\n", "model: model is missing: the network to compress"),
        (
            HEAD + "chain: [int8]\nseed: 1\nseed: 2\n",
            "line 5, column 1, seed: seed stands here a second time, first in",
        ),
        (HEAD + "chain: [int8\nout: x\n", "line 4, column 4: this is no YAML: while parsing a flow sequence, expected"),
        (HEAD + "\tchain: [int8]\n", "line 3, column 1: this is no YAML"),
        (
            HEAD + "chain: !!python/object/apply:os.system [ls]\n",
            "chain: the tag !!python/object/apply:os.system is not",
        ),
        (HEAD + "chain: [int8]\nseed: !!int '3x'\n", "line 4, column 7, seed: '3x' is no number that can be read"),
        (HEAD + "chain: *nowhere\n", "found undefined alias 'nowhere'"),
        ("- int8\n", "holds a list: a recipe is a mapping with model:, data: and chain:"),
        ("", "holds nothing: a recipe is a mapping"),
        ("a: \x00", "this is no YAML"),
        (HEAD + "---\nchain: [int8]\n", "expected a single document in the stream"),
        (HEAD + "? [a]\n: 1\n", "a key must be a word"),
        (HEAD + "seed: " + "9" * 5000, "is no number that can be read"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path, text, said):
    (told,) = problems(tmp_path, text)
    assert told.startswith("r.yaml")
    assert said in told


def test_everything_that_is_wrong_is_told_at_once_in_the_order_of_the_lines(tmp_path):
    text = HEAD + "chain:\n  - method: kd\n    options: {alpha: 2, epochs: -1}\n  - int9\nsed: 1\n"
    told = problems(tmp_path, text)
    assert [line.split(", ")[1] for line in told] == ["line 5", "line 5", "line 6", "line 7"]
    assert "alpha=2: must be a fraction in [0, 1]" in told[0]


def test_sources_and_layers_are_told_with_their_lines(tmp_path):
    path = tmp_path / "r.yaml"
    for key, value, error, said in (
        ("model", "lenet6", UnknownName, "line 1, column 1, model: unknown network 'lenet6'"),
        ("data", "mnist6k", UnknownName, "line 2, column 1, data: unknown data set 'mnist6k'"),
        ("weights", "absent.safetensors", BadData, "line 3, column 1, weights: there is no weights file"),
        ("where", "fc9", UnknownName, "line 4, column 46, chain[0].options.where: unknown layer pattern 'fc9'"),
    ):
        words = {"model": "lenet5", "data": "mnist5k:limit=64", "weights": "null", "where": '"*"', key: value}
        lines = [f"{name}: {words[name]}" for name in ("model", "data", "weights")]
        lines += [
            f"chain: [{{method: kmeans_share, options: {{    where: {words['where']}}}}}]",
            f"out: {tmp_path}/out",
        ]
        path.write_text("\n".join(lines))
        with pytest.raises(error) as caught:
            fw.run(path)
        assert str(caught.value).startswith(f"r.yaml, {said}")
    assert not (tmp_path / "out").exists()


def test_flags_are_told_without_a_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(HEAD + "chain: [int8]\nseed: 3\n")
    with pytest.raises(BadOption) as caught:
        fw.run(path, seed="x")
    assert str(caught.value) == "seed='x': must be a whole number of at least 0"


# --- hostile and unusual texts ----------------------------------------------------------------------------------------


def test_a_text_that_unfolds_without_end_is_refused_quickly(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join(['*' + a] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    started = time.perf_counter()
    (told,) = problems(tmp_path, "\n".join(lines))
    assert "unfolds to more than 10,000 values" in told
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", "nested too deeply"),
        ("a: " + "[" * 40 + "]" * 40, "nested too deeply"),
        ("a: " + "[" * 40_000, "nested too deeply"),
        ("a: " + "x" * 200_000, "longer than 100,000 characters"),
    ],
)
def test_texts_that_are_too_deep_or_too_long(tmp_path, text, said):
    assert said in problems(tmp_path, text)[0]


def test_whatever_a_text_holds_it_is_read_or_refused_in_our_words(tmp_path):
    """Characters of the examples deleted, doubled and exchanged for others: a recipe, or an error with its place."""
    chance, refused = random.Random(0), 0
    for path in EXAMPLES:
        text = path.read_text()
        for _ in range(150):
            letters = list(text)
            for _ in range(chance.randint(1, 4)):
                at = chance.randrange(len(letters))
                letters[at] = chance.choice(["", letters[at] * 2, *"\n\t :-[]{}&*!'\"#,<|>%@\0é0", "- ", ": "])
            try:
                loaded(tmp_path, "".join(letters))
            except FeatherweightError:
                refused += 1
    assert 50 < refused < 300


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b"model: \xe9")
    for name, said in (("absent.yaml", "No such file"), ("", "directory"), ("latin", "not UTF-8")):
        with pytest.raises(BadRecipe, match=said):
            fw.run(tmp_path / name)


def test_anchors_merge_keys_and_numbers_as_people_write_them(tmp_path):
    text = HEAD + (
        "chain:\n"
        "  - method: magnitude_iterative\n"
        "    options: &once {sparsity: {0: 0.5, 'conv*': .25}, lr: 1e-4, epochs: 0}\n"
        "  - {method: magnitude_iterative, options: {<<: *once, epochs: 0x2, rounds: 012}}\n"
    )
    first, second = loaded(tmp_path, text).chain
    assert first.options == {"sparsity": {"0": 0.5, "conv*": 0.25}, "lr": 1e-4, "epochs": 0}
    assert second.options == {**first.options, "epochs": 2, "rounds": 12}


def test_what_is_written_reads_back_the_same():
    data = {"words": ["1e-4", "yes", "null", "0x1f", "3", "", "~", "<<", "a: b", "é", "*x", "2024-01-01", "1:30"]}
    data |= {"numbers": [1e-5, 1e300, 0.1, -3, 10**20, True, False, None], "deep": {"a": [{"b": (1, 2)}]}}
    again, _ = recipe_text.parse(recipe_text.dump(data))
    assert again == recipe_text.plain(data)
    assert [type(x) for x in again["numbers"]] == [type(x) for x in data["numbers"]]


# --- the schema -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    found = json.loads(CliRunner().invoke(app, ["schema"]).output)
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def test_the_schema_that_editors_are_given_is_this_one(validator):
    given = Path(__file__).parent.parent / "docs" / "recipe.schema.json"
    both = (json.loads(given.read_text()), validator.schema)
    old, new = (json.dumps(one, indent=1, sort_keys=True).splitlines() for one in both)
    assert not list(itertools.islice(difflib.unified_diff(old, new, lineterm="", n=1), 30)), "run `make docs`"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_the_schema_takes_the_examples(validator, path):
    validator.validate(recipe_text.read(path)[0])


def test_the_schema_has_every_method_with_every_option(validator):
    steps = validator.schema["properties"]["chain"]["items"]["oneOf"]
    for entry in catalogue.entries("method").values():
        named = [(s, s.get("properties", {}).get("method", {})) for s in steps]
        (made,) = [s for s, m in named if m.get("const") == entry.id or entry.id in m.get("enum", ())]
        options = made["properties"]["options"]["properties"]
        assert list(options) == [option.name for option in entry.options()]
        assert all(option["description"] for option in options.values())
        assert {name: o["default"] for name, o in options.items()} == {
            o.name: catalogue.plain(o.default) for o in entry.options()
        }
        validator.validate({"model": "m", "data": "d", "chain": [{"method": entry.id, "options": dict(entry.small)}]})
    assert steps[2]["properties"]["options"]["properties"] != {}


WRONG = {
    ("seed",): {"seed": "x"},
    ("threads",): {"threads": 0},
    ("untill",): {"untill": "size<=1MB"},
    ("tracker",): {"tracker": "tensorbord"},
    ("strict",): {"strict": "yes"},
    ("chain",): {"chain": []},
    ("chain", 0): {"chain": [3]},
    ("chain", 0, "method"): {"chain": [{"method": "int9"}]},
    ("chain", 0, "opts"): {"chain": [{"method": "int8", "opts": {}}]},
    ("chain", 1, "options", "calibrator"): {"chain": ["int8", {"method": "int8", "options": {"calibrator": "max"}}]},
    ("chain", 0, "options", "alpha"): {"chain": [{"method": "kd", "options": {"alpha": 1.5}}]},
    ("chain", 0, "options", "alfa"): {"chain": [{"method": "kd", "options": {"alfa": 0.5}}]},
    ("chain", 0, "options", "rank"): {"chain": [{"method": "tucker2_vbmf", "options": {"rank": [1, 2, 3]}}]},
    ("chain", 0, "options", "sparsity", "fc1"): {
        "chain": [{"method": "magnitude_iterative", "options": {"sparsity": {"fc1": 1}}}]
    },
}


def leaves(error: jsonschema.ValidationError) -> list[jsonschema.ValidationError]:
    return [leaf for inner in error.context for leaf in leaves(inner)] if error.context else [error]


@pytest.mark.parametrize(
    ("place", "given"), WRONG.items(), ids=lambda v: recipe_text.written(v) if type(v) is tuple else ""
)
def test_the_schema_refuses_where_we_do(validator, place, given):
    """A key that is not there is refused, in a schema, at the mapping that it stands in."""
    data = {"model": "lenet5", "data": "mnist5k", "chain": ["int8"], **given}
    with pytest.raises(FeatherweightError) as caught:
        load(data, {})
    assert caught.value.place == place
    refused = [tuple(leaf.absolute_path) for error in validator.iter_errors(data) for leaf in leaves(error)]
    assert place in refused or place[:-1] in refused


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_the_examples_run(path, tmp_path):
    """As they are but for less data and fewer epochs."""
    data, _ = recipe_text.read(path)
    steps = [step if isinstance(step, dict) else {"method": step} for step in data["chain"]]
    for step in steps:
        step["options"] = {k: 0.5 if k == "epochs" else v for k, v in step.get("options", {}).items()}
    shorter = {
        "data": "mnist5k:limit=128",
        "train": 1,
        "chain": steps,
        "measure": False,
        "onnx": False,
        "out": tmp_path,
    }
    result = fw.run({**data, **shorter})
    assert [stage["method"] for stage in result.report["stages"]] == [step["method"] for step in steps]
    assert (tmp_path / "model.fw").stat().st_size == result.report["result"]["bytes"]


def test_the_recipe_of_a_report_gives_the_same_bytes(tmp_path):
    chain = [MASKS, {"method": "kmeans_share", "options": {"weight_bits": {"*": 3}, "epochs": 0.5, "lr": 1e-4}}]
    fw.run({**TINY, "chain": chain, "seed": 5, "guard": "drop<=90pt"}, out=tmp_path / "a")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    (tmp_path / "again.yaml").write_text(recipe_text.dump(report["reproduce"]["recipe"]))
    again = fw.run(tmp_path / "again.yaml", out=tmp_path / "b")
    for name in ("model.fw", "original.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert again.report["reproduce"] == report["reproduce"]
    other = fw.run(tmp_path / "again.yaml", out=tmp_path / "c", seed=6)
    assert (tmp_path / "a" / "model.fw").read_bytes() != (tmp_path / "c" / "model.fw").read_bytes()
    assert other.report["seed"] == 6


def test_the_recipe_of_a_run_from_python_gives_the_same_bytes(tmp_path):
    model, task = small_mlp(), small_task()
    chain = [("magnitude_iterative", {**MASKS["options"], "where": ("1", "3")}), ("kmeans_share", {"epochs": 1})]
    result = fw.compress(model, task, chain, seed=2, measure=False, onnx=False, out=tmp_path / "a")
    assert result.report["reproduce"]["needs"] == ["model", "task"]
    (tmp_path / "r.yaml").write_text(result.recipe)
    fw.run(tmp_path / "r.yaml", model=model, task=task, out=tmp_path / "b")
    assert (tmp_path / "a" / "model.fw").read_bytes() == (tmp_path / "b" / "model.fw").read_bytes()


def test_what_only_python_can_say_has_no_recipe():
    def mine(model, task):
        return fw.fit(model, task, epochs=1)

    result = fw.compress(small_mlp(), small_task(), mine, measure=False, onnx=False)
    assert result.report["reproduce"]["recipe"] is None
    with pytest.raises(BadRecipe, match="only Python can say mine"):
        _ = result.recipe


def test_functions_of_the_users_own_stand_in_recipes(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\nfrom conftest import small_mlp, small_task\n"
        "def halve(model, task, *, by=2.0):\n"
        "    with torch.no_grad():\n        model[1].weight.div_(by)\n    return model\n"
    )
    own = tmp_path / "own.py"
    words = {"model": f"{own}:small_mlp", "data": f"{own}:small_task", "measure": False, "onnx": False}
    result = fw.run({**words, "chain": [{"method": f"{own}:halve", "options": {"by": 4.0}}]})
    assert result.report["stages"][0]["method"] == "halve"
    with pytest.raises(UnknownName, match="unknown option of halve 'bye': did you mean 'by'"):
        fw.run({**words, "chain": [{"method": f"{own}:halve", "options": {"bye": 4.0}}]})
    with pytest.raises(UnknownName, match="has no function 'halves'"):
        fw.run({**words, "chain": [f"{own}:halves"]})


def test_a_student_and_a_teacher_by_name(tmp_path):
    words = {**TINY, "data": "mnist5k:limit=64", "teacher": "lenet5", "student": "lenet300"}
    result = fw.run(
        {**words, "model": "lenet5", "train": 0, "chain": [{"method": "kd", "options": {"epochs": 1}}]}, out=tmp_path
    )
    assert type(result.model).__name__ == type(fw.zoo.build("lenet300")).__name__
    assert result.report["reproduce"]["recipe"]["teacher"] == "lenet5"


def test_what_is_looked_at_before_the_training_does_not_change_it(tmp_path):
    alone = {**TINY, "chain": [MASKS]}
    fw.run(alone, out=tmp_path / "a")
    fw.run({**alone, "chain": [MASKS, "int8"], "student": TINY["model"]}, out=tmp_path / "b")
    assert len({(tmp_path / name / "original.safetensors").read_bytes() for name in "ab"}) == 1


def test_a_file_is_a_network(tmp_path):
    """What was compressed is compressed further, from the file alone."""
    first = fw.run({**TINY, "chain": [MASKS]}, out=tmp_path / "a")
    again = {**TINY, "model": str(tmp_path / "a" / "model.fw"), "train": None, "chain": ["int8"]}
    second = fw.run(again, out=tmp_path / "b")
    assert second.report["original"]["metric"] == first.report["result"]["metric"]
    assert fw.load(tmp_path / "b" / "model.fw")


def test_weights_and_training_are_for_networks_that_are_named():
    with pytest.raises(BadOption, match="the model was given as a module"):
        fw.run({"chain": ["int8"], "weights": "w.safetensors"}, model=small_mlp(), task=small_task())


def test_the_command_line(tmp_path):
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(recipe_text.dump({**TINY, "chain": [MASKS], "seed": 4}))
    for words in (
        ["run", str(path), "--seed", "7", "--out", str(out), "-q"],
        ["verify", str(out), "-q"],
        ["compress", TINY["model"], *_flags(tmp_path / "b"), "--seed", "7", "-q"],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    assert (report["seed"], report["reproduce"]["recipe"]["seed"]) == (7, 7)
    assert (out / "model.fw").read_bytes() == (tmp_path / "b" / "model.fw").read_bytes()


def _flags(out: Path) -> list[str]:
    options = ",".join(f"{key}={value}" for key, value in MASKS["options"].items())
    words = ["--data", TINY["data"], "--train", "1", "--no-measure", "--no-onnx", "--out", str(out)]
    return [*words, "--method", f"magnitude_iterative:{options}"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "absent.yaml"], "the recipe absent.yaml cannot be read"),
        (["compress", "lenet5", "--method", "int8", "--out", "x"], "data is missing"),
        (["compress", "lenet5", "--data", "mnist5k", "--out", "x"], "chain is missing"),
        (["compress", "lenet5", "--data", "mnist5k", "--method", "int8"], "out is missing: pass --out"),
        (["compress", "lenet5", "--data", "mnist5k", "--method", "int9", "--out", "x"], "did you mean 'int8'"),
    ],
)
def test_bad_commands(words, said):
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, FeatherweightError)
    assert said in str(result.exception)


# --- the whole chain is checked before any stage ----------------------------------------------------------------------


def _untouched(model, task, *, calls):
    calls.append(1)
    return model


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"weight_bits": 40}, BadOption, r"weight_bits=40: must be a whole number from 1 to 16, or a mapping"),
        ({"weight_bits": {"1": 2.5}}, BadOption, r"weight_bits\['1'\]=2.5: must be a whole number"),
        ({"weight_bits": {"9": 2}}, UnknownName, "unknown layer pattern '9'"),
        ({"weight_bits": {"1": 2}, "where": "1"}, BadOption, "names its layers itself"),
        ({"where": "re:("}, BadOption, "is no regular expression"),
        ({"where": 3}, BadOption, "where=3: must be text, or a list"),
        ({"lr": 0}, BadOption, "lr=0: must be a finite number above 0"),
        ({"lr": float("inf")}, BadOption, "lr=inf"),
        ({"epochs": True}, BadOption, "epochs=True: must be a finite number of at least 0"),
        ({"start": "dense"}, UnknownName, "unknown start 'dense': did you mean 'density'"),
        ({"optimizer": "adamm"}, UnknownName, "unknown optimizer 'adamm'"),
    ],
)
def test_a_bad_second_method_is_refused_before_the_first_starts(options, error, said):
    def fails(*args, **given):
        raise AssertionError("it started")

    task = small_task(fit=fails, evaluate=fails)
    with pytest.raises(error, match=said) as caught:
        fw.compress(small_mlp(), task, [("magnitude_iterative", {}), ("kmeans_share", options)])
    assert caught.value.place[:3] == ("chain", 1, "options")


def test_options_that_do_not_go_together_are_refused_before_any_work():
    for options, said in (
        ({"start": 0.95}, "start=0.95 is above sparsity=0.9"),
        ({"sparsity": {"1": 0.5}, "scope": "global"}, "leave scope out"),
    ):
        with pytest.raises(BadOption, match=said):
            pipeline.check(small_mlp(), small_task(), "magnitude_iterative", **options)


@pytest.mark.parametrize(("option", "whose"), [("hint", "teacher"), ("guided", "student")])
def test_layers_of_teacher_and_student_are_looked_up_before_any_work(option, whose):
    with pytest.raises(UnknownName, match=f"unknown layer of the {whose} '9'"):
        pipeline.check(small_mlp(), small_task(), "fitnets", **{option: "9"})


def test_layers_behind_a_method_that_changes_them_are_looked_up_when_their_method_starts():
    chain = [("tucker2_vbmf", {"rank": 4}), ("kmeans_share", {"where": "1.0"})]
    assert len(pipeline.check(small_mlp(), small_task(), chain)) == 2
    with pytest.raises(UnknownName, match=r"unknown layer pattern '1\.0'"):
        pipeline.check(small_mlp(), small_task(), chain[1:])


def test_verbs_called_from_python_hold_to_the_same_ranges():
    from featherweight.prune import prune

    with pytest.raises(BadOption, match="rounds=0: must be a whole number of at least 1"):
        prune(small_mlp(), small_task(), rounds=0)


def test_yaml_of_a_report_is_what_any_reader_of_yaml_understands():
    made = recipe_text.dump({"lr": 1e-5, "seed": 3, "strict": True})
    assert yaml.safe_load(made) == {"lr": 1e-5, "seed": 3, "strict": True}


def test_a_resumed_run_trains_anew_where_it_asks_for_another_network(tmp_path: Path) -> None:
    asked = {
        "model": "lenet300",
        "data": "mnist5k",
        "train": 1,
        "chain": ["kmeans_share"],
        "measure": False,
        "onnx": False,
    }
    asked["chain"] = [{"method": "kmeans_share", "options": {"epochs": 0}}]
    kept = tmp_path / "run" / "original.safetensors"
    seen = []
    for seed, resume in ((0, False), (0, True), (1, True)):
        fw.run(asked, seed=seed, resume=resume, out=str(tmp_path / "run"))
        seen.append(kept.read_bytes())
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
