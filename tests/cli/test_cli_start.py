"""Starting is fast: neither the package nor the command's help imports anything heavy."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "networkx", "numpy", "scipy", "torchvision", "timm")


def loaded_by(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has imported after running some code."""
    tell = f"print(*(m for m in {HEAVY} if m in sys.modules), file=sys.stderr)"
    script = f"import sys\ntry:\n    {code}\nfinally:\n    {tell}\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return set(done.stderr.splitlines()[-1].split()) if done.stderr.strip() else set()


@pytest.mark.parametrize(
    "code",
    [
        "import pwrewrite; dir(pwrewrite); pwrewrite.__version__; pwrewrite.PwrewriteError",
        "import pwrewrite.cli.app",
        "sys.argv = ['pwrewrite', '--help']; from pwrewrite.cli import main; main()",
        "sys.argv = ['pwrewrite', 'analyze', '--help']; from pwrewrite.cli import main; main()",
        "sys.argv = ['pwrewrite', '--version']; from pwrewrite.cli import main; main()",
        "sys.argv = ['pwrewrite', 'analyze', '--nonsense']; from pwrewrite.cli import main; main()",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert loaded_by(code) == set()


def test_the_check_would_notice() -> None:
    assert loaded_by("import networkx") >= {"networkx"}


def test_help_imports_little() -> None:
    """Its time is that of its imports: 337 modules when this was written, 0.2 s (``bench_analyze.py`` measures it)."""
    script = (
        "import sys; sys.argv = ['pwrewrite', '--help']\n"
        "try:\n    from pwrewrite.cli import main; main()\nfinally:\n    print(len(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert int(done.stderr.splitlines()[-1]) < 400
