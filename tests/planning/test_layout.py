"""Weights in channels_last for a while: only inside, only where the models run so, and with the values they got."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pwrewrite.planning.layout import channels_last
from pwrewrite.workflows.recover import recover

X = torch.randn(40, 16, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions, with a look at the map between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu, width: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(16, width, 3), nn.Conv2d(width, 4, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x))).mean((2, 3))


def viewed(x: Tensor) -> Tensor:
    return x.view(len(x), -1).relu().view(x.shape)


def is_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def test_only_inside_and_with_the_values_of_inside() -> None:
    model = Net()
    storages = [p.data_ptr() for p in model.parameters()]
    with channels_last(model, fits=lambda: model(X)):
        assert all(map(is_last, (model.a.weight, model.b.weight)))
        assert is_last(model.a(X))
        with torch.no_grad():
            model.a.weight += 1
            wanted = model.a.weight.clone()
    assert torch.equal(model.a.weight, wanted)
    assert [p.data_ptr() for p in model.parameters()] == storages
    assert model.a.weight.is_contiguous()


def test_not_where_the_model_does_not_run_so() -> None:
    model = Net(viewed)
    with channels_last(model, fits=lambda: model(X)):
        assert model.a.weight.is_contiguous()
        model(X)


@pytest.mark.parametrize("change", ["narrow", "standardised", "meta"])
def test_not_for_other_weights(change: str) -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight.view(len(self.weight), -1).softmax(1).view(self.weight.shape))

    model = nn.Sequential(nn.Conv2d(2, 4, 3)) if change == "narrow" else nn.Sequential(Standardised(16, 16, 3))
    if change == "meta":
        model = nn.Sequential(nn.Conv2d(16, 16, 3, device="meta"))
    with channels_last(model, fits=lambda: None):
        assert model[0].weight.is_contiguous()


def test_after_an_error_too() -> None:
    model = Net()
    with pytest.raises(KeyError), channels_last(model, fits=lambda: None):
        raise KeyError
    assert model.a.weight.is_contiguous()


@pytest.mark.parametrize("between", [torch.relu, viewed])
def test_models_are_trained_so_and_come_back_as_they_were(between: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    original, smaller, seen = Net(between).eval(), Net(between, 8).eval(), list[bool]()
    original.a.register_forward_hook(lambda module, args, output: seen.append(is_last(output)))
    result = recover(original, smaller, X.split(10), "2epochs")
    assert result.report.after < result.report.before
    assert seen[-1] == (between is torch.relu)
    assert all(p.is_contiguous() for model in (original, smaller, result.model) for p in model.parameters())
