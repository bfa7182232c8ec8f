"""The command line: `lorameta-rs COMMAND`. Options, one call into the library, print."""

from __future__ import annotations

import io
import signal
import sys
import warnings

import click

from lorameta_rs.cli import console
from lorameta_rs.cli.attempt import attempt
from lorameta_rs.cli.calibrate import calibrate
from lorameta_rs.cli.convert import convert
from lorameta_rs.cli.demo import demo
from lorameta_rs.cli.evaluate import evaluate
from lorameta_rs.cli.index import index
from lorameta_rs.cli.inspect import inspect
from lorameta_rs.cli.merge import merge
from lorameta_rs.cli.rank import rank
from lorameta_rs.cli.study import study
from lorameta_rs.errors import LoraMetaError

DONE, UNUSABLE, INTERRUPTED = 0, 1, 130


class Commands(click.Group):
    """A group that lists its commands in the order they were added: that of the flow."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names."""
        return list(self.commands)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="lorameta-rs")
def commands() -> None:
    """Make a LoRA adapter for a new dataset out of a bank of adapters, without training."""


for command in (
    *(demo, index, rank, merge, inspect),
    *(calibrate, convert, attempt, evaluate, study),
):
    commands.add_command(command)


def main() -> None:
    """Run: 0 done, 1 the input cannot be used, 2 the command line cannot be read, 130 Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: a name that the terminal cannot show is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _leave)  # as Ctrl-C does: nothing half-written stays
    sys.exit(run(sys.argv[1:]))


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def run(arguments: list[str]) -> int:
    """The exit status of a command line; what goes wrong is said on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_: console.warn(str(message))
        try:
            status: int | None = commands.main(arguments, "lorameta-rs", standalone_mode=False)
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except (click.Abort, KeyboardInterrupt):
            console.say("interrupted")
            return INTERRUPTED
        except LoraMetaError as error:
            console.fail(str(error))
            return UNUSABLE
        except OSError as error:  # stdout itself: a full device
            console.fail(error.strerror or str(error))
            return UNUSABLE
    return status or DONE
