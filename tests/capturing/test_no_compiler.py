"""Torch's compiler is not imported for a capture, unless the model asks for it, and works afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

CAPTURE = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
from pwrewrite.capturing import capture

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.attention = nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2)
    def forward(self, x):
        x = torch.stack([F.gelu(self.conv(x)), F.glu(self.conv(x).repeat(1, 2, 1, 1), 1)]).norm(dim=0).roll(1, 2)
        x = torch.where(x > 0, x, -x).cumsum(1) // 2
        {extra}
        y = x.flatten(2).permute(2, 0, 1)
        return self.attention(y, y, y)[0]

model = Net().eval()
captured = capture(model, torch.zeros(1, 3, 12, 12))
"""


def run(code: str, extra: str = "pass") -> str:
    script = CAPTURE.replace("{extra}", extra) + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_not_imported() -> None:
    assert run("print('torch._dynamo' in sys.modules)") == "False"


def test_nothing_is_left_of_what_stood_for_it() -> None:
    found = run(
        """
import torch._dynamo
from torch._refs import where

def marks(function):
    inside = getattr(function, "__wrapped__", None)
    own = [(function, vars(function)["__dynamo_disable"])] if "__dynamo_disable" in vars(function) else []
    return own + (marks(inside) if inside else [])

print(sys.modules["torch._dynamo"] is torch._dynamo, len(torch._dynamo.__path__), marks(where))
compiled = torch.compile(model, backend="eager")
x = torch.randn(1, 3, 12, 12)
print(torch.equal(compiled(x), model(x)))
torch.where(torch.zeros(2, device="meta") > 0, torch.zeros(2, device="meta"), 2.0)
print([function is mark for function, mark in marks(where)])
"""
    )
    assert found.splitlines() == ["True 1 []", "True", "[False]"]


@pytest.mark.parametrize(
    "extra",
    [
        "torch._dynamo.graph_break()",
        "import torch._dynamo.config as config; assert config.cache_size_limit",
        "import torch._dynamo as it; x = it.disable(recursive=False)(lambda t: t * 2)(x)",
    ],
)
def test_who_asks_for_more_gets_it(extra: str) -> None:
    assert run("print(sys.modules['torch._dynamo'].__file__.endswith('__init__.py'))", extra) == "True"
