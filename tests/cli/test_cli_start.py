"""Starting is fast: neither the package nor the command's help imports anything heavy."""

import resource
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


def test_help_in_a_quarter_of_a_second() -> None:
    """The best of some runs, in CPU time: it waits for nothing, and other work on the machine only makes it slower."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(8):
        before = spent()
        subprocess.run([sys.executable, "-m", "pwrewrite", "--help"], capture_output=True, check=True)
        seconds.append(spent() - before)
        if min(seconds) < 0.25:
            break
    assert min(seconds) < 0.25
