"""The program itself: how it ends where Ctrl-C comes before there is a command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import builtins, sys

def interrupted(name, *rest, **named):
    if name == {module!r}:
        raise KeyboardInterrupt
    return imported(name, *rest, **named)

imported, builtins.__import__ = builtins.__import__, interrupted
sys.argv = ["lorameta-rs", "rank", "bank", "new.txt"]
from lorameta_rs.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["click", "lorameta_rs.cli", "lorameta_rs.fingerprint", "numpy"])
def test_ctrl_c_while_modules_are_imported(module):
    command = [sys.executable, "-c", PROGRAM.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "interrupted")


def test_little_is_imported_before_ctrl_c_is_heard():
    program = "import sys; before = set(sys.modules)\nimport lorameta_rs.__main__\n"
    program += "print(*sorted(set(sys.modules) - before - {'__future__'}))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lorameta_rs", "lorameta_rs.__main__"]
