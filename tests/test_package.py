"""What `import pwrewrite` offers, in whatever order its parts are imported."""

import os
import subprocess
import sys
from itertools import permutations

import pytest

import pwrewrite

STATEMENTS = (
    "import pwrewrite; pwrewrite.graph; pwrewrite.capture",
    "import pwrewrite.graph, pwrewrite.capturing.records",
    "import pwrewrite.capturing.records as records, pwrewrite.graph as module; records.Layer, module.graph",
    "from pwrewrite import analyze, Analysis, Capture, graph, capture",
    "from pwrewrite.graph import graph; from pwrewrite.capture import capture",
    "from pwrewrite import *",
)

CHECK = """
import inspect, networkx, torch
import pwrewrite
from pwrewrite import capture, graph
from pwrewrite.capture import capture as capture_function
from pwrewrite.graph import graph as graph_function
import pwrewrite.capturing.records as records

assert inspect.isfunction(capture_function) and inspect.isfunction(graph_function)
for found in (graph, pwrewrite.graph, graph_function):
    assert inspect.signature(found) == inspect.signature(graph_function)
    for take in (capture, pwrewrite.capture, capture_function):
        made = take(torch.nn.Conv2d(3, 4, 1, device="meta"), torch.zeros(1, 3, 2, 2))
        assert isinstance(made, records.Capture) and isinstance(made, pwrewrite.Capture)
        assert isinstance(found(made), networkx.DiGraph)
assert pwrewrite.capturing.records is records and pwrewrite.capturing.network.graph is graph_function
"""

# torch is imported once; each order then runs in a fork, in which pwrewrite is not imported yet.
FORKS = """
import os, sys
import networkx, torch
statements, check = eval(sys.stdin.read())
for order in statements:
    child = os.fork()
    if not child:
        try:
            exec("\\n".join(order) + check, {"__name__": "__main__"})
        except BaseException:
            import traceback
            print(order, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, order
print(len(statements))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_functions_stay_callable_in_every_order_of_imports() -> None:
    orders = [*((s,) for s in STATEMENTS), *permutations(STATEMENTS, 2)]
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=repr((orders, CHECK)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(orders)


def test_every_public_name_is_there() -> None:
    assert {"analyze", "analyze_target", "capture", "graph", "__version__"} <= set(pwrewrite.__all__)
    assert {*pwrewrite._HOMES, "__version__"} == set(pwrewrite.__all__)
    for name in pwrewrite.__all__:
        assert getattr(pwrewrite, name) is not None
        assert name in dir(pwrewrite)
    for name in set(pwrewrite.__all__) - {"__version__"}:
        assert getattr(pwrewrite, name).__doc__


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'analyse'"):
        pwrewrite.analyse  # noqa: B018
    with pytest.raises(ImportError):
        from pwrewrite import analyse  # noqa: F401
