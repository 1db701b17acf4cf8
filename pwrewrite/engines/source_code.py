"""The code of a program of `torch.export`, with torch's own modules where it calls them."""

from __future__ import annotations

import itertools
import keyword
import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export.graph_signature import InputKind

from ..core.errors import RefusedError
from ..core.nested import map_tensors, tensors_of
from .exporting import Program, identifier

_OPERATORS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "matmul": "@",
    "floordiv": "//",
    "truediv": "/",
    "mod": "%",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}
_METHODS = """
    view reshape flatten unflatten permute transpose contiguous mean relu_ relu sigmoid sigmoid_ tanh tanh_ add_ mul_
    sub_ div_ clamp clamp_ softmax log_softmax expand unsqueeze squeeze chunk split select roll masked_fill exp sqrt
    rsqrt pow abs neg sin cos clone detach repeat amax amin argmax cumsum flip fill_ copy_ zero_ t unbind
    narrow bmm floor ceil round type_as movedim
""".split()  # noqa: SIM905
"""Tensor methods that take what the operation of that name takes."""
_FUNCTIONS = """
    cat stack conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d batch_norm layer_norm group_norm
    instance_norm max_pool1d max_pool2d max_pool3d dropout where prelu
""".split()  # noqa: SIM905
"""The same of functions of torch, and of ``torch.nn.functional``:"""
_FUNCTIONAL = """
    linear adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool2d gelu silu hardswish
    hardsigmoid leaky_relu elu mish softplus scaled_dot_product_attention pad pixel_shuffle one_hot
""".split()  # noqa: SIM905
_DROPPED = ("_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "alias", "lift_fresh")
_POOL = ("x", "y", "z", "u", "v", "w")
"""Names of variables."""
_IN_NN = "torch.nn.modules."


class Writer:
    """Writes the code of a program: the ``lines`` that make the model's modules and tensors, and their ``state``."""

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, program.exported.graph
        self.lines: list[str] = []
        self.state: dict[str, Tensor] = {}
        self._attributes: dict[object, str] = {}
        self._texts: dict[fx.Node, str] = {}
        specs = program.exported.graph_signature.input_specs
        kinds = list(zip(self.graph.find_nodes(op="placeholder"), specs))
        self._weights = {n: str(s.target) for n, s in kinds if s.kind is not InputKind.USER_INPUT}
        self._users = [n for n, _ in kinds if n not in self._weights and isinstance(n.meta.get("val"), Tensor)]
        self._calls = _module_calls(self.graph, dict(program.model.named_modules()), set(self._weights))

    def parameters(self) -> list[str]:
        """The parameters of ``forward``."""
        args, kwargs = self.program.inputs
        return [*(name for name, _ in self._positional(args)), *(f"{name}=None" for name in kwargs)]

    def _positional(self, args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
        names = iter(self.program.input_names)
        for i, value in enumerate(args):
            own = [next(names) for _ in tensors_of(value)]
            yield own[0] if isinstance(value, Tensor) else f"argument_{i}", value

    def body(self) -> list[str]:
        """The lines of ``forward``."""
        args, kwargs = self.program.inputs
        lines: list[str] = []
        users = iter(zip(self._users, self.program.input_names))
        for name, value in (*self._positional(args), *kwargs.items()):
            for path in _paths(value):
                node, own = next(users)
                self._texts[node] = name if not path else own
                lines += [f"{own} = {name}{path}"] if path else []
        needed, order = self._needed(), {node: i for i, node in enumerate(self.graph.nodes)}
        owners = {text: node for node, text in self._texts.items()}
        for node in self.graph.nodes:
            call = self._calls.get(node)
            if node.op != "call_function" or (call is not None and node is not call.last):
                continue
            if _dropped(node):
                if node.users:
                    self._texts[node] = self._text(node.args[0])
                continue
            text = f"self.{self._module(call.path)}({self._text(call.input)})" if call else self._operation(node)
            if not node.users:
                lines.append(text)
                continue
            inputs = [self._texts.get(n) for n in ([call.input] if call else node.all_input_nodes)]
            names = itertools.chain(filter(None, inputs), _POOL, (f"t{i}" for i in itertools.count()))
            free = (n for n in names if n not in owners or order[needed.get(owners[n], owners[n])] <= order[node])
            name = next(free)
            owners[name], self._texts[node] = node, name
            lines.append(f"{name} = {text}")
        return [*lines, f"return {self._returned()}"]

    def _needed(self) -> dict[fx.Node, fx.Node]:
        """The statement, by its node, in which a value is needed last."""
        needed: dict[fx.Node, fx.Node] = {}
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            if _dropped(node):
                continue
            statement = self._calls[node].last if node in self._calls else node
            for value in map(_named, node.all_input_nodes):
                if value not in needed or order[needed[value]] < order[statement]:
                    needed[value] = statement
        return needed

    def _returned(self) -> str:
        """The outputs, in plain containers like the model's."""
        outputs = self.graph.output_node().args[0]
        assert isinstance(outputs, (tuple, list))
        nodes = [node for node in outputs if isinstance(node, fx.Node)]
        if any(not isinstance(node.meta.get("val"), Tensor) for node in nodes):
            raise RefusedError("the model returns a number that depends on a size")
        args, kwargs = map_tensors(self.program.inputs, torch.clone)
        texts = (_Text(self._text(node)) for node in nodes)
        with torch.no_grad():
            return _literal(map_tensors(self.program.model(*args, **kwargs), lambda t: next(texts), plain=True))

    def _operation(self, node: fx.Node) -> str:
        target: Any = node.target
        args = [self._text(value) for value in node.args]
        named = [f"{key}={self._text(value)}" for key, value in node.kwargs.items()]
        if not isinstance(target, OpOverload):
            if target is operator.getitem:
                return f"{args[0]}[{args[1]}]"
            module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
            if module in ("_operator", "operator") and name in _OPERATORS and len(args) == 2:
                return f"{args[0]} {_OPERATORS[name]} {args[1]}"
            if module in ("_operator", "math") or getattr(torch, name, None) is target:
                home = {"_operator": "operator", "math": "math"}.get(module, "torch")
                return f"{home}.{name}({', '.join([*args, *named])})"
            raise RefusedError(f"no source code stands for {name or target}", where=node.name)
        namespace, kind, overload = str(target).split(".")
        first = args[0] if args and re.fullmatch(r"[A-Za-z_][\w.]*", args[0]) else ""
        if namespace == "aten":
            if kind in _OPERATORS and overload in ("Tensor", "Scalar", "default") and len(args) == 2 and not named:
                return f"{args[0]} {_OPERATORS[kind]} {args[1]}"
            if kind == "sym_size":
                return f"{args[0]}.shape[{args[1]}]"
            if kind == "slice" and len(args) > 3 and args[1].isdecimal() and not named:
                start, end = "" if args[2] == "0" else args[2], "" if args[3] == str(2**63 - 1) else args[3]
                step = f":{args[4]}" if len(args) == 5 else ""
                return f"{args[0]}[{':, ' * int(args[1])}{start}:{end}{step}]"
            if kind == "index" and isinstance(node.args[1], (list, tuple)) and None not in node.args[1]:
                return f"{args[0]}[{args[1][1:-1]}]"
            if kind in _METHODS and first:
                return f"{first}.{kind}({', '.join([*args[1:], *named])})"
            home = "torch" if kind in _FUNCTIONS else "F" if kind in _FUNCTIONAL else ""
            if home:
                return f"{home}.{kind}({', '.join([*args, *named])})"
        return f"torch.ops.{namespace}.{kind}.{overload}({', '.join([*args, *named])})"

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value in self._weights:
                return f"self.{self._tensor(value)}"
            return self._texts[value]
        if isinstance(value, (list, tuple)):
            items = ", ".join(map(self._text, value))
            return f"[{items}]"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        return str(value) if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)) else repr(value)

    def _module(self, path: str) -> str:
        """The attribute of a module, made when it is first asked for."""
        module = self.program.model.get_submodule(path)
        if id(module) not in self._attributes:
            name = self._attributes[id(module)] = self._attribute(path)
            self.lines.append(f"self.{name} = {constructor(module)}")
            self.state |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
        return self._attributes[id(module)]

    def _tensor(self, node: fx.Node) -> str:
        """The attribute of a tensor that code uses directly."""
        path = self._weights[node]
        if path not in self._attributes:
            exported = self.program.exported
            tensor = exported.state_dict[path] if path in exported.state_dict else exported.constants[path]
            if not isinstance(tensor, Tensor):
                raise RefusedError("a constant of the model is no tensor", where=path)
            name = self._attributes[path] = self._attribute(path)
            self.lines.append(f'self.register_buffer("{name}", torch.empty({[*tensor.shape]}, dtype={tensor.dtype}))')
            self.state[name] = tensor
        return self._attributes[path]

    def _attribute(self, path: str) -> str:
        name = identifier(path)
        name = name if name.isidentifier() and not keyword.iskeyword(name) else f"layer_{name}"
        while hasattr(nn.Module, name) or hasattr(nn.Module(), name) or name in self._attributes.values():
            name += "_"
        return name


class _Text(str):
    """The text of an output, as opposed to a text that the model returns."""


class _Call:
    """One call of a module: its nodes, its one input and its one output."""

    def __init__(self, path: str, nodes: list[fx.Node], value: fx.Node) -> None:
        self.path, self.nodes, self.last, self.input = path, set(nodes), nodes[-1], value


def _module_calls(graph: fx.Graph, modules: Mapping[str, nn.Module], weights: set[fx.Node]) -> dict[fx.Node, _Call]:
    """The calls of torch's own leaf modules that stand in the code as such, by each of their nodes."""
    groups: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).items())
        if node.op == "call_function" and stack:
            groups.setdefault(stack[-1][0], []).append(node)
    calls: dict[fx.Node, _Call] = {}
    for nodes in groups.values():
        path = str(list(nodes[0].meta["nn_module_stack"].values())[-1][0])
        inside = set(nodes)
        module = modules.get(path)
        inputs = {n for node in nodes for n in node.all_input_nodes if n not in inside and n not in weights}
        outside = [node for node in nodes if any(user not in inside for user in node.users)]
        if module is None or len(inputs) != 1 or outside != nodes[-1:] or constructor(module) is None:
            continue
        calls |= dict.fromkeys(nodes, _Call(path, nodes, inputs.pop()))
    return calls


def constructor(module: nn.Module) -> str | None:
    """The code that makes one of torch's leaf modules; None where its ``repr`` does not give the same settings.

    >>> constructor(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"))
    "nn.Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), padding_mode='reflect')"
    """
    kind = type(module)
    own = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or module._modules
    if not kind.__module__.startswith(_IN_NN) or own:
        return None
    try:
        text = re.sub(r"(mode)=([a-z]+)", r"\1='\2'", f"nn.{module!r}")
        made = eval(text, {"nn": nn})  # the text of torch's own module
    except Exception:
        return None
    shapes = [{key: t.shape for key, t in m.state_dict().items()} for m in (made, module)]
    same = type(made) is kind and shapes[0] == shapes[1] and _settings(made) == _settings(module)
    return text if same else None


def _settings(module: nn.Module) -> dict[str, object]:
    """The public attributes of a module but its mode."""
    plain = {key: value for key, value in vars(module).items() if key[0] != "_" and key != "training"}
    return {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in plain.items()}


def _dropped(node: fx.Node) -> bool:
    """Whether a node is a check or another name of a value, such as all of it as a slice: code does without."""
    if str(node.target) == "aten.slice.Tensor" and node.args[2:] == (0, 2**63 - 1):
        return True
    return isinstance(node.target, OpOverload) and str(node.target).split(".")[1] in _DROPPED


def _named(node: fx.Node) -> fx.Node:
    """The value that a node is another name of, or the node itself."""
    while _dropped(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _paths(value: Any, path: str = "") -> list[str]:
    """Where the tensors of an argument are, as Python gets at them."""
    if isinstance(value, Tensor):
        return [path]
    keyed = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, (list, tuple)) else {}
    return [each for key, item in keyed.items() for each in _paths(item, f"{path}[{key!r}]")]


def _literal(value: Any) -> str:
    """Plain containers as code."""
    if isinstance(value, _Text):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return f"[{', '.join(map(_literal, value))}]" if isinstance(value, list) else repr(value)
