"""What a model's outputs are, by value: class scores as logits or as probabilities, or any other values.

A single output ``(N, classes)`` holds class scores. They are probabilities where the rows are not negative and sum to
1; logits else, log-probabilities included. Rows that are never negative and sum to something else (sigmoids,
coordinates, counts), and rows of length 1 (embeddings), are no class scores. An embedding without such a scale looks
like logits: there ``--outputs values`` helps, and labels that it names no better than chance give no accuracy.

An accuracy exists where labels fit the outputs (`scoring`): a class each and class scores, 0 or 1 and a single score
each, or 0 and 1 for every column.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.nested import tensors_of

_ROUNDING = {2: 2e-2, 4: 1e-3, 8: 1e-3}
"""How far sums of probabilities, and lengths, may be from 1, by the bytes of a number."""
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

    Args:
        outputs: What the model gives for some inputs.
        labels: The labels of these inputs; several classes for one input speak against class scores, and so do classes
            that they name no better than chance.
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

    Args:
        outputs: What the model gives for some inputs.
        labels: Labels of these inputs and those after them, ``(M,)`` or, 0 and 1, ``(M, columns)``.
        kind: What the outputs are.

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
