"""Recurrent layers."""

from __future__ import annotations

from typing import Any

from featherweight.core.labels.flow import Call, Val, bare, lay, rule
from featherweight.core.labels.weights import enter


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> Any:
    """Hidden unit j is one channel in all layers and directions, for a module has one hidden size."""
    flow, x, states, weights = call.flow, *call.args[:3]
    biased, layers, both = call.args[3], call.args[4], call.args[7]
    gates = {"lstm": 4, "gru": 3}.get(call.name, 1)
    each = 4 if biased else 2
    directions = 2 if both else 1
    if len(weights) != each * layers * directions or any(w.name is None for w in weights):
        call.pin(*call.values(), why="with projections or computed weights")
        return bare(call.value)
    call.pin(*(s for s in (states if isinstance(states, (tuple, list)) else [states])), why="as an initial state")
    hidden = flow.axis(weights[1], 1)
    arrived, elsewhere = flow.arrive(x, -1)
    if elsewhere:
        call.pin(x, why="over another dimension than the channels")
    enter(call, weights[0], arrived, hidden)
    for i in range(layers * directions):
        w_ih, w_hh, *biases = weights[each * i : each * (i + 1)]
        flow.tie(w_hh, 1, hidden, call.name)
        for w in (w_ih, w_hh, *biases):
            flow.tie(w, 0, hidden.repeat(gates), call.name)
        first = i < directions
        flow.tie(w_ih, 1, arrived if first else hidden.repeat(directions), "input of the model or of fixed size")
    out, *finals = call.value
    labels = flow.settle(lay(hidden.repeat(directions), -1, out.dim()))
    return (Val(out, labels, True), *(Val(s, flow.settle(lay(hidden, -1, s.dim())), True) for s in finals))
