"""Everything at once."""

from __future__ import annotations

from collections.abc import Sequence

from featherweight.catalogue import ingredient
from featherweight.core.plan import Stage


@ingredient("plan")
def joint() -> Sequence[Stage]:
    """One stage with features, outputs and labels."""
    return [Stage(features=True, outputs=True, labels=True)]
