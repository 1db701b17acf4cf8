"""Whether a module's own code hands one child's result to another child whatever its input is: `always_follows`.

A capture is one run; where code branches on a value or a size, another run may take another way. So the code is traced
on proxies, once for every way in which its decisions can go: each time a proxy is asked for its truth value or its
length, the trace is repeated with the other answers. What holds in every trace holds for every input.

Limits: at most `MOST_PATHS` ways are tried. A length or a whole number (``range(x.shape[-1] // 32)``, ``int(x.sum())``)
is tried as a few values only. Code that proxies cannot follow at all gets the answer None, "unknown".
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import TypeVar

from torch import fx, nn

from ..core.nested import Args, Kwargs, Tree
from .code_trace import Item, ShallowTracer, leaves_of, untouched

_T = TypeVar("_T")

MOST_PATHS = 256
"""Ways through one module's code that are tried."""

_STOCK = (nn.Sequential.forward, nn.Identity.forward)


_FACTS = ("shape", "ndim", "dtype", "device", "is_cuda", "is_meta", "layout", "requires_grad")
_FACT_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "get_device")


_RANKS = (4, 3, 2, 5)
"""What ``len(x.shape)`` may be."""

_COUNTS = (1, 0, 2, 4096)
"""What lengths and whole numbers may be: few, none, several, and more than code compares with."""

_NUMBERS = (1.0, -1.0, 0.0, 1e6)


_FACT = "fact"


class _Value(Item):
    """A value in a trace; asking it for a number or its length is a decision."""

    def _decide(self, options: Sequence[_T]) -> _T:
        tracer = self.tracer
        assert isinstance(tracer, _PathTracer)
        return options[tracer.decide(len(options))]

    def __len__(self) -> int:
        return self._decide(_COUNTS)

    def __int__(self) -> int:
        return self._decide(_COUNTS)

    __index__ = __ceil__ = __floor__ = __round__ = __trunc__ = __int__

    def __float__(self) -> float:
        return self._decide(_NUMBERS)

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)


class _Attribute(fx.proxy.Attribute, _Value):
    """An attribute of a value, such as its shape."""

    def __len__(self) -> int:
        return self._decide(_RANKS)


class _PathTracer(ShallowTracer):
    """Traces one way: decisions take the option in ``answers``, later ones their first; ``options`` counts theirs."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.answers = answers
        self.options: list[int] = []

    def decide(self, options: int) -> int:
        """The scheduled option of the next decision."""
        self.options.append(options)
        if len(self.options) > len(self.answers):
            self.answers.append(0)
        return self.answers[len(self.options) - 1]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The truth value of a proxy, which is a decision."""
        return self.decide(2) == 0

    def iter(self, obj: Tree) -> Iterator[fx.Proxy]:
        """The items of a proxy, of which there are a decided number."""
        return iter([obj[i] for i in range(_COUNTS[:3][self.decide(3)])])

    def call_module(self, m: nn.Module, forward: Callable[..., object], args: Args, kwargs: Kwargs) -> object:
        """As ever; a module that is no submodule, such as one that a class holds, is a function."""
        try:
            self.path_of_module(m)
        except NameError:
            return self.create_proxy("call_function", m, args, kwargs, name=type(m).__name__)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value whose numbers are decisions."""
        return _Value(node, self)


class _NotFollowed(RuntimeError):
    """Code that proxies cannot follow."""


def paths(module: nn.Module) -> list[fx.Graph] | None:
    """The graphs of all ways through a module's own code, its children being leaves, without ways that raise; None
    where the code cannot be followed or has more than `MOST_PATHS` ways.
    """
    graphs: list[fx.Graph] = []
    pending: list[list[int]] = [[]]
    done = 0
    while pending and done + len(pending) <= MOST_PATHS:  # each that is pending is a way or more
        scheduled, done = pending.pop(), done + 1
        tracer = _PathTracer(list(scheduled))
        try:
            graph = _trace_once(tracer, module)
        except _NotFollowed:
            return None
        if graph is not None:
            graphs.append(graph)
        for i in range(len(scheduled), len(tracer.options)):
            pending += [[*tracer.answers[:i], option] for option in range(1, tracer.options[i])]
    return None if pending else graphs


def _trace_once(tracer: _PathTracer, module: nn.Module) -> fx.Graph | None:
    try:
        with untouched(module):
            return tracer.trace(module)
    except (AssertionError, ValueError, LookupError, ArithmeticError, NotImplementedError):
        return None  # this way ends in an error of the code's own
    except Exception as error:
        raise _NotFollowed from error


def always_follows(
    module: nn.Module,
    first: nn.Module | None,
    then: nn.Module | None,
    passes_on: Callable[[nn.Module], bool],
    *,
    only: bool = True,
    ways: Callable[[nn.Module], list[fx.Graph] | None] = paths,
) -> bool | None:
    """Whether ``then`` reads what ``first`` returns, and nothing else does, in every way through a module's own code.

    Args:
        module: Whose code is asked.
        first: A module that the code calls; the code's own input where None.
        then: Another one; the code's output where None.
        passes_on: Whether a module returns what it is given.
        only: Whether ``then`` may read nothing else, in any of its calls.
        ways: `paths`, or what remembers its results.

    Returns:
        None where the code cannot be followed, or no way through it shows the connection.
    """
    if type(module).forward in _STOCK:
        return True
    graphs = ways(module)
    if graphs is None:
        return None
    places, inputs = set[tuple[int, ...]](), set[str]()
    for graph in graphs:
        readers = [n for n in graph.nodes if (n.op == "output" if then is None else _calls(module, n, then))]
        sources = [n for n in graph.nodes if first is not None and _calls(module, n, first)]
        for reader in readers:
            read = leaves_of(reader) if then is None else [_first_argument(reader)]
            read = [_before(module, node, passes_on) for node in read]
            wanted = sources if first is not None else [n for n in graph.nodes if n.op == "placeholder"]
            hits = [i for i, n in enumerate(read) if n in wanted]
            if hits:
                places.add(tuple(hits))
                inputs.update(str(read[i]) for i in hits if first is None)
            elif only or then is None:
                return False
        if any(not _only_read_by(module, source, readers, passes_on) for source in sources):
            return False
    for graph in graphs if inputs else ():
        readers = [n for n in graph.nodes if then is not None and _calls(module, n, then)]
        if any(n.name in inputs and not _only_read_by(module, n, readers, passes_on) for n in graph.nodes):
            return False
    return len(places) == 1 if places else None


def calls_of(graph: fx.Graph, plain: Container[str] = ()) -> tuple[str, ...]:
    """What one way through code calls, and on what: two ways with equal calls do the same.

    Shape facts, what is worked out from nothing else, and functions and methods named ``plain``, which only hand on
    their first input here, are left out.
    """
    calls, made = list[str](), dict[fx.Node, object]()
    for node in graph.nodes:
        read = [made[source] for source in node.all_input_nodes]
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "placeholder":
            made[node] = str(node.target)
        elif _asks_for_facts(node) or (read and all(each == _FACT for each in read)):
            made[node] = _FACT
        elif node.op in ("call_function", "call_method") and name in plain and read:
            made[node] = read[0]
        else:
            made[node] = len(calls)
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda source: f"<{made[source]}>")
            calls.append(f"{node.op} {name} {arguments}")
    return tuple(calls)


def _calls(owner: nn.Module, node: fx.Node, module: nn.Module) -> bool:
    return node.op == "call_module" and owner.get_submodule(str(node.target)) is module


def _first_argument(node: fx.Node) -> fx.node.Argument:
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _before(owner: nn.Module, node: fx.node.Argument, passes_on: Callable[[nn.Module], bool]) -> fx.node.Argument:
    """A node, or the one before the modules that return what they are given."""
    while isinstance(node, fx.Node) and node.op == "call_module" and passes_on(owner.get_submodule(str(node.target))):
        node = _first_argument(node)
    return node


def _asks_for_facts(node: fx.Node) -> bool:
    """Whether a node reads a tensor's shape, dtype or the like, and none of its values."""
    if node.op == "call_method":
        return node.target in _FACT_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _FACTS


def _only_read_by(
    owner: nn.Module, node: fx.Node, readers: list[fx.Node], passes_on: Callable[[nn.Module], bool]
) -> bool:
    for user in node.users:
        if user in readers or _asks_for_facts(user):
            continue
        passing = user.op == "call_module" and passes_on(owner.get_submodule(str(user.target)))
        if not passing or not _only_read_by(owner, user, readers, passes_on):
            return False
    return True
