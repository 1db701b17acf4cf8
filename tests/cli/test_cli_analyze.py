"""What `pwrewrite analyze` prints and writes when all is well."""

import csv
import io
import json
import os
import re
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from messages import messages
from rich.cells import cell_len
from typer.testing import Result
from warm_python import python

import pwrewrite

Run = Callable[..., Result]
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_table_in_100_columns(run: Run) -> None:
    result = run("analyze", "net.py")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "net.py"
    assert any(line.startswith("Hotspots") for line in lines)
    assert any(line.startswith("graph") and "whole · 2/2 convolutions · all priced" in line for line in lines)
    assert max(map(cell_len, lines)) <= 100
    assert "\x1b" not in result.stdout
    assert messages(result.stderr) == ""


def test_columns_of_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    assert max(map(cell_len, run("analyze", "net.py").stdout.splitlines())) <= 72


def test_resnet50_as_a_person_reads_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole page; UPDATE_GOLDEN=1 in the environment accepts what it has become."""
    monkeypatch.chdir(EXAMPLES.parent)
    printed = run("analyze", "examples/resnet50.py").stdout_bytes
    golden = EXAMPLES.parent / "tests" / "golden" / "resnet50.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_bytes(printed)
    assert printed == golden.read_bytes()


def test_resnet50_to_the_last_digit(run: Run) -> None:
    result = run("analyze", EXAMPLES / "resnet50.py", "--format", "json")
    totals = json.loads(result.stdout)["totals"]
    assert totals["params"] == 25_557_032
    assert totals["macs"] == 4_089_184_256
    assert totals["flops"] == 8_178_368_512


def test_every_format_is_what_python_says(run: Run, folder: Path) -> None:
    data = json.loads(run("analyze", "net.py", "--format", "json").stdout)
    assert data["schema"] == "pwrewrite.analysis/1"
    assert data["model"]["target"] == "net.py"
    analysis = pwrewrite.analyze_target("net.py")
    assert data["totals"] == analysis.to_dict()["totals"]
    assert data["layers"] == analysis.to_dict()["layers"]
    rows = list(csv.DictReader(io.StringIO(run("analyze", "net.py", "--format", "csv").stdout, newline="")))
    assert [int(row["macs"]) for row in rows] == [layer["macs"] for layer in data["layers"]]
    markdown = run("analyze", "net.py", "--format", "markdown").stdout
    assert markdown.startswith("# `net.py`\n")


@pytest.mark.parametrize("form", ["table", "json", "markdown", "csv"])
def test_the_file_is_what_would_be_printed(run: Run, folder: Path, form: str) -> None:
    printed = run("analyze", "net.py", "--format", form)
    written = run("analyze", "net.py", "--format", form, "--output", "out.txt")
    assert written.exit_code == 0
    assert written.stdout == ""
    assert (folder / "out.txt").read_bytes() == printed.stdout_bytes
    assert not list(folder.glob(".*.part"))


def test_options_reach_the_model_and_the_report(run: Run) -> None:
    wide = run("analyze", "net.py", "--arg", "width=32", "--input", "2x3x16x16", "--format", "json")
    data = json.loads(wide.stdout)
    assert data["model"]["inputs"][0]["shape"] == [2, 3, 16, 16]
    assert {layer["path"]: layer["out_channels"] for layer in data["layers"]}["stem"] == 32
    everything = run("analyze", "net.py", "--all").stdout
    assert re.search(r"^head +linear", everything, re.MULTILINE)
    assert "├─ stem" in run("analyze", "net.py", "--tree").stdout
    assert "├─ body …" in run("analyze", "net.py", "--depth", "1").stdout
    assert "… and 1 more" in run("analyze", "net.py", "--top", "1").stdout
    shy = run("analyze", "net.py", "--hotspot-share", "99%")
    assert "no k×k convolution is a hotspot" in shy.stdout
    assert "a100" in run("analyze", "net.py", "--device", "a100").stdout
    by_name = run("analyze", "net.py", "--sort", "name", "--format", "csv").stdout.splitlines()
    assert [line.split(",")[0] for line in by_name[1:]] == ["body.1", "head", "stem"]


def test_what_the_model_prints_and_warns_stays_out_of_the_report(run: Run, folder: Path) -> None:
    text = (folder / "net.py").read_text()
    noise = 'import warnings\nprint("HELLO")\nwarnings.warn("BEWARE", RuntimeWarning)\n'
    (folder / "loud.py").write_text(noise + text.replace("        return", '        print("FORWARD")\n        return'))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run("analyze", "loud.py", "--format", "json")
    assert json.loads(result.stdout)["model"]["target"] == "loud.py"
    assert "HELLO" in result.stderr
    assert "FORWARD" in result.stderr
    with pytest.warns(RuntimeWarning, match="BEWARE"):
        run("analyze", "loud.py", "--debug")


def test_limits_are_checked_after_the_report(run: Run, folder: Path) -> None:
    assert run("analyze", "net.py", "--max-macs", "1G", "--max-params", "10k", "--strict").exit_code == 0
    result = run("analyze", "net.py", "--max-macs", "1M", "--max-params", "100", "--output", "report.txt")
    assert result.exit_code == 1
    assert (folder / "report.txt").read_text().startswith("net.py\n")
    expected = "written to report.txt\nerror: net.py: 2 of 2 limits exceeded: parameters, MACs\n"
    assert messages(result.stderr).startswith(expected)
    assert re.search(r"got: parameters: [\d,]+, at most 100; most: .*; MACs: [\d,]+, at most 1,000,000", result.stderr)


def test_an_operation_without_a_price_is_told_and_strict_refuses(run: Run, folder: Path) -> None:
    text = (folder / "net.py").read_text().replace("self.stem(x)", "torch.ops.pwcli.twice(self.stem(x))")
    library = (
        "import torch\n"
        'if not hasattr(torch.ops.pwcli, "twice"):\n'
        '    torch.pwcli = torch.library.Library("pwcli", "FRAGMENT")\n'
        '    torch.pwcli.define("twice(Tensor x) -> Tensor")\n'
        '    torch.pwcli.impl("twice", lambda x: torch.cat([x, x])[: len(x)], "CompositeExplicitAutograd")\n'
    )
    (folder / "custom.py").write_text(library + text)
    result = run("analyze", "custom.py", "--strict")
    assert "unpriced: pwcli::twice ×1" in result.stdout
    assert result.exit_code == 1
    assert "pwcli::twice" in result.stderr
    assert run("analyze", "custom.py").exit_code == 0


def test_a_model_without_a_convolution_is_told_so(run: Run, folder: Path) -> None:
    (folder / "mlp.py").write_text(
        "import torch\nfrom torch import nn\nmodel = nn.Linear(4, 2)\nexample_inputs = torch.zeros(1, 4)\n"
    )
    result = run("analyze", "mlp.py")
    assert result.exit_code == 0, result.stderr
    assert "no convolution" in result.stdout
    assert "linear" in result.stdout


def test_zoo_models_are_built_without_values(run: Run) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    result = run("analyze", "torchvision:squeezenet1_1", "--format", "json")
    data = json.loads(result.stdout)
    assert data["totals"]["params"] == 1_235_496
    assert data["coverage"]["values"] == "meta"
    assert data["model"]["target"] == "torchvision:squeezenet1_1"


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"pwrewrite {pwrewrite.__version__}\n"


def test_help_names_every_device(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pwrewrite.analysis.devices import DEVICES

    monkeypatch.setenv("COLUMNS", "200")
    text = run("analyze", "--help").stdout
    for name in DEVICES:
        assert name in text
    assert "[default" in text


def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    """As in `pwrewrite analyze net.py | head -1`; the reader is gone before the first line comes."""
    process = subprocess.Popen(
        [*python(), "-m", "pwrewrite", "analyze", "net.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert messages(process.stderr.read()) == ""
    assert process.wait(60) == 141
