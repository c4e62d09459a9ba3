"""Shell completion, as the shells ask for it."""

import os
import subprocess
import sys

import pytest

CHILD = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
PROGRAM = [
    sys.executable,
    "-c",
    "import sys; from lorafusion_jax.cli import main; sys.exit(main())",
]


def complete(shell: str, words: str) -> str:
    given = {"_LORAFUSION_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        given |= {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    else:
        given |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(PROGRAM, env=CHILD | given, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_are_completed(shell):
    found = complete(shell, "lorafusion tr")
    assert "train" in found and "status" not in found


def test_options_are_completed():
    found = complete("bash", "lorafusion train --max")
    assert found.split() == ["--max-steps"]


def test_the_script_for_the_shell_is_printed(lorafusion):
    code, out, _ = lorafusion("--help")
    assert code == 0 and "--install-completion" in out and "--show-completion" in out
