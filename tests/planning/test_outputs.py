"""What outputs are is told by their values, and an accuracy exists only where labels fit them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pwrewrite.core.errors import UsageError
from pwrewrite.planning.outputs import accuracy, class_scores, compare, kind_of_outputs, log_probabilities, scoring

SCORES = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        (SCORES, "logits"),
        (SCORES.log_softmax(1), "logits"),
        ({"logits": SCORES}, "logits"),
        (SCORES.softmax(1), "probabilities"),
        (SCORES.softmax(1).bfloat16(), "probabilities"),
        (SCORES.sigmoid(), "values"),
        (100 * SCORES.sigmoid(), "values"),
        (SCORES.relu(), "values"),
        (F.normalize(SCORES), "values"),
        (SCORES[:, :1], "values"),
        (SCORES[:, 0], "values"),
        (torch.randn(6, 4, 8, 8), "values"),
        ((SCORES, SCORES), "values"),
    ],
)
def test_outputs_are_told_apart_by_value(outputs: Any, kind: str) -> None:
    assert kind_of_outputs(outputs) == kind
    assert (class_scores(outputs, kind) is None) == (kind == "values")


def test_labels_of_several_classes_speak_against_class_scores() -> None:
    several = torch.tensor([[1, 1, 0, 0]] * 6)
    assert kind_of_outputs(SCORES, several) == "values"
    assert kind_of_outputs(SCORES, F.one_hot(CLASSES)) == "logits"


def test_probabilities_are_no_logits() -> None:
    expected = SCORES.double().log_softmax(1)
    torch.testing.assert_close(log_probabilities(SCORES.double().softmax(1), "probabilities"), expected)
    torch.testing.assert_close(log_probabilities(SCORES.double(), "logits"), expected)


class Head(nn.Module):
    """Gives a share of what it reads, through a function."""

    def __init__(self, scale: float, function: Any) -> None:
        super().__init__()
        self.scale, self.function = scale, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.scale * x)


def test_the_loss_of_probabilities_is_that_of_their_logits() -> None:
    losses = []
    for kind, function in (("logits", nn.Identity()), ("probabilities", nn.Softmax(1))):
        measured = compare(Head(1, function), Head(0.9, function), [((SCORES,), {})], kind)
        assert measured.kind == "classes"
        losses.append(measured.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_random_numbers_are_the_same_for_both_models() -> None:
    model = Head(1, lambda x: x + torch.randn_like(x) + torch.rand(()))
    state = torch.get_rng_state()
    assert compare(model, model, [((SCORES,), {})] * 3, "values").loss == 0
    assert torch.equal(torch.get_rng_state(), state)


def scored(outputs: Any, labels: Tensor) -> Any:
    """The accuracy of a model that gives some outputs, with the one behind it that gives their negative."""
    kind = kind_of_outputs(outputs(SCORES), labels)
    return accuracy((Head(1, outputs), Head(-1, outputs)), [((SCORES,), {})], labels, kind)


def test_each_kind_of_labels_has_its_own_accuracy() -> None:
    right = SCORES.argmax(1)
    share = float((SCORES.argmin(1) == right).float().mean())
    assert scored(lambda x: x, right) == ("accuracy on held-out inputs", (1.0, share))
    assert scored(lambda x: x, F.one_hot(right, 4)) == ("accuracy on held-out inputs", (1.0, share))
    assert scored(lambda x: x.softmax(1), right)[1][0] == 1
    positive = (SCORES[:, 0] > 0).long()
    for single in (lambda x: x[:, 0], lambda x: x[:, :1], lambda x: x[:, 0].sigmoid()):
        assert scored(single, positive) == ("accuracy on held-out inputs", (1.0, 0.0))
    several = (SCORES > 0).long()
    for columns in (lambda x: x, torch.sigmoid):
        assert scored(columns, several) == ("accuracy over all labels of held-out inputs", (1.0, 0.0))


def test_an_embedding_has_no_accuracy() -> None:
    generator = torch.Generator().manual_seed(1)
    embedding, labels = torch.randn(64, 128, generator=generator), torch.arange(64) % 10
    found = scoring(embedding, labels, "logits")
    assert isinstance(found, str)
    assert "no more often than chance" in found
    embedding[torch.arange(32), labels[:32]] += 10  # a classifier of which some classes do not occur, half right
    assert not isinstance(scoring(embedding, labels, "logits"), str)
    assert not isinstance(scoring(embedding[:4], labels, "logits"), str)  # too few to tell


@pytest.mark.parametrize(
    ("outputs", "labels", "said"),
    [
        (torch.randn(6, 4, 8, 8), CLASSES, "no class scores"),
        (torch.randn(6, 4, 2), F.one_hot(CLASSES), "no class scores"),
        (F.normalize(SCORES), CLASSES, "no class scores by their values"),
        (SCORES[:, 0], CLASSES, "one score for each input"),
        (SCORES, CLASSES - 100, "from -100 to -97, and the outputs have 4 classes"),
        (SCORES, CLASSES - 1, "from -1 to 2"),
        ((SCORES, SCORES), CLASSES, "2 outputs"),
    ],
)
def test_there_is_no_accuracy_where_labels_do_not_fit(outputs: Any, labels: Tensor, said: str) -> None:
    found = scoring(outputs, labels, kind_of_outputs(outputs))
    assert isinstance(found, str)
    assert said in found


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (CLASSES, r"calibration sample \d+.*\n.*from 0 to 2.*\n.*got: 3"),
        (F.one_hot(CLASSES), "got: 3"),
        (CLASSES.where(CLASSES != 0, 255), "got: (3|255)"),
        (CLASSES.where(CLASSES != 0, -1), "got: 3"),
    ],
)
def test_labels_beyond_the_classes_are_refused(labels: Tensor, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        scoring(SCORES[:, :3], labels, "logits")
    assert isinstance(scoring(SCORES[:, :3], labels, "values"), str)  # embeddings may have fewer axes than classes
