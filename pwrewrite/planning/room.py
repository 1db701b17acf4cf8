"""How many calibration inputs fit into memory at once, from a capture's shapes."""

from __future__ import annotations

from ..capture.records import Capture

_MOST = 32
_RUN_BYTES = 1024**3
"""About how many bytes of activations one calibration run, forward and backward, may hold."""
_LOCKSTEP_BYTES = 5 * 1024**3 // 2
"""About how many bytes of live activations two models that run in lock-step may hold."""


def samples_in_run(captured: Capture) -> int:
    """Samples of one calibration run: a backward pass keeps all activations."""
    made = sum(
        tensor.nbytes
        for node in captured.graph.nodes
        if node.meta["info"].alias_of is None and node.op not in ("placeholder", "get_attr", "output")
        for tensor in node.meta["info"].outputs
    )
    return int(min(_MOST, max(1, _RUN_BYTES * samples_of_example(captured) // max(1, made))))


def samples_in_lockstep(captured: Capture) -> int:
    """Samples whose live activations may be held in two models at once."""
    live = peak = 0
    for event in captured.memory:
        live += event.nbytes
        peak = max(peak, live)
    return int(max(1, _LOCKSTEP_BYTES * samples_of_example(captured) // max(1, 2 * peak)))


def samples_of_example(captured: Capture) -> int:
    """Samples in the example inputs: the first dim of the first of them."""
    shapes = (spec.shape for _, spec in captured.inputs)
    return max(1, next((shape[0] for shape in shapes if shape), 1))
