"""The help pages: quick to come up, true to the library, and the same as docs/cli.md.

`python tests/test_help.py` writes docs/cli.md anew.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from lorameta_rs.cli import commands, options, run

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAVY = {"numpy", "tokenizers", "safetensors", "rich", "lorameta_rs._core"}


def help_pages():
    """All help pages as Markdown."""
    pages = [
        "# The command line",
        "The help pages of `lorameta-rs`, as `python tests/test_help.py` writes them here.",
    ]
    group = click.Context(commands, info_name="lorameta-rs", **commands.context_settings)
    for context in (group, *(subcommand(group, name) for name in commands.commands)):
        context.terminal_width = 90
        pages += [f"## {context.command_path}", f"```text\n{context.get_help()}\n```"]
    return "\n\n".join(pages) + "\n"


def subcommand(group, name):
    return click.Context(commands.commands[name], group, name)


def test_the_page_is_that_of_the_program():
    assert PAGE.read_text(encoding="utf-8") == help_pages(), "run `python tests/test_help.py`"


@pytest.mark.parametrize("command", [[], *([name] for name in commands.commands)], ids=str)
def test_help_imports_nothing_heavy(command):
    program = (
        "import sys\nfrom lorameta_rs.cli import run\n"
        f"status = run([*{command!r}, '--help'])\n"
        f"sys.exit(status or ' '.join(sys.modules.keys() & {HEAVY!r}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"Usage: lorameta-rs")


def test_no_summary_is_cut_short():
    summaries = [command.get_short_help_str(66) for command in commands.commands.values()]
    assert all(summary.endswith(".") for summary in summaries)
    assert not any(summary.endswith("...") for summary in summaries)


def test_every_option_is_explained():
    for command in commands.commands.values():
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help


def test_choices_are_those_of_the_library():
    from lorameta_rs import coefficients, distance, formats, learned, merge, study
    from lorameta_rs.formats import conversion

    assert set(options.METRICS) == set(distance.METRICS)
    assert set(options.PIPELINES) == {*coefficients.PIPELINES, *learned.PIPELINES}
    assert options.METHODS == merge.METHODS
    assert options.DTYPES == merge.DTYPES
    assert options.FORMATS == formats.FORMATS
    assert list(options.CONVERTED) == list(conversion.DTYPES)
    assert options.MAJORITIES == merge.MAJORITIES
    assert options.NORMALIZATIONS == merge.NORMALIZATIONS
    assert options.PROTOCOLS == study.PROTOCOLS


def test_defaults_are_those_of_the_library():
    from lorameta_rs.merge import Options
    from lorameta_rs.ranking import Settings

    command = commands.commands["merge"]
    defaults = command.make_context("merge", ["BANK", "NEW", "-o", "OUT"]).params
    for name in options.SETTINGS:
        assert defaults[name] == getattr(Settings(), name), name
    for name in ("method", "dtype", "threads", "io", "allow_nan", "verify", "force"):
        assert defaults[name] == getattr(Options(), name), name
    assert defaults["memory"] << 20 == Options().memory


def test_the_version_is_the_packages(capsys):
    from importlib.metadata import version

    assert run(["--version"]) == 0
    assert version("lorameta-rs") in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nope"], ["--nope"]], ids=str)
def test_no_known_command_is_status_2(capsys, arguments):
    assert run(arguments) == 2
    assert "Usage: lorameta-rs" in capsys.readouterr().err


if __name__ == "__main__":
    PAGE.write_text(help_pages(), encoding="utf-8")
