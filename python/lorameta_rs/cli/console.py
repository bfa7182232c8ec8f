"""What people read: data on stdout; words, warnings and progress on stderr."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorameta_rs.bank import Bank

_SHOWN = 16
"""Members left out that are said one by one; of hundreds nobody reads more."""

_reported: WeakKeyDictionary[Bank, set[str]] = WeakKeyDictionary()


def say(text: str) -> None:
    """A line for a person."""
    _write(_printable(text), err=True)


def warn(text: str) -> None:
    """A line about something that is doubtful, but goes on."""
    _write(click.style("warning: ", fg="yellow") + _printable(text), err=True)


def fail(text: str) -> None:
    """Why a command cannot do what it was asked to."""
    _write(click.style("error: ", fg="red") + _printable(text), err=True)


def report(bank: Bank) -> None:
    """Say which members are left out and why, and what is odd about others: each once."""
    said = _reported.setdefault(bank, set())
    left_out = [f"`{name}` is left out: {e}" for name, e in bank.left_out.items()]
    new = [line for line in left_out if line not in said]
    for line in (*new[:_SHOWN], *(line for line in bank.notes if line not in said)):
        warn(line)
    if len(new) > _SHOWN:
        more = number(len(new) - _SHOWN, "more member")
        warn(f"{more} left out: `lorameta-rs index --json` has all reasons")
    said.update(new, bank.notes)


def data(value: Any) -> None:
    """A value as JSON, on stdout."""
    _write(json.dumps(value, indent=2))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows on stdout: aligned on a terminal, separated by tabs where a program reads them."""
    lines = [[_printable(cell).replace("\n", " ") for cell in row] for row in (headers, *rows)]
    if not _is_terminal(sys.stdout):
        _write("\n".join("\t".join(line) for line in lines))
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    header, *aligned = (
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    _write("\n".join([click.style(header, bold=True), *aligned]))


def side_by_side(prompt: str, answers: dict[str, str], reference: str | None) -> None:
    """A question and the answers to it on stdout: in columns on a terminal, else line by line."""
    lines = {"prompt": prompt, **answers}
    if reference is not None:
        lines["reference"] = reference
    if not _is_terminal(sys.stdout):
        _write("\n".join(f"{name}\t{_one_line(text)}" for name, text in lines.items()) + "\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = {name: text for name, text in lines.items() if name != "prompt"}
    table = Table(title=Text(_printable(prompt)), title_justify="left", box=box.SIMPLE, expand=True)
    for name in columns:
        table.add_column(Text(_printable(name)), ratio=1)
    table.add_row(*(Text(_printable(text)) for text in columns.values()))
    Console().print(table)


def _one_line(text: str) -> str:
    return _printable(text).replace("\n", "\\n")


def say_lengths(name: str, buckets: dict[str, tuple[int, float]]) -> None:
    """Rouge-L by the length of prompts in tokens, where they differ enough."""
    if len(buckets) > 1:
        means = ", ".join(f"{length} tokens {mean:.3f}" for length, (_, mean) in buckets.items())
        say(f"{name}: Rouge-L of prompts {means}")


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


def duration(seconds: float) -> str:
    """A time, as people say it.

    >>> duration(4.2), duration(260.0)
    ('4 seconds', '4 minutes')
    """
    if seconds < 90:
        return number(max(round(seconds), 1), "second")
    return number(round(seconds / 60), "minute")


def number(count: int, noun: str) -> str:
    """A number of things.

    >>> number(1, "adapter"), number(12, "adapter")
    ('1 adapter', '12 adapters')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """A bar on stderr that takes (done, total); None where stderr is no terminal."""
    if not _is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int | None) -> None:
            so_far = f"{what}: {done:,}" if total is None else what
            bar.update(task, description=so_far, completed=done, total=total)

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


@contextmanager
def rows(what: str) -> Iterator[Callable[[int], None] | None]:
    """As `progress`, for a dataset of unknown length: it is told how many rows are done."""
    with progress(what) as update:
        yield None if update is None else lambda done: update(done, None)


def _write(text: str, err: bool = False) -> None:
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        # Whoever read this has seen enough, as `head` has; the work itself goes on.
        stream = sys.stderr if err else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_terminal(stream: Any) -> bool:
    """Whether a person sees it; a stream that was closed is None."""
    return stream is not None and stream.isatty()


def _printable(text: str) -> str:
    r"""`text` without what would move the cursor or colour the screen; names can hold anything.

    >>> _printable("a\x1b[31mb\tc")
    'a\\x1b[31mb\\tc'
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
