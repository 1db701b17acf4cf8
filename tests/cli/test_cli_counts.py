"""`pwrewrite analyze --as TOOL` and `--explain-count`."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from pwrewrite.analysis.conventions import TOOLS
from pwrewrite.cli import options

Run = Callable[..., Result]
RESNET50 = Path(__file__).parents[2] / "examples" / "resnet50.py"
TOTALS = {
    "torch": 4_089_184_256,
    "fvcore": 4_111_512_576,
    "thop": 4_133_742_592,
    "ptflops": 4_132_436_968,
    "torchinfo": 4_089_238_376,
}


def test_the_option_names_every_tool() -> None:
    assert options.TOOLS == TOOLS == tuple(TOTALS)


def test_the_total_of_a_tool_takes_the_place_of_ours(run: Run) -> None:
    plain = run("analyze", RESNET50).stdout
    table = run("analyze", RESNET50, "--as", "fvcore").stdout
    assert "MACs 4.09 G (4,089,184,256)" in plain
    assert "flops 4.11 G (4,111,512,576) as fvcore counts · weights" in table
    assert "4,089,184,256" not in table
    assert table.splitlines()[4:] == plain.splitlines()[4:]
    markdown = run("analyze", RESNET50, "--as", "thop", "--format", "markdown").stdout
    assert "MACs 4.13 G (4,133,742,592) as thop counts" in markdown


def test_json_keeps_its_totals_and_adds_the_convention(run: Run) -> None:
    plain = json.loads(run("analyze", RESNET50, "--format", "json").stdout)
    data = json.loads(run("analyze", RESNET50, "--format", "json", "--as", "torchinfo").stdout)
    assert data.pop("convention") == {"tool": "torchinfo", "total": 4_089_238_376, "unit": "mult-adds"}
    assert data == plain


def test_explanations_in_every_format(run: Run) -> None:
    table = run("analyze", RESNET50, "--explain-count").stdout
    assert "How others count  beside our 4,089,184,256 MACs" in table
    assert all(f"{total:,}" in table for total in TOTALS.values())
    assert "+22,227,968 batch norm, 2 per element (53 calls)" in table
    markdown = run("analyze", RESNET50, "--explain-count", "--format", "markdown").stdout
    assert "| ptflops | 4,132,436,968 | MACs | +43,252,712 (+1.1%) |" in markdown
    data = json.loads(run("analyze", RESNET50, "--explain-count", "--format", "json").stdout)
    assert {entry["tool"]: entry["total"] for entry in data["counts"]} == TOTALS
    assert "convention" not in data
    text = run("analyze", RESNET50, "--explain-count", "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert {row["tool"]: int(row["counted"]) for row in rows if row["kind"] == "total"} == TOTALS


@pytest.mark.parametrize("form", ["table", "json", "markdown", "csv"])
def test_the_file_is_what_would_be_printed(run: Run, folder: Path, form: str) -> None:
    options = ("net.py", "--as", "ptflops", "--explain-count", "--format", form)
    printed = run("analyze", *options)
    assert printed.exit_code == 0, printed.stderr
    assert run("analyze", *options, "--output", "out.txt").stdout == ""
    assert (folder / "out.txt").read_bytes() == printed.stdout_bytes


def test_what_is_not_exact_is_said(run: Run, folder: Path) -> None:
    (folder / "rnn.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.conv, self.rnn = nn.Conv1d(4, 8, 3), nn.GRU(8, 8)\n"
        "    def forward(self, x):\n        return self.rnn(self.conv(x).permute(2, 0, 1))[0]\n\n\n"
        "example_inputs = torch.zeros(1, 4, 16)\n"
    )
    assert "not exact: thop has formulas of its own for recurrent" in run("analyze", "rnn.py", "--as", "thop").stdout
    markdown = run("analyze", "rnn.py", "--as", "thop", "--format", "markdown").stdout
    assert "\n\nnot exact: thop has formulas" in markdown


def test_unknown_tool_and_unknown_target(run: Run) -> None:
    refused = run("analyze", RESNET50, "--as", "calflops")
    assert refused.exit_code == 2
    assert "torchinfo" in refused.stderr
    assert run("analyze", "missing.py", "--as", "thop").exit_code == 2
