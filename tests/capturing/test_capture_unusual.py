"""What stands between a model's code and torch: threads, function transforms, higher-order operators, odd tensors."""

from __future__ import annotations

import threading
from collections import UserDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap

import pwrewrite
from pwrewrite.capturing import Capture, capture, info
from pwrewrite.core.errors import CaptureError, first_line, shortened

X = torch.zeros(4, 3, 8, 8)
ONE = 4 * 64 * 4 * 3 * 9
"""MACs of one convolution of `conv` on X."""


class Fn(nn.Module):
    """A function with parts."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3, padding=1)


def macs(captured: Capture) -> int:
    return sum(info(node).cost.macs for node in captured.graph.nodes)


def check(model: nn.Module, *inputs: Any, total: int, values: str = "meta") -> Capture:
    captured = capture(model, inputs)
    assert macs(captured) == total
    assert captured.coverage.values == values
    assert captured.coverage.unpriced == ()
    assert sum(layer.params for layer in captured.layers) <= captured.params
    return captured


# ----------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize(
    ("function", "total"),
    [
        (lambda s, x: vmap(lambda i: s.c(i[None])[0])(x), ONE),
        (lambda s, x: s.c(vmap(lambda i: i * 2, in_dims=1, out_dims=1)(x)), ONE),
        (lambda s, x: vmap(vmap(lambda a: a @ a.T))(x), 4 * 3 * 8 * 8 * 8),
        (lambda s, x: vmap(vmap(s.l))(x), 4 * 3 * 8 * 8 * 5),
        (lambda s, x: vmap(lambda i, k: F.conv2d(i[None], k)[0])(x, s.l(x).view(4, 5, 3, 2, 4)), 3840 + 4 * 35 * 120),
        (lambda s, x: jvp(s.c, (x,), (x,))[1], 3 * ONE),
        (lambda s, x: grad(lambda v: s.c(v).sum())(x), 2 * ONE),
        (lambda s, x: vmap(grad(lambda v: s.c(v[None]).sum()))(x), 2 * ONE),
        (lambda s, x: vjp(s.c, x)[1](torch.ones(4, 4, 8, 8))[0], 2 * ONE),
    ],
)  # fmt: skip
def test_function_transforms_count_all_lanes(function: Any, total: int) -> None:
    captured = check(Fn(function, c=conv(), l=nn.Linear(8, 5)), X, total=total)
    assert captured.coverage.capture == "whole"


def test_an_ensemble_by_functional_call() -> None:
    members = [nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 5)) for _ in range(3)]
    weights, buffers = stack_module_state([member.eval() for member in members])

    def ensemble(s: Any, x: Tensor) -> Tensor:
        stacked = {name: getattr(s.weights, name.replace(".", "_")) for name in weights}
        call = vmap(lambda w, b, x: functional_call(s.base[0], (w, b), (x,)), in_dims=(0, 0, None))
        out: Tensor = call(stacked, buffers, x)
        return out

    stored = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(w.detach()) for name, w in weights.items()})
    check(Fn(ensemble, weights=stored, base=members[:1]), X, total=3 * (ONE + 4 * 256 * 5))


def test_gradients_of_the_models_own_weights_need_values() -> None:
    def gradient(s: Any, x: Tensor) -> Any:
        return grad(lambda w: functional_call(s.c, w, (x,)).sum())(dict(s.c.named_parameters()))["weight"]

    model = Fn(gradient, c=conv())
    before = [p.clone() for p in model.parameters()]
    check(model, X, total=2 * ONE, values="real")
    assert all(map(torch.equal, model.parameters(), before))


# -------------------------------------------------------------------------------------------------- threads


def _threads(s: Any, x: Tensor) -> Tensor:
    outputs: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: outputs.update({i: s.b[i](x)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outputs[0] + outputs[1]


def _pool(s: Any, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(lambda m: m(x), s.b)), 1)


def _functions(s: Any, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(lambda m: F.conv2d(x, m.weight, padding=1), s.b)), 1)


def _thread_pool(s: Any, x: Tensor) -> Tensor:
    with ThreadPool(2) as pool:
        return torch.cat(pool.map(lambda m: m(x), s.b), 1)


def _nested(s: Any, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        inner = first.submit(lambda: second.submit(s.b[0], x).result() * 2)
        return torch.cat([inner.result(), s.b[1](x)], 1)


@pytest.mark.parametrize("function", [_threads, _pool, _functions, _thread_pool, _nested])
def test_work_in_other_threads_is_recorded(function: Any) -> None:
    captured = check(Fn(function, b=nn.ModuleList([conv(), conv()])), X, total=2 * ONE)
    assert captured.coverage.in_graph == 2
    assert {layer.path for layer in captured.layers} == {"b.0", "b.1"}


def test_work_in_threads_started_before() -> None:
    with ThreadPoolExecutor(1) as pool, ThreadPool(1) as old:
        pool.submit(int).result()
        check(Fn(lambda s, x: pool.submit(s.c, x).result(), c=conv()), X, total=ONE)
        check(Fn(lambda s, x: old.apply(s.c, (x,)), c=conv()), X, total=ONE)
        unseen = capture(Fn(lambda s, x: old.apply(lambda v: F.conv2d(v, s.c.weight), (x,)), c=conv()), X)
    assert unseen.coverage.unpriced == (("unseen code", 1),)
    assert any("too low" in note for note in unseen.notes)


def test_a_model_that_runs_in_another_thread_meanwhile_is_left_alone() -> None:
    model, results = conv(), []

    def forward(s: Any, x: Tensor) -> Tensor:
        old.apply(lambda: results.append(model(torch.ones(1, 3, 8, 8))))
        out: Tensor = s.c(x)
        return out

    with ThreadPool(1) as old:
        captured = capture(Fn(forward, c=model), X)
    assert macs(captured) == ONE
    assert not results[0].is_meta


# ------------------------------------------------------------------------------------- outside the model's tree


class _PlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [conv(), nn.Conv2d(4, 4, 1)]
        self.heads = {"a": [nn.Linear(8, 2)]}

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.heads["a"][0](x)
        return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_modules_in_plain_containers(device: str) -> None:
    with torch.device(device):
        model = _PlainList()
    captured = check(model, X, total=ONE + 4 * 64 * 16 + 4 * 4 * 8 * 16)
    assert captured.coverage.capture == "whole"
    assert [layer.path for layer in captured.layers] == ["blocks.0", "blocks.1", "heads.a.0"]
    assert captured.params == sum(layer.params for layer in captured.layers) == 0
    assert any("ModuleList" in note and "6 weights" in note for note in captured.notes)
    rows = pwrewrite.analyze(model, X).layers
    assert "ModuleList" in str([row.skip for row in rows if row.layer.path == "blocks.0"])


def test_modules_made_in_forward() -> None:
    check(Fn(lambda s, x: nn.Conv2d(4, 2, 1)(s.c(x)), c=conv()), X, total=ONE + 4 * 64 * 8)


# -------------------------------------------------------------------------------------- higher-order operators


def test_cond_records_both_branches() -> None:
    model = Fn(lambda s, x: torch.cond(x.mean() > 0, lambda v: s.a(v), lambda v: s.b(v), (x,)), a=conv(), b=conv())
    captured = check(model, X, total=2 * ONE)
    assert captured.coverage.in_graph == 2
    assert any("both branches" in note for note in captured.notes)


def test_while_loop_counts_one_round_and_says_so() -> None:
    from torch._higher_order_ops.while_loop import while_loop

    def loop(s: Any, x: Tensor) -> Tensor:
        result: Tensor = while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, s.c(v)), (torch.tensor(0), x))[1]
        return result

    captured = capture(Fn(loop, c=nn.Conv2d(3, 3, 3, padding=1)), X)
    assert macs(captured) == 4 * 64 * 81
    assert captured.coverage.unpriced == (("higher_order::while_loop", 1),)


@pytest.mark.filterwarnings("ignore")
def test_map_and_flex_attention_are_priced() -> None:
    from torch._higher_order_ops import map as map_over
    from torch.nn.attention.flex_attention import flex_attention

    check(Fn(lambda s, x: map_over(lambda v: s.c(v[None])[0], x), c=conv()), X, total=ONE)
    q = torch.zeros(2, 2, 16, 8)
    check(Fn(lambda s, x: flex_attention(x, x, x)), q, total=2 * 2 * 16 * 16 * 16)
    check(Fn(lambda s, x: flex_attention(x, x, x, score_mod=lambda t, b, h, i, j: t + i - j)), q, total=16384)


def test_what_is_compiled_in_forward_is_recorded() -> None:
    compiler = torch.compile
    check(Fn(lambda s, x: torch.compile(s.c, fullgraph=True)(x), c=conv()), X, total=ONE)
    assert torch.compile is compiler


# ------------------------------------------------------------------------------------------------ odd tensors


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_tensors(layout: str) -> None:
    matrix = torch.eye(10).to_sparse() if layout == "coo" else torch.eye(10).to_sparse_csr()
    model = Fn(lambda s, x: torch.sparse.mm(s.adj, s.l(x)), l=nn.Linear(16, 8))
    model.register_buffer("adj", matrix)
    captured = check(model, torch.zeros(10, 16), total=10 * 16 * 8 + 10 * 8, values="real")
    assert captured.params == 136
    assert captured.layer("l").macs == 1280
    assert any("stored elements" in note for note in captured.notes)
    held = matrix.values().nbytes if layout == "csr" else matrix._values().nbytes
    assert captured.weight_bytes > 136 * 4 + held
    check(Fn(lambda s, a: torch.sparse.mm(a, s.w), w=nn.Parameter(torch.zeros(10, 8))), matrix, total=80, values="real")


def test_uninitialized_quantized_nested_and_complex_tensors() -> None:
    model = Fn(lambda s, x: s.c(x), c=conv())
    model.unset = nn.UninitializedParameter()
    model.register_buffer("q", torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.quint8))
    model.register_buffer("n", torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(1, 3)]))
    model.register_buffer("z", torch.zeros(3, dtype=torch.complex64))
    captured = check(model, X, total=ONE)
    assert captured.params == 112
    assert captured.weight_bytes == 112 * 4 + 4 + 36 + 24
    for kind in ("uninitialized", "quantized", "nested", "complex"):
        assert any(kind in note for note in captured.notes), kind
    assert pwrewrite.analyze(model, X).params == 112


# ------------------------------------------------------------------------------------- devices and containers


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.c(x.cuda()).cpu(),
        lambda s, x: s.c(x.to("cuda:0", non_blocking=True)).to(torch.device("cpu")),
        lambda s, x: s.c(x + torch.zeros(1, device="cuda")),
        lambda s, x: s.c(x * x.new_ones(1, device=torch.device("cuda"))),
    ],
)
def test_moves_to_a_device_need_neither_it_nor_values(function: Any) -> None:
    check(Fn(function, c=conv()), X, total=ONE)


def test_moves_to_a_device_in_a_real_run() -> None:
    check(Fn(lambda s, x: s.c(x.cuda() if x.sum() > -1 else x).cpu(), c=conv()), X, total=ONE, values="real")


@dataclass(frozen=True)
class _Record:
    x: Tensor
    count: int = 3


class _Slots:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize(
    "value", [UserDict(x=X), _Record(X), _Slots(X), SimpleNamespace(x=X, name="a")], ids=lambda v: type(v).__name__
)
def test_containers_of_the_users_own(value: Any) -> None:
    kinds: list[type] = []

    def forward(s: Any, batch: Any) -> Any:
        kinds.append(type(batch))
        x = batch["x"] if isinstance(batch, UserDict) else batch.x
        return SimpleNamespace(out=s.c(x))

    captured = check(Fn(forward, c=conv()), value, total=ONE)
    assert kinds[-1] is type(value)
    assert [name for name, _ in captured.inputs] == ["args_0_x" if isinstance(value, UserDict) else "args_0_0"]
    assert info(captured.graph.output_node()).inputs[0].shape == (4, 4, 8, 8)


# ------------------------------------------------------------------------------------------ dispatched operations


def test_exported_programs_and_dispatched_operations() -> None:
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(4, 4, 2, 2)).eval()
    total = ONE + 4 * 16 * 16 * 4
    program = torch.export.export(net, (X,))
    for module in (program.module(), program.run_decompositions().module()):
        captured = check(module, X, total=total)
        assert [layer.op for layer in captured.layers] == ["conv2d", "conv_transpose2d"]
        assert [layer.path for layer in captured.layers] == ["0", "4"]
    aten = torch.ops.aten

    def direct(s: Any, x: Tensor) -> Any:
        y = aten.conv2d(x, s.c.weight, s.c.bias, [1, 1], [1, 1])
        return aten.convolution.default(y, s.d.weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)

    captured = check(Fn(direct, c=conv(), d=nn.Conv2d(4, 4, 1)), X, total=ONE + 4 * 64 * 16)
    assert [layer.path for layer in captured.layers if layer.called] == ["c", "d"]


# -------------------------------------------------------------------------------------------- hooks and messages


@pytest.mark.parametrize(
    ("layer", "total"), [(conv(), ONE), (nn.BatchNorm2d(3), 0), (nn.ReLU(), 0), (nn.Linear(8, 8), 12 * 8 * 64)]
)
def test_hooks_on_a_model_that_decides_by_a_value(layer: nn.Module, total: int) -> None:
    layer.register_forward_hook(lambda m, i, o: o * 0.7)
    layer.register_forward_pre_hook(lambda m, i: (i[0] + 1,))

    def forward(s: Any, x: Tensor) -> Tensor:
        y: Tensor = s.c(x)
        return y * 0.5 if y.sum() > 0 else y

    check(Fn(forward, c=layer), X, total=total, values="real")


def test_messages_name_no_addresses_and_cut_no_words() -> None:
    text = f"{object()} was passed to {check} " + "and more words " * 40
    short = shortened(text)
    assert "0x" not in short
    assert len(short) < 210
    assert short.endswith(" …")
    assert short.removesuffix(" …").split()[-1] in ("and", "more", "words")
    assert "0x" not in first_line(ValueError(text))
    with pytest.raises(CaptureError) as caught:
        capture(Fn(lambda s, x: s.missing(object())), X)
    assert "0x" not in str(caught.value)


def test_inputs_of_another_dtype_are_told_the_dtype() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(conv().half(), X)
    assert "takes float16, got float32" in str(caught.value)
    assert "--input 4x3x8x8:float16" in str(caught.value.hint)
    with pytest.raises(CaptureError) as caught:
        capture(conv(), X[:, :2])
    assert "give the shape" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("layer", "given", "said"),
    [
        (nn.Conv1d(6, 4, 3), (1, 6, 8, 8), "1x6x1024"),
        (nn.Conv3d(5, 4, 3), (1, 3, 224, 224), "1x5x16x112x112"),
        (nn.Conv2d(1, 4, 3), (1, 3, 64, 64), "1x1x224x224"),
        (nn.Linear(7, 4), (1, 8), "1x7"),
        (nn.BatchNorm2d(3), (1, 4, 8, 8), "1x3x224x224"),
    ],
)
def test_inputs_of_another_shape_are_told_one_of_the_right_rank(
    layer: nn.Module, given: tuple[int, ...], said: str
) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(nn.Sequential(layer), torch.empty(given, device="meta"))
    assert f"such as --input {said}, " in str(caught.value.hint)


def test_inputs_in_a_dict_are_called_by_its_keys() -> None:
    class Batch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, batch: dict[str, Any], other: dict[str, Any]) -> Tensor:
            return self.conv(batch["image"]) + batch["more"]["scale"] * other["not a name"] * other["x"]  # type: ignore[no-any-return]

    x, one = torch.randn(1, 3, 8, 8), torch.ones(1)
    inputs = ({"image": x, "many": 3, "more": {"scale": one}}, {"not a name": one, "x": one})
    captured = capture(Batch(), inputs)
    names = [node.name for node in captured.graph.nodes if node.op == "placeholder"]
    assert names == ["batch_image", "batch_more_scale", "other_0", "other_1"]
