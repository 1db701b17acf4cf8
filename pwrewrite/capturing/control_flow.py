"""Whether a module's own code hands one child's result to another child whatever its input is: `handed_on`.

A capture is one run; where code branches on a value or a size, another run may take another way. So the code is traced
on proxies, once for every way in which its decisions can go: each time a proxy is asked for its truth value or its
length, the trace is repeated with the other answers, and with inputs left out that may be. What holds in every trace
holds for every input.

Limits: at most `MOST_PATHS` ways. A length or a whole number (``range(x.shape[-1] // 32)``, ``int(x.sum())``)
is tried as a few values only; of inputs that may be left out none, one, all but one and all are. Code that proxies
cannot follow at all gets the answer None, "unknown".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from ..core.errors import first_line, line_of_model
from ..core.nested import Args, Kwargs, Tree
from .code_trace import Item, NotTraceable, ShallowTracer, untouched
from .guards import raised_by_code
from .same_code import FACTS, alike_key, asks_for_facts, may_change, question

_T = TypeVar("_T")

MOST_PATHS = 256
"""Ways through one module's code, without those that raise."""

_MOST_TRIED = 2 * MOST_PATHS

_STOCK = (nn.Sequential.forward, nn.Identity.forward)

_RANKS = (4, 3, 2, 5)
"""What ``len(x.shape)`` may be."""

_COUNTS = (1, 0, 2, 4096)
"""What lengths and whole numbers may be: few, none, several, and more than code compares with."""

_NUMBERS = (1.0, -1.0, 0.0, 1e6)


_FACT = "fact"
_LEFT_OUT = "left out"


class _Value(Item):
    """A value in a trace; asking it for a number or its length is a decision."""

    def _decide(self, options: Sequence[_T], asked: Hashable = None) -> _T:
        tracer = self.tracer
        assert isinstance(tracer, _PathTracer)
        return options[tracer.decide(len(options), asked)]

    def __len__(self) -> int:
        return self._decide(_COUNTS, ("length", self.node.name))

    def __contains__(self, value: object) -> bool:
        return self._decide((False, True))

    def __int__(self) -> int:
        return self._decide(_COUNTS, question(self.node))

    __index__ = __ceil__ = __floor__ = __round__ = __trunc__ = __int__

    def __float__(self) -> float:
        return self._decide(_NUMBERS)

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(Tensor, name):  # reads both, and changes nothing that is followed
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})
        else:
            super().__setattr__(name, value)


class _Attribute(fx.proxy.Attribute, _Value):
    """An attribute of a value, such as its shape."""

    def __len__(self) -> int:
        asked = ("length", question(self.node)) if self.attr in FACTS else None
        return self._decide(_RANKS, asked)


class _PathTracer(ShallowTracer):
    """Traces one way: decisions take the option in ``answers``, later ones their first; ``options`` counts theirs.

    Facts (``len(x.shape)``) that are asked for again are as before, unless something may have changed them.
    """

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.answers = answers
        self.options: list[int] = []
        self._known: dict[Hashable, int] = {}

    def decide(self, options: int, asked: Hashable = None) -> int:
        """The scheduled option of the next decision; ``asked`` is a key of what is asked."""
        key = None if asked is None else (options, asked)
        if key in self._known:
            return self._known[key]
        self.options.append(options)
        if len(self.options) > len(self.answers):
            self.answers.append(0)
        answer = self.answers[len(self.options) - 1]
        if key is not None:
            self._known[key] = answer
        return answer

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Node:
        """As ever, and forgets answers that may be other ones after it."""
        if may_change(kind, target, args, kwargs):
            self._known.clear()
        return super().create_node(kind, target, args, kwargs, *rest, **named)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The truth value of a proxy, which is a decision."""
        return self.decide(2, question(obj.node)) == 0

    def iter(self, obj: Tree) -> Iterator[fx.Proxy]:
        """The items of a proxy, of which there are a decided number."""
        return iter([obj[i] for i in range(_COUNTS[:3][self.decide(3, ("items", obj.node.name))])])

    def create_args_for_root(
        self, root_fn: Callable[..., object], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[object]]:
        """As ever; which of the inputs with the default None are left out is a decision."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        optional = {i for i, arg in enumerate(args) if isinstance(arg, fx.Proxy) and arg.node.args == (None,)}
        single = [{i} for i in sorted(optional)]
        tried: list[set[int]] = []
        for absent in (set(), *single, *(optional - one for one in single), optional):
            if absent not in tried:
                tried.append(absent)
        absent = tried[self.decide(len(tried))] if optional else set()
        for i in absent:
            args[i].node.meta[_LEFT_OUT] = True  # type: ignore[attr-defined]
        return function, [None if i in absent else arg for i, arg in enumerate(args)]

    def call_module(self, m: nn.Module, forward: Callable[..., object], args: Args, kwargs: Kwargs) -> object:
        """As ever; a module that is no submodule, such as one that a class holds, is a function."""
        try:
            self.path_of_module(m)
        except NameError:
            if type(m) is nn.Sequential:
                return super().call_module(m, forward, args, kwargs)
            return self.create_proxy("call_function", m, args, kwargs, name=type(m).__name__)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value whose numbers are decisions."""
        return _Value(node, self)


class _NotFollowed(RuntimeError):
    """Code that proxies cannot follow."""


class _Raised(RuntimeError):
    """A way that ends in an error of the code's own."""


def paths(module: nn.Module) -> list[fx.Graph] | None:
    """The graphs of all ways through a module's own code, its children being leaves, without ways that raise; None
    where the code cannot be followed, raises on all ways or has more than `MOST_PATHS` of them.
    """
    return Ways().graphs(module)


class Ways:
    """The ways through the code of modules, followed once for all modules that are alike."""

    def __init__(self) -> None:
        self._found: dict[Hashable, list[fx.Graph] | str] = {}

    def graphs(self, module: nn.Module) -> list[fx.Graph] | None:
        """As `paths`; modules that are alike share the graphs."""
        found = self._of(module)
        return None if isinstance(found, str) else found

    def unfollowed(self, module: nn.Module) -> str | None:
        """What of a module's own code cannot be followed, with its line where there is one; None where it can."""
        found = self._of(module)
        return found if isinstance(found, str) else None

    def _of(self, module: nn.Module) -> list[fx.Graph] | str:
        if module not in self._found:
            key = alike_key(module)
            if key not in self._found:
                self._found[key] = _ways(module)
            self._found[module] = self._found[key]
        return self._found[module]


def _ways(module: nn.Module) -> list[fx.Graph] | str:
    graphs: list[fx.Graph] = []
    raised: list[str] = []
    pending: list[list[int]] = [[]]
    done = 0
    while pending and len(graphs) + len(pending) <= MOST_PATHS and done < _MOST_TRIED:  # each pending is one or more
        scheduled, done = pending.pop(), done + 1
        tracer = _PathTracer(list(scheduled))
        try:
            graph = _trace_once(tracer, module)
        except _NotFollowed as error:
            return _place(error)
        except _Raised as error:
            raised.append(_place(error))
        else:
            graphs.append(graph)
        for i in range(len(scheduled), len(tracer.options)):
            pending += [[*tracer.answers[:i], option] for option in range(1, tracer.options[i])]
    if pending:
        return f"it can go more than {MOST_PATHS} ways"
    return graphs or raised[0]


def _place(error: Exception) -> str:
    cause = error.__cause__ or error
    return line_of_model(cause) or (str(cause) if isinstance(cause, NotTraceable) else first_line(cause))


def _trace_once(tracer: _PathTracer, module: nn.Module) -> fx.Graph:
    try:
        with untouched(module):
            return tracer.trace(module)
    except (AssertionError, ValueError, LookupError, ArithmeticError, NotImplementedError) as error:
        raise _Raised from error
    except Exception as error:
        own = (isinstance(error, RuntimeError) and raised_by_code(error)) or _uses_none(error)
        raise (_Raised if own else _NotFollowed) from error


def _uses_none(error: Exception) -> bool:
    """Whether code uses what is not there: an input that is left out, or a layer that this model has not."""
    return isinstance(error, (TypeError, AttributeError)) and "'NoneType' object" in str(error)


Key = tuple[int | str, ...]
"""Where a value lies in what a module returns: ``(0,)`` for the first of a tuple, empty where it is all."""


def handed_on(
    module: nn.Module,
    first: nn.Module | None,
    then: nn.Module | None,
    passes_on: Callable[[nn.Module], bool],
    *,
    key: Key = (),
    only: bool = True,
    ways: Callable[[nn.Module], list[fx.Graph] | None] = paths,
) -> Key | str | None:
    """Where ``then`` gets what ``first`` returns, in every way through a module's own code, and nothing else gets it.

    Args:
        module: Whose code is asked.
        first: A module that the code calls; the code's own input where None.
        then: Another one, which reads it as its first input; the code's output where None.
        passes_on: Whether a module returns what it is given.
        key: Where in what ``first`` returns the value lies.
        only: Whether ``then`` may read nothing else, in any of its calls.
        ways: `paths`, or what remembers its results.

    Returns:
        Where the value lies in the code's output, empty for a module; a text that says why it is not always, or not
        alone, handed on; None where the code cannot be followed, or no way through it shows the connection.
    """
    if type(module).forward in _STOCK:
        return key if then is None or not key else None
    graphs = ways(module)
    if graphs is None:
        return None
    places, inputs, missed, elsewhere = set[tuple[Key, ...]](), set[str](), False, False
    for graph in graphs:
        readers = [n for n in graph.nodes if (n.op == "output" if then is None else _calls(module, n, then))]
        sources = [n for n in graph.nodes if first is not None and _calls(module, n, first)]
        wanted = sources if first is not None else [n for n in graph.nodes if n.op == "placeholder"]
        for reader in readers:
            read = dict(_keyed(reader.args[0])) if then is None else {(): _first_argument(reader)}
            hits = dict[Key, str]()
            for at, value in read.items():
                node, items = _taken_from(module, value, passes_on)
                if node in wanted and items == key[: len(items)]:
                    hits[(*at, *key[len(items) :])] = str(node)
            elsewhere |= then is None and len(hits) > 1
            if hits and (then is None or () in hits):
                places.add(tuple(hits))
                inputs.update(hits.values())
            elif only or then is None:
                missed = True
        elsewhere |= not all(_only_read_by(module, source, readers, passes_on, key) for source in sources)
    for graph in graphs if first is None else ():
        readers = [n for n in graph.nodes if then is not None and _calls(module, n, then)]
        given = [n for n in graph.nodes if n.name in inputs]
        elsewhere |= not all(_only_read_by(module, each, readers, passes_on, key) for each in given)
    if len(places) > 1 or (missed and places):
        return _SOMETIMES
    if elsewhere:
        return _ELSEWHERE
    return next(iter(places.pop())) if places else None


_SOMETIMES = "connects them for some inputs only"
_ELSEWHERE = "reads what is between them elsewhere, too"


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
        elif asks_for_facts(node) or (read and all(each == _FACT for each in read)):
            made[node] = _FACT
        elif node.op in ("call_function", "call_method") and name in plain and read:
            made[node] = read[0]
        else:
            made[node] = len(calls)
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda source: f"<{made[source]}>")
            calls.append(f"{node.op} {name} {arguments}")
    return tuple(calls)


def decided(ways: Sequence[fx.Graph], plain: Container[str] = ()) -> bool:
    """Whether all ways through code call the same (see `calls_of`).

    Those with inputs left out need only agree among themselves and call no module that those with all inputs do not:
    what else they do they do to other inputs.
    """
    groups = dict[tuple[str, ...], set[tuple[str, ...]]]()
    modules = dict[tuple[str, ...], set[object]]()
    for way in ways:
        absent = tuple(node.name for node in way.nodes if _LEFT_OUT in node.meta)
        groups.setdefault(absent, set()).add(calls_of(way, plain))
        modules.setdefault(absent, set()).update(node.target for node in way.nodes if node.op == "call_module")
    most = modules.get((), set().union(*modules.values()))
    return all(len(calls) == 1 for calls in groups.values()) and all(called <= most for called in modules.values())


def _calls(owner: nn.Module, node: fx.Node, module: nn.Module) -> bool:
    return node.op == "call_module" and owner.get_submodule(str(node.target)) is module


def _first_argument(node: fx.Node) -> fx.node.Argument:
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _keyed(value: Tree, at: Key = ()) -> Iterator[tuple[Key, object]]:
    """What containers hold, with the keys that lead there."""
    if isinstance(value, (tuple, list)):
        for i, each in enumerate(value):
            yield from _keyed(each, (*at, i))
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _keyed(each, (*at, name))
    else:
        yield at, value


def _item(node: object) -> int | str | None:
    """The key of an item that a node takes out of what it reads; None for any other node."""
    if isinstance(node, fx.Node) and node.op == "call_function" and node.target is operator.getitem:
        name = node.args[1]
        if isinstance(name, str) or (type(name) is int and name >= 0):
            return name
    return None


def _taken_from(owner: nn.Module, value: object, passes_on: Callable[[nn.Module], bool]) -> tuple[object, Key]:
    """A value, or what is before the modules that return what they are given, and the items that are taken of that."""
    items: Key = ()
    while isinstance(value, fx.Node):
        name = _item(value)
        if name is not None:
            items = (name, *items)
        elif value.op != "call_module" or not passes_on(owner.get_submodule(str(value.target))):
            break
        value = _first_argument(value)
    return value, items


def _only_read_by(
    owner: nn.Module,
    node: fx.Node,
    readers: list[fx.Node],
    passes_on: Callable[[nn.Module], bool],
    key: Key = (),
) -> bool:
    """Whether only ``readers`` read what lies at a key of a node's value."""
    for user in node.users:
        name = _item(user) if key else None
        if user in readers or asks_for_facts(user) or (name is not None and name != key[0]):
            continue
        rest = key if name is None else key[1:]
        passing = name is not None or (user.op == "call_module" and passes_on(owner.get_submodule(str(user.target))))
        if not passing or not _only_read_by(owner, user, readers, passes_on, rest):
            return False
    return True
