"""Runs a model over calibration inputs once and sums up what its layers see: `gather`.

**Inputs.** ``C = E[x xᵀ]`` over the patches ``x`` under the output positions (`pwrewrite.planning.patches`), with their
mean. Large maps are sampled: enough positions of every input that the patches outnumber their size several times.

**Gradients.** ``G = E[g gᵀ]``, ``g`` the gradient at one output position of the loss of one sample. The loss needs no
labels. Where the outputs are class scores (`pwrewrite.planning.outputs`) it is the cross-entropy of a label drawn from
the model's own prediction, so that ``G`` is a diagonal block of the Fisher information (Martens 2014, *New insights and
perspectives on the natural gradient method*; Martens & Grosse 2015): a change of the layer's outputs then changes the
predicted distribution, in KL divergence, by half its square in that norm, to second order. The scores are halved first
(`TEMPERATURE`): a sure model has gradients on the few inputs that it is in doubt about, and what these few say does not
hold for the rest. At 20 and 15% of the MACs, networks for digits with group norms that were shown unseen digits kept
84–95 and 66–68% at temperature 1, and keep 94–96 and 84–89% at 2; at 4, ResNet-20 loses more than at 1. For any other
outputs it is the inner product with Gaussian noise, scaled per output tensor to ``1/√(n·rms²)``: the same half square
is then half the expected squared relative error of the outputs. Class scores get that on top, off their mean: where a
model is sure of every input, as of those that it was trained on, the Fisher information is next to nothing, and the
errors that it lets through do not stay small. At 15% of the MACs, networks for digits kept 67 and 73% without that
floor, of 99, and keep 99 with it; ResNet-20 on CIFAR-10 kept 72% at 30%, and keeps 84.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..core.convolution import ConvSpec
from ..core.errors import RefusedError, first_line
from ..core.files import same_directory
from ..core.nested import Args, Kwargs
from .outputs import class_scores, floating, log_probabilities
from .patches import batched, input_rows, output_rows, position_count, row_size, sampled
from .running import Chunk, device_of, evaluating, samples_of
from .statistics import Between, LayerStatistics, Statistics, Watched

_LAYERS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
TEMPERATURE = 2.0
"""What class scores are divided by before gradients are taken; 1 leaves all to the few inputs that are in doubt."""
_ROWS_PER_SIZE = 8

Hook = Callable[[nn.Module | None, Args, Kwargs, Tensor], Tensor | None]
"""A forward hook: module, inputs by place and by name, output; what takes the output's place, if anything does."""


@dataclass(frozen=True)
class Gathering:
    """How statistics are gathered.

    Attributes:
        outputs: What the model's outputs are; None to gather no gradients.
        seed: With the number of the chunk, of positions, labels and noise drawn, and of what the model draws itself.
        expected: About how many samples there will be; decides how many positions of each are sampled.
        functions: Path and name of the weight of those layers that are called as functions and are no modules.
    """

    outputs: str | None = "logits"
    seed: int = 0
    expected: int | None = None
    functions: Mapping[str, str] = field(default_factory=dict)


def gather(
    model: nn.Module,
    layers: Watched,
    chunks: Iterable[Chunk],
    how: Gathering = Gathering(),
    *,
    start: Statistics | None = None,
    each: Callable[[Statistics], None] | None = None,
) -> Statistics:
    """Runs a model, which stays as it is, over calibration inputs once and sums up what its layers see.

    Args:
        start: Statistics of the first chunks, which are then passed over.
        each: Called after every chunk with the statistics by then.

    Raises:
        RefusedError: If an activation or a gradient holds NaN or Inf, an output NaN, or the model cannot be
            differentiated.
    """
    device, gradients = device_of(model), how.outputs is not None
    statistics = start or Statistics(kind="loss" if gradients else "activations")
    for path, spec in layers.items():
        if path not in statistics.layers:
            statistics.layers[path] = LayerStatistics.empty(spec, device)
    watch, skip = _Watch(statistics, how), statistics.chunks
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if gradients:
            needing = [p for p in model.parameters() if p.requires_grad]
            for parameter in needing:
                stack.callback(parameter.requires_grad_)
                parameter.requires_grad_(False)
        hooks: list[tuple[Tensor, Hook]] = []
        for path, spec in layers.items():
            if isinstance(spec, Between):
                for handle in watch.between(path, model.get_submodule(path), spec):
                    stack.callback(handle.remove)
            elif path in how.functions:
                hooks.append((attrgetter(how.functions[path])(model), watch.hook(path, spec)))
            else:
                handle = model.get_submodule(path).register_forward_hook(watch.hook(path, spec), with_kwargs=True)
                stack.callback(handle.remove)
        if hooks:
            stack.enter_context(_Functions(hooks))
        for number, (args, kwargs) in enumerate(chunks):
            if number < skip:
                continue
            seed = (how.seed * 1_000_003 + number) % 2**63
            torch.manual_seed(seed)
            watch.begin(samples_of(args, kwargs), torch.Generator().manual_seed(seed))
            with same_directory(), torch.set_grad_enabled(gradients):
                outputs = model(*args, **kwargs)
                if gradients:
                    _refuse_nan(outputs, model)
                    statistics.outcome = watch.backward(outputs)
            watch.end()
            if each is not None:
                each(statistics)
    for sums in statistics.layers.values():
        sums.finish()
    return statistics


class _Functions(TorchFunctionMode):
    """Shows hooks the calls of functions with certain weights, as if modules had made them."""

    def __init__(self, hooks: Sequence[tuple[Tensor, Hook]]) -> None:
        super().__init__()
        self._hooks = hooks

    def __torch_function__(
        self, func: Callable[..., Tensor], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in _LAYERS:
            used = args[1] if len(args) > 1 else kwargs.get("weight")
            for weight, hook in self._hooks:
                if weight is used:
                    replaced = hook(None, args, kwargs, output)
                    return output if replaced is None else replaced
        return output


class _Watch:
    """The hooks of one gathering: adds rows of inputs as layers run and rows of gradients as they come back."""

    def __init__(self, statistics: Statistics, how: Gathering) -> None:
        self.statistics, self.how = statistics, how
        self.roots: list[Tensor] = []
        self.pending: list[Callable[[], None]] = []
        self.going_back = False

    def begin(self, samples: int, generator: torch.Generator) -> None:
        """Starts a chunk."""
        self.samples, self.generator = samples, generator

    def end(self) -> None:
        """Ends a chunk: its rows count only now, so that an interruption leaves whole chunks."""
        for add in self.pending:
            add()
        self.pending.clear()
        self.roots.clear()
        self.statistics.samples += self.samples
        self.statistics.chunks += 1

    def hook(self, path: str, spec: ConvSpec) -> Hook:
        """The forward hook of a layer."""
        sums = self.statistics.layers[path]

        def after(module: nn.Module | None, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor | None:
            if self.going_back:
                return None
            x = batched((args[0] if args else kwargs["input"]).detach(), spec)
            count = position_count(x, spec, tuple(output.shape[output.dim() - spec.dims :]))
            taken, share = self._sampled(count, row_size(spec), spec)
            # The rows are taken now, since a later in-place operation may change what was read.
            rows = _checked(input_rows(x, spec, taken), path, "the input")
            self.pending.append(lambda: sums.add_inputs(rows, share))
            return None if self.how.outputs is None else self._follow(path, spec, sums, output)

        return after

    def between(self, path: str, module: nn.Module, watched: Between) -> tuple[RemovableHandle, RemovableHandle]:
        """Hooks a module from end to end; what is called otherwise than with one tensor is passed over."""
        sums, spec, axis = self.statistics.layers[path], watched.spec, -1 - watched.spec.dims
        reads = list[tuple[Tensor | None, float, Tensor, tuple[int, ...]]]()

        def before(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
            reads.clear()
            single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and not self.going_back
            if single and args[0].dim() >= spec.dims + 1 and args[0].shape[axis] == spec.in_channels:
                x = batched(args[0].detach(), spec)
                count = position_count(x, spec, spec.output_size(x.shape[2:]))
                taken, share = self._sampled(count, watched.size, spec)
                sizes = args[0].shape[axis + 1 :]
                size = spec.output_size(tuple(sizes)) if spec.dims else tuple(args[0].shape[:-1])
                reads.append((taken, share, input_rows(x, spec, taken).clone(), size))  # it may be written into

        def after(module: nn.Module, args: Args, kwargs: Kwargs, output: object) -> Tensor | None:
            if not reads or not isinstance(output, Tensor):
                return None
            taken, share, x, size = reads.pop()
            if tuple(output.shape[axis + 1 :] if spec.dims else output.shape[:-1]) != size:
                return None
            y = output_rows(batched(output.detach(), spec), spec, taken)
            rows = _checked(torch.cat([x, y], 2) if watched.joint else y - x, path, "what goes through")
            self.pending.append(lambda: sums.add_inputs(rows, share))
            return None if self.how.outputs is None else self._follow(path, spec, sums, output)

        register = module.register_forward_pre_hook(before, with_kwargs=True)
        return register, module.register_forward_hook(after, with_kwargs=True)

    def _follow(self, path: str, spec: ConvSpec, sums: LayerStatistics, output: Tensor) -> Tensor | None:
        """Makes sure that the gradient of an output comes back, and says what to do with it."""
        replaced = None
        if not output.requires_grad:
            output = output.detach().requires_grad_()
            self.roots.append(output)
            replaced = output.clone()  # a leaf must not be changed in place
        count = prod(output.shape[output.dim() - spec.dims :] if spec.dims else output.shape[:-1])
        taken, share = self._sampled(count, spec.out_channels // spec.groups, spec)

        def back(gradient: Tensor) -> None:
            rows = _checked(output_rows(batched(gradient.detach(), spec), spec, taken), path, "the gradient")
            self.pending.append(lambda: sums.add_gradients(rows, share))

        output.register_hook(back)  # type: ignore[no-untyped-call]
        return replaced

    def _sampled(self, count: int, size: int, spec: ConvSpec) -> tuple[Tensor | None, float]:
        """Positions to take of those there are, and how many each stands for."""
        per_sample = _ROWS_PER_SIZE * size / (self.how.expected or 64)
        taken = sampled(count, spec, per_sample, self.samples, self.generator)
        return taken, 1.0 if taken is None else count / len(taken)

    def backward(self, outputs: object) -> str:
        """Goes back from a loss of the outputs, and says what of: ``classes`` or ``values``; hooks add what comes."""
        tensors = [tensor for tensor in floating(outputs) if tensor.requires_grad]
        if not tensors or not self.roots:
            return ""
        kind = self.how.outputs or "values"
        scores = class_scores(outputs, kind)
        if scores is not None:
            predicted = log_probabilities(scores.float(), kind)
            tempered = (predicted / TEMPERATURE).log_softmax(1)
            drawn = torch.multinomial(tempered.detach().exp().cpu(), 1, generator=self.generator)
            loss = F.nll_loss(tempered, drawn[:, 0].to(tempered.device), reduction="sum")
            loss = loss + self._noisy(predicted - predicted.mean(1, keepdim=True))
        else:
            loss = torch.stack([self._noisy(t) for t in tensors]).sum()
        self.going_back = True  # what is computed again on the way is not counted again
        try:
            torch.autograd.backward(loss, inputs=self.roots)
        except RuntimeError as error:
            if "inplace operation" not in str(error) and "does not require grad" not in str(error):
                raise
            raise NoGradientsError(
                f"the model has no gradients on the calibration inputs: {first_line(error)[:160]}",
                expected="code that writes into no tensor that a layer before it needs for its gradient",
                hint="the sensitivity activations needs no gradients",
            ) from error
        finally:
            self.going_back = False
        return "values" if scores is None else "classes"

    def _noisy(self, output: Tensor) -> Tensor:
        """An output's inner product with noise, in units in which its squared gradient is a relative error."""
        values = output.float()
        noise = torch.randn(values.shape, generator=self.generator, device="cpu").to(values.device)
        per_sample = values.numel() / max(self.samples, 1)
        power = values.detach().square().mean().clamp(min=1e-30)
        return (values * noise).sum() / (per_sample * power).sqrt()


class NoGradientsError(RefusedError):
    """The model cannot be differentiated."""


def _refuse_nan(outputs: object, model: nn.Module) -> None:
    """Refuses outputs that hold NaN, and names the first weight that does."""
    if not any(bool(tensor.isnan().any()) for tensor in floating(outputs)):
        return
    named = (*model.named_parameters(), *model.named_buffers())
    weight = next((name for name, tensor in named if bool(tensor.isnan().any())), None)
    hint = "use a checkpoint without NaN" if weight else "look at the calibration inputs, and at the model's code"
    raise RefusedError(
        "the model's outputs hold NaN on the calibration data",
        got=f"NaN in the weight {weight} too" if weight else None,
        hint=hint,
    )


def _checked(rows: Tensor, path: str, what: str) -> Tensor:
    if not bool(torch.isfinite(rows).all()):
        hint = "look at the calibration inputs, and at the model in this dtype"
        what += " of a layer is not finite on the calibration data"
        raise RefusedError(what, where=path, got="NaN or Inf", hint=hint)
    return rows
