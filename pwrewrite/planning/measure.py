"""What a rewritten model really loses, on inputs that nothing was fitted to: `compare`.

For a classifier (one output ``(N, classes)``): the mean KL divergence of its predictions from the original's, which is
what the prediction predicts, and how often both name the same class. For other outputs: half the squared relative error
of each output tensor, summed over them, which is what the prediction predicts there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .running import evaluating, is_classifier, tensors_in
from .statistics import Chunk, samples_of

FAR = 4.0
"""A measured loss is far from the predicted one from this factor on."""


@dataclass(frozen=True, slots=True)
class Measured:
    """How far two models are apart on held-out inputs.

    Attributes:
        loss: In the unit of the prediction: mean KL divergence in nats, or half the squared relative error.
        agreement: How often both name the same class; None where they name none.
        samples: How many inputs were compared.
        kind: ``classes`` or ``values``.
    """

    loss: float
    agreement: float | None
    samples: int
    kind: str

    def to_dict(self) -> dict[str, float | int | str | None]:
        """The same as plain JSON data."""
        return {"loss": self.loss, "agreement": self.agreement, "samples": self.samples, "kind": self.kind}


def compare(original: nn.Module, rewritten: nn.Module, chunks: Iterable[Chunk]) -> Measured:
    """Runs both models in eval mode and compares their outputs."""
    loss, same, samples, kind = 0.0, 0, 0, "values"
    errors: list[float] = []
    powers: list[float] = []
    with torch.no_grad(), evaluating(original), evaluating(rewritten):
        for args, kwargs in chunks:
            first, second = original(*args, **kwargs), rewritten(*args, **kwargs)
            samples += samples_of(args, kwargs)
            if is_classifier(first):
                kind = "classes"
                p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
                loss += float((p.exp() * (p - q)).sum())
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                continue
            pairs = [(a, b) for a, b in zip(tensors_in(first), tensors_in(second)) if a.is_floating_point()]
            errors += [0.0] * (len(pairs) - len(errors))
            powers += [0.0] * (len(pairs) - len(powers))
            for i, (a, b) in enumerate(pairs):
                if a.shape == b.shape:
                    errors[i] += _square(a - b)
                    powers[i] += _square(a)
    if kind == "classes":
        return Measured(loss / max(samples, 1), same / max(samples, 1), samples, kind)
    relative = sum(error / power for error, power in zip(errors, powers) if power > 0)
    return Measured(relative / 2, None, samples, kind)


def accuracy(model: nn.Module, chunks: Iterable[Chunk], labels: Tensor) -> float:
    """Share of inputs whose label is the class that a model names."""
    right, at = 0, 0
    with torch.no_grad(), evaluating(model):
        for args, kwargs in chunks:
            found = next(tensors_in(model(*args, **kwargs))).argmax(1).cpu()
            right += int((found == labels[at : at + len(found)]).sum())
            at += len(found)
    return right / max(at, 1)


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
