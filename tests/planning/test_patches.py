"""Rows of patches times the weight are the layer's output, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.forms.specs import linear_spec
from pwrewrite.planning.patches import batched, input_rows, output_rows, position_count, row_size

LAYERS = {
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), (3, 4, 9, 8)),
    "conv1d circular same": (nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (3, 4, 9)),
    "conv2d reflect even same": (nn.Conv2d(3, 5, (2, 4), padding="same", padding_mode="reflect"), (2, 3, 7, 8)),
    "conv3d": (nn.Conv3d(2, 4, (1, 2, 3), padding=1), (2, 2, 4, 5, 6)),
    "pointwise strided": (nn.Conv2d(4, 8, 1, stride=2), (2, 4, 7, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weight_are_the_output(name: str) -> None:
    layer, shape = LAYERS[name]
    spec = ConvSpec.of_module(layer)
    torch.manual_seed(0)
    x = torch.randn(shape)
    y = layer(x)
    weight = layer.weight.reshape(spec.groups, spec.out_channels // spec.groups, -1)
    bias = layer.bias.reshape(spec.groups, 1, -1)
    rows = input_rows(x, spec)
    assert rows.shape[-1] == row_size(spec)
    torch.testing.assert_close(rows @ weight.mT + bias, output_rows(y, spec))
    taken = torch.tensor([0, 3, position_count(x, spec, tuple(y.shape[2:])) - 1])
    torch.testing.assert_close(input_rows(x, spec, taken) @ weight.mT + bias, output_rows(y, spec, taken))


def test_linear_rows_are_all_leading_dims() -> None:
    layer, spec = nn.Linear(5, 3), linear_spec(5, 3, True)
    x = torch.randn(2, 4, 5)
    rows = input_rows(batched(x, spec), spec)
    assert rows.shape == (1, 8, 5)
    torch.testing.assert_close(rows @ layer.weight.T + layer.bias, output_rows(batched(layer(x), spec), spec))


def test_transposed_rows_are_the_inputs_channels() -> None:
    layer = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
    spec = ConvSpec.of_module(layer)
    x = torch.randn(3, 6, 4, 5)
    rows = input_rows(x, spec)
    assert rows.shape == (2, 60, 3)
    # With stride = kernel each tap writes positions of its own: tap (0, 0) those at even places.
    tap = layer.weight[:, :, 0, 0].reshape(2, 3, 2)
    made = output_rows(layer(x)[:, :, ::2, ::2] - layer.bias[:, None, None], spec)
    torch.testing.assert_close(rows @ tap, made)


def test_unbatched_inputs_gain_a_batch() -> None:
    spec = ConvSpec.of_module(nn.Conv2d(3, 4, 3))
    assert batched(torch.randn(3, 8, 8), spec).shape == (1, 3, 8, 8)
