"""How far a rewritten model is from its original while it is trained: block outputs, then predictions.

Of a block, a module of both models that holds something rewritten, the squared error of the outputs relative to the
original's counts (Romero et al. 2015, *FitNets*); of class scores the KL divergence of the predictions (Hinton et al.
2015, *Distilling the knowledge in a neural network*, at temperature 1) and the relative error of the scores off their
mean, since a model that is sure of all that it was shown has a divergence that says next to nothing; of other outputs
half their squared relative error. Labels add the cross-entropy. What errors are relative to is measured once, so that
every loss is a mean over samples, however these are shared out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import RefusedError
from ..core.nested import tensors_of
from .outputs import class_scores, floating, log_probabilities
from .running import Chunk

LABELS = 0.1
"""What the cross-entropy with labels weighs beside the divergence from the original."""
SCORES = 0.1
"""What the relative error of class scores weighs."""


def blocks_of(original: nn.Module, rewritten: nn.Module) -> list[str]:
    """Paths of the modules around what was rewritten, in both models; the rewritten module where only the model is."""
    before, after = _shapes(original), _shapes(rewritten)
    changed = [path for path in after if path and path in before and before[path] != after[path]]
    inner = [path for path in changed if not any(other.startswith(f"{path}.") for other in changed)]
    blocks = {path.rpartition(".")[0] or path: None for path in inner}
    return [path for path in blocks if not isinstance(rewritten.get_submodule(path), (nn.ModuleList, nn.ModuleDict))]


def _shapes(model: nn.Module) -> dict[str, tuple[tuple[str, torch.Size], ...]]:
    """Path to the names and shapes of the parameters below it."""
    return {
        path: tuple((name, parameter.shape) for name, parameter in module.named_parameters())
        for path, module in model.named_modules()
    }


class Distilling(nn.Module):
    """The loss of a rewritten model against its original, as a module, so that it can be trained as one.

    Args:
        original: The teacher; in eval mode.
        student: The rewritten model.
        outputs: What their outputs are, see `pwrewrite.planning.outputs`.
        chunk: Inputs by which the levels of the original's outputs are measured.
        precision: What the models compute in, under ``torch.autocast``; None for as they are.

    Attributes:
        blocks: Paths of the blocks whose outputs are compared: those with outputs of the same shapes in both.

    Raises:
        RefusedError: If no output of the one has the shape that it has in the other.
    """

    def __init__(
        self, original: nn.Module, student: nn.Module, outputs: str, chunk: Chunk, precision: torch.dtype | None
    ) -> None:
        super().__init__()
        self.student, self._original = student, (original,)  # a tuple, whose parameters are none of this module's
        self._outputs, self._precision = outputs, precision
        blocks = blocks_of(original, student)
        with torch.no_grad():
            (results, of_blocks), (others, of_others) = (self._run(m, chunk, blocks) for m in (original, student))
        shapes = [{path: [t.shape for t in outputs[path]] for path in blocks} for outputs in (of_blocks, of_others)]
        self.blocks = [path for path in blocks if shapes[0][path] and shapes[0][path] == shapes[1][path]]
        self._levels = {path: [_level(t) for t in of_blocks[path]] for path in self.blocks}
        self._level = [_level(_centred(t) if self._scores(results) is not None else t) for t in floating(results)]
        self._loss(results, others, None)

    def forward(self, chunk: Chunk, labels: Tensor | None, blocks: bool) -> Tensor:
        """The loss on inputs: of the blocks' outputs, or of the model's."""
        paths = self.blocks if blocks else []
        with torch.no_grad():
            wanted, of_original = self._run(self._original[0], chunk, paths)
        results, of_student = self._run(self.student, chunk, paths)
        if blocks:
            errors = [
                _error(a, b, level)
                for path in paths
                for a, b, level in zip(of_original[path], of_student[path], self._levels[path])
            ]
            return torch.stack(errors).mean()
        return self._loss(wanted, results, labels)

    def _loss(self, wanted: object, results: object, labels: Tensor | None) -> Tensor:
        before, after = self._scores(wanted), self._scores(results)
        if before is None or after is None or before.shape != after.shape:
            tensors = floating(wanted), floating(results)
            errors = [_error(a, b, level) for a, b, level in zip(*tensors, self._level) if a.shape == b.shape]
            if not errors:
                expected, got = (", ".join(str(tuple(t.shape)) for t in each) or "none" for each in tensors)
                what = "the rewritten model has outputs of other shapes than the original"
                raise RefusedError(what, expected=expected, got=got, hint="narrow or project inner layers only")
            return torch.stack(errors).sum() / 2
        p, q = (log_probabilities(scores.float(), self._outputs) for scores in (before, after))
        loss = F.kl_div(q, p, reduction="batchmean", log_target=True)
        loss = loss + SCORES * _error(_centred(before), _centred(after), self._level[0])
        if labels is not None:
            loss = loss + LABELS * F.nll_loss(q, labels.to(q.device))
        return loss

    def _scores(self, results: object) -> Tensor | None:
        return class_scores(results, self._outputs)

    def _run(self, model: nn.Module, chunk: Chunk, paths: Sequence[str]) -> tuple[object, Mapping[str, list[Tensor]]]:
        """A model's outputs, and those of some of its modules, in the order of their calls."""
        args, kwargs = chunk
        device = next((t.device.type for t in tensors_of(chunk)), "cpu")
        mixed = torch.autocast(device, self._precision or torch.bfloat16, enabled=self._precision is not None)
        with recording(model, paths) as recorded, mixed:
            return model(*args, **kwargs), recorded


@contextmanager
def recording(model: nn.Module, paths: Sequence[str]) -> Iterator[Mapping[str, list[Tensor]]]:
    """The floating outputs of modules, in the order of their calls, while the model runs."""
    recorded = defaultdict[str, list[Tensor]](list)

    def recorder(path: str) -> Callable[[nn.Module, object, object], None]:
        return lambda module, args, output: recorded[path].extend(floating(output))

    handles = [model.get_submodule(path).register_forward_hook(recorder(path)) for path in paths]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _centred(scores: Tensor) -> Tensor:
    return scores - scores.mean(-1, keepdim=True)


def _level(tensor: Tensor) -> float:
    return float(tensor.detach().float().square().mean()) or 1.0


def _error(wanted: Tensor, got: Tensor, level: float) -> Tensor:
    """The mean squared error in units of a level."""
    return (wanted.float() - got.float()).square().mean() / level
