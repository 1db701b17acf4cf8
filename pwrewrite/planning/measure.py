"""What a rewritten model really loses, on inputs that nothing was fitted to: `compare`, and `accuracy` with labels.

For class scores: the mean KL divergence of the predictions from the original's, and how often both name the same class.
For other outputs: half the squared relative error of each output tensor, summed over them. Both are what the prediction
predicts. A model that draws random numbers draws the same ones as the model that it is compared with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .outputs import Scoring, class_scores, floating, log_probabilities, scoring
from .running import Chunk, evaluating, run_seeded, samples_of

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


def compare(original: nn.Module, rewritten: nn.Module, chunks: Iterable[Chunk], outputs: str = "logits") -> Measured:
    """Runs both models in eval mode on inputs and compares their outputs, of a kind of `pwrewrite.planning.outputs`."""
    with torch.no_grad(), evaluating(original), evaluating(rewritten):
        seeded = ((run_seeded(original, c, i), run_seeded(rewritten, c, i), c) for i, c in enumerate(chunks))
        return compare_outputs(seeded, outputs)


def compare_outputs(results: Iterable[tuple[object, object, Chunk]], outputs: str) -> Measured:
    """Compares what two models made of inputs: the original's outputs, the other's, and the inputs."""
    loss, same, samples, kind = 0.0, 0, 0, "values"
    errors, powers = defaultdict[int, float](float), defaultdict[int, float](float)
    for first, second, chunk in results:
        samples += samples_of(*chunk)
        before, after = class_scores(first, outputs), class_scores(second, outputs)
        if before is not None and after is not None:
            kind = "classes"
            p, q = log_probabilities(before.double(), outputs), log_probabilities(after.double(), outputs)
            loss += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            continue
        for i, (a, b) in enumerate(zip(floating(first), floating(second))):
            if a.shape == b.shape:
                errors[i] += float((a - b).double().square().sum())
                powers[i] += float(a.double().square().sum())
    if kind == "classes":
        return Measured(loss / max(samples, 1), same / max(samples, 1), samples, kind)
    return Measured(sum(errors[i] / power for i, power in powers.items() if power > 0) / 2, None, samples, kind)


def accuracy(
    models: tuple[nn.Module, nn.Module], chunks: Iterable[Chunk], labels: Tensor, outputs: str
) -> tuple[str, tuple[float, float]] | str:
    """The share of labels, all those of some inputs in order, that two models get right.

    Returns:
        The name of the score and both values; or why there is none.
    """
    right, total, at = [0, 0], 0, 0
    how: Scoring | str = "there are no inputs"
    with torch.no_grad(), evaluating(models[0]), evaluating(models[1]):
        for number, chunk in enumerate(chunks):
            results = [run_seeded(model, chunk, number) for model in models]
            if not number:
                how = scoring(results[0], labels, outputs)
            if isinstance(how, str):
                return how
            of_chunk = labels[at : at + samples_of(*chunk)]
            rights = [how.right(result, of_chunk) for result in results]
            right = [so_far + int(each.sum()) for so_far, each in zip(right, rights)]
            total, at = total + rights[0].numel(), at + len(of_chunk)
    if isinstance(how, str):
        return how
    return how.name, (right[0] / max(total, 1), right[1] / max(total, 1))
