"""`pwrewrite rewrite`, `plan`, `verify` and `passes` when all is well: what is printed, what is saved, what loads."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from messages import messages
from rich.cells import cell_len
from safetensors.torch import load_file
from typer.testing import Result

import pwrewrite
from pwrewrite.targets import TargetOptions, open_target

Run = Callable[..., Result]
EXAMPLES = Path(__file__).parents[2] / "examples"
HALF = ("--pass", "insert-bottleneck", "--rank", "0.5")

LOAD = """
import hashlib, sys, torch, pwrewrite
model = pwrewrite.load(sys.argv[1], trust_target=True)
x = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    print(hashlib.sha256(model(*x).numpy().tobytes()).hexdigest())
"""


def digest(model: torch.nn.Module, *x: torch.Tensor) -> str:
    with torch.no_grad():
        return hashlib.sha256(model.eval()(*x).numpy().tobytes()).hexdigest()


def same_weights(one: Path, two: Path) -> bool:
    a, b = (load_file(place / "model.safetensors") for place in (one, two))
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_saved_and_loaded_in_another_process_from_elsewhere(run: Run, folder: Path, tmp_path: Path) -> None:
    result = run("rewrite", "net.py", *HALF, "--out", "out")
    assert result.exit_code == 0, result.stderr
    assert messages(result.stderr) == "saved in out\n"
    assert {p.name for p in (folder / "out").iterdir()} == {
        "model.safetensors", "plan.json", "report.json", "README.md",
    }  # fmt: skip
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.save([x], folder / "x.pt")
    here = pwrewrite.rewrite(
        open_target(TargetOptions("net.py")), passes=["insert-bottleneck"], rank=0.5, verify=False
    ).model
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder / "out"), str(folder / "x.pt")],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 0, done.stderr
    # Bit-equal: the same kernels on the same weights in the same order.
    assert done.stdout.strip() == digest(here, x)


def test_the_report_as_json(run: Run, folder: Path) -> None:
    data = json.loads(run("rewrite", "net.py", *HALF, "--format", "json", "--out", "out").stdout)
    assert data["schema"] == "pwrewrite.report/1"
    before, after, delta = data["before"], data["after"], data["delta"]
    assert before["params"] - after["params"] == -delta["params"]
    assert delta["params_pct"] == pytest.approx(100 * delta["params"] / before["params"], abs=1e-4)
    assert delta["macs"] == after["macs"] - before["macs"]
    wanted = {
        "path", "pass", "method", "rank_in", "rank_out", "params_before", "params_after", "macs_before", "macs_after",
        "relative_error", "kind",
    }  # fmt: skip
    assert [edit["path"] for edit in data["edits"]] == ["stem", "body.1"]
    for edit in data["edits"]:
        assert wanted <= set(edit)
        assert 0 < edit["relative_error"] < 1
    assert delta["params"] == sum(e["params_after"] - e["params_before"] for e in data["edits"])
    assert delta["macs"] == sum(e["macs_after"] - e["macs_before"] for e in data["edits"])
    assert data["verification"]["passed"] is True
    assert {"name", "passed", "detail"} == set(data["verification"]["checks"][0])
    assert data["skipped"] == []
    assert json.loads((folder / "out" / "report.json").read_text()) == data
    names = json.loads((folder / "out" / "plan.json").read_text())["names"]
    assert names["stem.weight"] == ["stem.reduce.weight", "stem.core.weight", "stem.expand.weight"]
    assert names["stem.bias"] == ["stem.expand.bias"]


@pytest.mark.parametrize("width", ["100", "80", "60"])
def test_the_table_fits(run: Run, width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    result = run("rewrite", "net.py", *HALF)
    lines = result.stdout.splitlines()
    assert max(map(cell_len, lines)) <= int(width)
    text = result.stdout
    assert re.search(r"^parameters +.* -\d+\.\d%$", text, re.MULTILINE)
    # the saving, the proof, the layers, in this order
    assert text.index("parameters") < text.index("Structure  verified") < text.index("✓") < text.index("Layers")
    assert "no --weights" in text
    assert messages(result.stderr) == "nothing was saved: give --out DIR\n"


@pytest.mark.parametrize("target", ["net.py", "absolute", "saved"])
def test_the_readme_loads_the_model_as_it_says(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    typed = str(folder / "net.py") if target == "absolute" else "net.py"
    run("rewrite", typed, "--set", "stem=reduce:2", "--out", "deeper/out")
    saved = folder / "deeper" / "out"
    if target == "saved":
        run("rewrite", "deeper/out", "--model", typed, *HALF, "--out", "deeper/again")
        saved = folder / "deeper" / "again"
    text = (saved / "README.md").read_text()
    assert str(folder) not in text
    assert str(folder.resolve()) not in text
    monkeypatch.chdir(saved)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(code[1], names)
    assert isinstance(names["model"], torch.nn.Module)
    command = re.search(r"```sh\npwrewrite (.*?)\n```", text)
    assert command is not None
    assert run(*shlex.split(command[1])).exit_code == 0
    assert f"pwrewrite {pwrewrite.__version__}" in text
    assert f"torch {torch.__version__}" in text
    assert "Warning" not in text


def test_random_weights_are_the_same_in_every_run_and_the_caller_keeps_his(run: Run, folder: Path) -> None:
    state = torch.random.get_rng_state()
    for place in ("one", "two"):
        run("rewrite", "net.py", *HALF, "--out", place, "--no-verify", "--save-unverified")
    assert torch.equal(state, torch.random.get_rng_state())
    assert same_weights(folder / "one", folder / "two")
    run("rewrite", "net.py", *HALF, "--out", "three", "--no-verify", "--save-unverified", "--seed", "1")
    assert not same_weights(folder / "one", folder / "three")


def test_weights_are_those_that_are_given(run: Run, folder: Path) -> None:
    sys.path.insert(0, str(folder))
    model = pwrewrite.load_target("net.py").model
    low = torch.randn(8, 16) @ torch.randn(16, 144)
    with torch.no_grad():
        model.body[1].weight.copy_((torch.randn(16, 8) @ low).reshape(16, 16, 3, 3))
    torch.save(model.state_dict(), folder / "w.pt")
    result = run("rewrite", "net.py", "--weights", "w.pt", "--set", "body.1=expand:8", "--format", "json")
    data = json.loads(result.stdout)
    assert data["edits"][0]["relative_error"] < 1e-5  # the weights are of rank 8
    assert not any("--weights" in note for note in data["notes"])


def test_a_dry_run_does_nothing_but_show_the_plan(run: Run, folder: Path) -> None:
    before = sorted(folder.iterdir())
    result = run("rewrite", "net.py", *HALF, "--out", "out", "--dry-run")
    assert result.exit_code == 0
    assert "2 layers would be rewritten by insert-bottleneck" in result.stdout
    assert "Proof" not in result.stdout
    assert sorted(folder.iterdir()) == before
    shown = run("rewrite", "net.py", *HALF, "--dry-run", "--format", "json").stdout
    run("plan", "net.py", *HALF, "--out", "plan.json")
    assert shown == (folder / "plan.json").read_text()


@pytest.mark.parametrize(
    "passes", [HALF, ("--pass", "insert-bottleneck", "--pass", "factorize-linear", "--energy", "0.6")]
)
def test_a_plan_does_exactly_what_the_passes_do(run: Run, folder: Path, passes: tuple[str, ...]) -> None:
    written = run("plan", "net.py", *passes, "--out", "plan.json")
    assert written.exit_code == 0, written.stderr
    assert messages(written.stderr) == "written to plan.json\n"
    planned = run("rewrite", "net.py", "--plan", "plan.json", "--out", "planned", "--format", "json")
    direct = run("rewrite", "net.py", *passes, "--out", "direct", "--format", "json")
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout) == json.loads(direct.stdout)
    for name in ("plan.json", "README.md"):
        a, b = ((folder / place / name).read_text() for place in ("planned", "direct"))
        assert a.replace("planned", "direct") == b, name
    assert same_weights(folder / "planned", folder / "direct")


def test_a_plan_edited_by_hand_is_predicted_anew(run: Run, folder: Path) -> None:
    run("plan", "net.py", *HALF, "--out", "plan.json")
    data = json.loads((folder / "plan.json").read_text())
    data["ops"][1]["settings"]["widths"] = {"rank_in": 3, "rank_out": 5}
    (folder / "plan.json").write_text(json.dumps(data))
    result = run("rewrite", "net.py", "--plan", "plan.json", "--format", "json")
    assert result.exit_code == 0, result.stderr
    edit = json.loads(result.stdout)["edits"][1]
    assert (edit["rank_in"], edit["rank_out"]) == (3, 5)
    assert edit["params_after"] == 3 * 16 + 3 * 5 * 9 + 5 * 16 + 16


def test_set_is_for_single_layers_and_wins_over_passes(run: Run) -> None:
    alone = json.loads(run("rewrite", "net.py", "--set", "body.1=reduce:4", "--format", "json").stdout)
    assert [(e["path"], e["method"], e["rank_in"]) for e in alone["edits"]] == [("body.1", "reduce", 4)]
    assert alone["skipped"] == [{"path": "stem", "reason": "excluded", "detail": "not named by --set"}]
    both = json.loads(run("rewrite", "net.py", *HALF, "--set", "body.1=spatial:4", "--format", "json").stdout)
    assert {e["path"]: e["method"] for e in both["edits"]} == {"stem": "bottleneck", "body.1": "spatial"}
    kept = json.loads(run("rewrite", "net.py", *HALF, "--set", "stem=keep", "--format", "json").stdout)
    assert [e["path"] for e in kept["edits"]] == ["body.1"]
    assert [s["reason"] for s in kept["skipped"]] == ["excluded"]
    pair = json.loads(run("rewrite", "net.py", "--set", "head=pair:4", "--set", "*=keep", "--set", "head=pair:3",
                          "--format", "json").stdout)  # fmt: skip
    assert [(e["path"], e["rank_in"]) for e in pair["edits"]] == [("head", 3)]


def test_later_passes_may_name_what_earlier_ones_replaced(run: Run) -> None:
    result = run("rewrite", "net.py", *HALF, "--pass", "factorize-linear", "--include", "stem", "--include", "head",
                 "--format", "json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [e["path"] for e in data["edits"]] == ["stem", "head"]
    # nothing is said of the parts that this rewrite itself put in
    assert {s["path"] for s in data["skipped"]} == {"body.1"}


def test_rank_in_and_rank_out(run: Run) -> None:
    result = run("rewrite", "net.py", "--pass", "insert-bottleneck", "--rank-in", "2", "--rank-out", "25%",
                 "--include", "body.*", "--format", "json")  # fmt: skip
    (edit,) = json.loads(result.stdout)["edits"]
    assert (edit["rank_in"], edit["rank_out"]) == (2, 4)


def test_vbmf_and_growth(run: Run) -> None:
    assert run("rewrite", "net.py", "--pass", "insert-bottleneck", "--vbmf").exit_code == 0
    full = ("--pass", "insert-bottleneck", "--rank", "1.0", "--format", "json")
    assert run("rewrite", "net.py", *full).exit_code == 1
    data = json.loads(run("rewrite", "net.py", *full, "--allow-growth").stdout)
    assert {e["exact"] for e in data["edits"]} == {"both"}
    assert data["verification"]["relative_error"] < 1e-5


def test_fresh_layers_with_norm_and_activation(run: Run, folder: Path) -> None:
    result = run("rewrite", "net.py", *HALF, "--init", "fresh", "--norm", "batch_norm", "--activation", "relu",
                 "--out", "out", "--format", "json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert all(e["relative_error"] is None for e in data["edits"])
    # rank 8: three convolutions with a batch norm (2 × 8) behind the first two
    assert data["edits"][1]["params_after"] == 16 * 8 + 8 * 8 * 9 + 8 * 16 + 16 + 2 * 2 * 8
    model = pwrewrite.load(folder / "out", trust_target=True)
    assert type(model.body[1].reduce_norm).__name__ == "BatchNorm2d"


def test_rewrites_compose_over_folders(run: Run, folder: Path) -> None:
    run("rewrite", "net.py", "--set", "stem=bottleneck:2,8", "--out", "one")
    result = run("rewrite", "one", "--model", "net.py", "--set", "body.1=reduce:4", "--set", "stem.core=spatial:3",
                 "--replan", "--out", "two")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads((folder / "two" / "plan.json").read_text())
    assert [op["path"] for op in data["ops"]] == ["stem", "body.1", "stem.core"]
    assert data["model"]["class"] == "net.Net"
    assert data["names"]["stem.weight"] == [
        "stem.reduce.weight", "stem.core.first.weight", "stem.core.second.weight", "stem.expand.weight",
    ]  # fmt: skip
    original = pwrewrite.load_target("net.py").model
    x = torch.randn(1, 3, 32, 32)
    from_original = pwrewrite.load("two", original)
    trusted = pwrewrite.load("two", trust_target=True)
    assert digest(from_original, x) == digest(trusted, x)
    assert run("verify", "one", "two", "--model", "net.py").exit_code == 0
    assert run("analyze", "two", "--model", "net.py").exit_code == 0


def test_a_folder_is_a_target_for_analyze(run: Run, folder: Path) -> None:
    run("rewrite", "net.py", "--arg", "width=32", "--input", "2x3x16x16", *HALF, "--min-gain", "0", "--out", "out")
    data = json.loads(run("analyze", "out", "--trust-target", "--format", "json").stdout)
    assert data["model"]["class"] == "net.Net"
    assert data["model"]["inputs"][0]["shape"] == [2, 3, 16, 16]  # recorded
    assert {"stem.reduce", "stem.core", "stem.expand"} <= {layer["path"] for layer in data["layers"]}
    assert data["totals"] == json.loads((folder / "out" / "report.json").read_text())["after"]


def test_verify_two_targets(run: Run, folder: Path) -> None:
    run("rewrite", "net.py", *HALF, "--out", "out")
    good = run("verify", "net.py", "out")
    assert good.exit_code == 0, good.stderr
    assert good.stdout.startswith("net.py\nagainst out\n")
    assert "✓" in good.stdout
    data = json.loads(run("verify", "net.py", "out", "--format", "json").stdout)
    assert data["passed"]
    assert data["relative_error"] == pytest.approx(
        json.loads((folder / "out" / "report.json").read_text())["verification"]["relative_error"]
    )
    assert run("verify", "net.py", "net.py").exit_code == 0
    strict = run("verify", "net.py", "out", "--max-error", "1e-3")
    assert strict.exit_code == 1
    assert "✗" in strict.stdout
    assert "out does not do what net.py does" in strict.stderr
    text = (
        (folder / "net.py").read_text().replace("self.head = nn.Linear(width, 10)", "self.head = nn.Linear(width, 7)")
    )
    (folder / "other.py").write_text(text)
    other = run("verify", "net.py", "other.py")
    assert other.exit_code == 1
    assert "1×10" in other.stdout
    assert "1×7" in other.stdout


def test_verification_that_fails_saves_nothing(run: Run, folder: Path) -> None:
    before = sorted(folder.iterdir())
    result = run("rewrite", "net.py", *HALF, "--max-error", "1e-6", "--out", "out")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "nothing was saved\nerror: verification failed" in result.stderr
    assert sorted(folder.iterdir()) == before
    kept = run("rewrite", "net.py", *HALF, "--max-error", "1e-6", "--out", "out", "--save-unverified")
    assert kept.exit_code == 1
    assert "saved in out, UNVERIFIED" in kept.stderr
    assert "**Warning: this model FAILED VERIFICATION.**" in (folder / "out" / "README.md").read_text()
    assert json.loads((folder / "out" / "report.json").read_text())["verification"]["passed"] is False


def test_without_verification_nothing_is_proven(run: Run, folder: Path) -> None:
    assert "NOT VERIFIED" in run("rewrite", "net.py", *HALF, "--no-verify").stdout
    refused = run("rewrite", "net.py", *HALF, "--no-verify", "--out", "out")
    assert refused.exit_code == 2
    assert not (folder / "out").exists()
    assert run("rewrite", "net.py", *HALF, "--no-verify", "--save-unverified", "--out", "out").exit_code == 0
    assert "**Warning: this model WAS NOT VERIFIED.**" in (folder / "out" / "README.md").read_text()


def test_a_folder_of_ours_is_replaced_when_asked(run: Run, folder: Path) -> None:
    run("rewrite", "net.py", *HALF, "--out", "out")
    refused = run("rewrite", "net.py", *HALF, "--out", "out")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    run("rewrite", "net.py", "--set", "stem=reduce:2", "--out", "out", "--force")
    assert len(json.loads((folder / "out" / "plan.json").read_text())["ops"]) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["net.py", "out"]


def test_the_figure_of_googlenet(run: Run, folder: Path) -> None:
    """From figure 2(a) to 2(b): 387,072 → 163,328 parameters, 416 → 256 channels."""
    result = run(
        "rewrite", EXAMPLES / "inception_naive.py", "--set", "b3=reduce:96", "--set", "b5=reduce:16", "--set",
        "pool=project:32", "--init", "fresh", "--allow-output-change", "--out", "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads((folder / "out" / "report.json").read_text())
    assert (data["before"]["params"], data["after"]["params"]) == (387_072, 163_328)
    assert data["verification"]["passed"]
    assert data["output_changes"] == ["output 0: 1×416×28×28 → 1×256×28×28"]
    assert "the concatenation behind pool is narrower: 416 → 256 channels" in result.stdout
    model = pwrewrite.load(folder / "out", trust_target=True)
    assert model(torch.zeros(1, 192, 28, 28)).shape == (1, 256, 28, 28)
    refused = run("rewrite", EXAMPLES / "inception_naive.py", "--set", "pool=project:32", "--init", "fresh")
    assert refused.exit_code == 1
    assert "256 channels instead of 416" in refused.stderr


def test_passes_are_listed(run: Run) -> None:
    from pwrewrite.passes import ALL, FUSING

    text = run("passes").stdout
    data = json.loads(run("passes", "--format", "json").stdout)
    assert [row["name"] for row in data] == [kind.name for kind in (*ALL, *FUSING)]
    for row in data:
        assert row["name"] in text
        assert row["exact"] in ("no", "eval", "train", "both")
        assert row["summary"]
    assert run("passes", "--format", "markdown").stdout.startswith("| pass | what it does | exact |")
