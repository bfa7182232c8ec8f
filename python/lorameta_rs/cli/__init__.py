"""The command line: `lorameta-rs COMMAND`. Options, one call into the library, print."""

from __future__ import annotations

import os
import sys
import warnings

import click

from lorameta_rs.cli import console
from lorameta_rs.cli.demo import demo
from lorameta_rs.cli.index import index
from lorameta_rs.cli.inspect import inspect
from lorameta_rs.cli.merge import merge
from lorameta_rs.cli.rank import rank
from lorameta_rs.errors import LoraMetaError

DONE, UNUSABLE, INTERRUPTED = 0, 1, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="lorameta-rs")
def commands() -> None:
    """Make a LoRA adapter for a new dataset out of a bank of adapters, without training."""


for command in (demo, index, rank, merge, inspect):
    commands.add_command(command)


def main() -> None:
    """Run: 0 done, 1 the input cannot be used, 2 the command line cannot be read, 130 Ctrl-C."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit status of a command line; what goes wrong is said on stderr."""
    warnings.showwarning = lambda message, *_: console.warn(str(message))
    try:
        commands.main(arguments, "lorameta-rs", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        console.say("interrupted; nothing was written")
        return INTERRUPTED
    except LoraMetaError as error:
        console.fail(error)
        return UNUSABLE
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter is not to complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    return DONE
