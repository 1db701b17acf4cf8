"""What a model's outputs are, and how far two models' are apart: `compare`, and `accuracy` with labels.

By its values a single output ``(N, classes)`` holds class scores, probabilities where the rows are not negative and sum
to 1, logits else, log-probabilities included. Rows that are never negative and sum to something else (sigmoids,
coordinates, counts), and rows of length 1 (embeddings), are no class scores. An embedding without such a scale looks
like logits: there ``--outputs values`` helps, and labels that it names no better than chance give no accuracy.

An accuracy exists where labels fit the outputs (`scoring`): a class each and class scores, 0 or 1 and a single score
each, or 0 and 1 for every column.

A loss is of the kind that is predicted: for class scores the mean KL divergence of the predictions from the original's;
for other outputs half the squared relative error of each output tensor, summed over them. A model that draws random
numbers draws the same ones as the model that it is compared with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import UsageError
from ..core.nested import tensors_of
from .running import Chunk, evaluating, run_seeded, samples_of

_ROUNDING = {2: 2e-2, 4: 1e-3, 8: 1e-3}
"""How far sums of probabilities, and lengths, may be from 1, by the bytes of a number."""
FAR = 4.0
"""A measured loss is far from the predicted one from this factor on."""
_ACCURACY = "accuracy on held-out inputs"


def floating(outputs: object) -> list[Tensor]:
    """The floating tensors in a model's outputs, in order."""
    return [tensor for tensor in tensors_of(outputs) if tensor.is_floating_point()]


def class_scores(outputs: object, kind: str = "logits") -> Tensor | None:
    """The class scores ``(N, classes)`` in outputs of a kind; None where there are none."""
    tensors = floating(outputs)
    if kind == "values" or len(tensors) != 1 or tensors[0].dim() != 2 or tensors[0].shape[1] < 2:
        return None
    return tensors[0]


def kind_of_outputs(outputs: object, labels: Tensor | None = None) -> str:
    """Whether outputs are ``logits``, ``probabilities`` or other ``values``.

    Several classes for one input in its labels speak against class scores, and so do classes that these name no better
    than chance.
    """
    scores = class_scores(outputs)
    if scores is None or (labels is not None and labels.dim() == 2 and not _one_hot(labels)):
        return "values"
    rows, near = scores.detach().double().cpu(), _ROUNDING[scores.dtype.itemsize]
    if bool((rows >= 0).all()) and float((rows.sum(1) - 1).abs().max()) <= near:
        return "probabilities"
    unit = float((rows.norm(dim=1) - 1).abs().max()) <= near
    unrelated = labels is not None and labels.dim() == 1 and _unrelated(scores, labels)
    return "values" if bool((rows >= 0).all()) or unit or unrelated else "logits"


def log_probabilities(scores: Tensor, kind: str) -> Tensor:
    """The logarithms of what class scores predict ``(N, classes)``."""
    return (scores.clamp_min(1e-12).log() if kind == "probabilities" else scores).log_softmax(-1)


class Scoring(NamedTuple):
    """How outputs are held against labels: the score's name, and from where on one stands for 1, None for classes."""

    name: str
    threshold: float | None

    def right(self, outputs: object, labels: Tensor) -> Tensor:
        """Which labels outputs get right: by the largest score, or by each score alone."""
        scores = floating(outputs)[0].detach().float().cpu()
        if self.threshold is None:
            return scores.argmax(1) == _classes(labels)
        return (scores.reshape(labels.shape) > self.threshold) == labels.bool()


def scoring(outputs: object, labels: Tensor, kind: str) -> Scoring | str:
    """How outputs of a kind are held against labels, or why there is no way to.

    Labels are those of these inputs and of all after them, ``(M,)`` or, 0 and 1, ``(M, columns)``.

    Raises:
        UsageError: The outputs are class scores, and a label is beyond their classes.
    """
    tensors = floating(outputs)
    if len(tensors) != 1:
        return f"the model gives {len(tensors)} outputs, and a label is for one"
    shape, shown = tuple(tensors[0].shape), "×".join(("N", *map(str, tensors[0].shape[1:])))
    within = bool(((tensors[0] >= 0) & (tensors[0] <= 1)).all())
    threshold = 0.5 if kind == "probabilities" or within else 0.0
    single = shape[1:] in ((), (1,))
    if labels.dim() == 1 and single:
        if not bool(((labels == 0) | (labels == 1)).all()):
            return f"the model gives one score for each input, and the labels go up to {int(labels.max())}"
        return Scoring(_ACCURACY, threshold)
    columns = labels.dim() == len(shape) == 2 and shape[1] == labels.shape[1]
    if columns and (kind == "values" or not _one_hot(labels)):
        return Scoring("accuracy over all labels of held-out inputs", threshold)
    if len(shape) != 2 or shape[1] < 2:
        return f"there is one label for each input, and the outputs are {shown}: no class scores"
    check_labels(outputs, labels, kind)
    classes = labels.shape[1] - 1 if labels.dim() == 2 else int(labels.max())
    if classes >= shape[1] or int(labels.min()) < 0 or (labels.dim() == 2 and labels.shape[1] != shape[1]):
        return f"the labels go from {int(labels.min())} to {classes}, and the outputs have {shape[1]} classes"
    if _unrelated(tensors[0], labels):
        return (
            f"the largest of the {shape[1]} outputs names the label no more often than chance would: they are no "
            f"scores of the {classes + 1} classes of the labels"
        )
    if kind == "values":
        return f"the outputs, {shown}, are no class scores by their values (--outputs logits says that they are)"
    return Scoring(_ACCURACY, None)


def check_labels(outputs: object, labels: Tensor, kind: str) -> None:
    """Refuses labels beyond the classes of class scores; negative ones pass, since they stand for "ignored" or so."""
    scores = class_scores(outputs, kind)
    if scores is None or (labels.dim() == 2 and not _one_hot(labels)):
        return
    classes = _classes(labels)
    beyond = (classes >= scores.shape[1]).nonzero().flatten().tolist()
    if beyond:
        raise UsageError(
            "a label is beyond the classes that the model's outputs have",
            where=f"calibration sample {beyond[0]}" + (f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""),
            expected=f"a class from 0 to {scores.shape[1] - 1}, or a negative number for none",
            got=str(int(classes[beyond[0]])),
            hint="outputs that are no class scores are told by --outputs values, outputs='values'",
        )


def _unrelated(scores: Tensor, labels: Tensor) -> bool:
    """Whether there are more scores than classes, and the largest one names the labels no better than by chance."""
    classes, predicted = _classes(labels), scores.detach().cpu().argmax(1)
    count, top = len(predicted), scores.shape[1]
    if count < 8 or int(classes.max()) + 1 >= top or int(classes.min()) < 0:
        return False
    right = float((predicted == classes[:count]).float().mean())
    shares = [torch.bincount(each, minlength=top).double() / len(each) for each in (predicted, classes)]
    chance = float((shares[0] * shares[1]).sum())
    return right < 0.5 and right <= chance + 2 * (chance * (1 - chance) / count) ** 0.5


def _classes(labels: Tensor) -> Tensor:
    return labels.argmax(1) if labels.dim() == 2 else labels


def _one_hot(labels: Tensor) -> bool:
    return bool((labels.sum(1) == 1).all())


@dataclass(frozen=True, slots=True)
class Measured:
    """How far two models are apart on so many held-out inputs, of ``classes`` or ``values``.

    Attributes:
        loss: In the unit of the prediction: mean KL divergence in nats, or half the squared relative error.
        agreement: How often both name the same class; None where they name none.
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
    """The name of a score, and which share of the inputs' labels two models get right; or why there is none."""
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
