"""The README's commands run; its code blocks are run by test_docs.py."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted({match for match in re.findall(r"bnkit compare[^`\n&)]*", README) if "FOLDER" not in match})


def test_the_two_commands_are_there():
    assert "pip install uv && uv run bnkit compare\n" in BLOCKS[0]
    assert any("uv run --group dev pytest -n auto\n" in block for block in BLOCKS)


def test_ci_calls_the_test_command():
    script = r"""sed -n '/<!-- test command -->/,/```$/p' README.md | sed -n 's/^\(pip install uv .*\)$/\1/p'"""
    assert script in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    found = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip() == "pip install uv && uv run --group dev pytest -n auto"


@pytest.mark.parametrize("command", COMMANDS)
def test_compare_commands_run(command, tmp_path):
    """In small: the README's command with fewer steps."""
    arguments = [part for part in shlex.split(command)[1:] if part]
    short = [*arguments, "--out", str(tmp_path), "--steps", "10", "--grid-steps", "5"]
    done = subprocess.run([sys.executable, "-m", "bnkit", *short], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").exists()
