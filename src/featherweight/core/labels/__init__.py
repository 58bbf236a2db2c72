"""Label flow: which entries of which tensors are the same channel (see `flow`); the rules stand in a file each."""

from featherweight.core.labels import (  # noqa: F401 - importing a file enters its rules into the table
    movement,
    pointwise,
    products,
    recurrent,
    reductions,
    weights,
)
from featherweight.core.labels.flow import Flow, Literal, Unions, compact, components, flow_labels, step_of

__all__ = ["Flow", "Literal", "Unions", "compact", "components", "flow_labels", "step_of"]
