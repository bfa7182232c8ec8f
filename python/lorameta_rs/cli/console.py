"""What people read: data on stdout; words, warnings and progress on stderr."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorameta_rs.bank import Bank


def say(text: str) -> None:
    """A line for a person."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """A line about something that is doubtful, but goes on."""
    click.echo(click.style("warning: ", fg="yellow") + text, err=True)


def fail(error: Exception) -> None:
    """Why a command cannot do what it was asked to."""
    click.echo(click.style("error: ", fg="red") + describe(error), err=True)


def describe(error: Exception) -> str:
    """An error's text; a system's error begins with its file, as all others do."""
    if isinstance(error, OSError) and error.filename is not None:
        name = str(error.filename).encode(errors="backslashreplace").decode()
        return f"`{name}`: {error.strerror}"
    return str(error)


def report(bank: Bank) -> None:
    """Say which members are left out and why, and what is odd about others; each once."""
    for name, error in bank.left_out.items():
        warn(f"`{name}` is left out: {describe(error)}")
    for note in bank.notes:
        warn(note)
    bank.notes.clear()
    bank.left_out.clear()


def data(value: Any) -> None:
    """A value as JSON, on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows on stdout: aligned on a terminal, separated by tabs where a program reads them."""
    if not sys.stdout.isatty():
        for row in (headers, *rows):
            click.echo("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row))
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for number, row in enumerate((headers, *rows)):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.secho("  ".join(cells).rstrip(), bold=number == 0)


def size(count: float) -> str:
    """A number of bytes, as people say it.

    >>> size(37_774_528)
    '37.8 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr that takes (done, total); None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


@contextmanager
def steps(what: str, total: int) -> Iterator[Callable[[object], None] | None]:
    """As `progress`, for something that is done one by one: each call is one more."""
    with progress(what) as update:
        if update is None:
            yield None
            return
        done = 0

        def step(_: object) -> None:
            nonlocal done
            update(done, total)
            done += 1

        yield step
