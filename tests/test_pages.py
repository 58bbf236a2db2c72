"""The page about pruning tells of every id, and of no other."""

import json
from pathlib import Path

from featherweight.catalogue import entries

DOCS = Path(__file__).parent.parent / "docs"


def test_every_pruning_id_has_its_facts_and_its_row():
    facts = json.loads((DOCS / "pruning_facts.json").read_text())
    found = {name for name, entry in entries(family="prune").items() if entry.kind != "verb"}
    assert found <= facts.keys()
    page = (DOCS / "pruning.md").read_text()
    assert all(f"| `{name}` |" in page for name in found)
