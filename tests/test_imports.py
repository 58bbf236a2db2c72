"""Who may import whom, and that the command line does not wait for PyTorch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import featherweight

SOURCE = Path(featherweight.__file__).parent
BASE = {"errors", "allowed", "catalogue", "core"}
VERBS = {"prune", "quantize", "factorize", "share", "distill", "rewrite"}
MAY = {
    "errors": set(),
    "allowed": {"errors"},
    "catalogue": {"errors", "allowed"},
    "core": BASE,
    "ingredients": BASE,
    "coding": BASE | {"coding"},
    "export": BASE | {"export"},
    "runtime": BASE | {"runtime"},
    "zoo": BASE | {"zoo"},
    "report": {"errors", "recipe_text", "report"},
    "budget": {"errors"},
    **dict.fromkeys(VERBS, BASE | {"budget"}),
    "recipes": BASE | VERBS | {"budget", "ingredients", "coding", "recipes"},
}


def rooms(tree: ast.AST) -> set[str]:
    """The rooms of ours that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "featherweight":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("featherweight.")]
        found |= set(names)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_below_imports_what_stands_on_it(path):
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room not in MAY:
        assert room in {
            "anatomy",
            "__init__",
            "figures",
            "outputs",
            "provenance",
            "checkpoint",
            "recipe_model",
            "recipe_text",
            "pipeline",
            "running",
            "sources",
            "commands",
            "cli",
        }
        return
    assert rooms(ast.parse(path.read_text())) <= MAY[room] | {room}


def test_command_line_and_package_do_not_import_torch():
    code = "import sys, featherweight, featherweight.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
