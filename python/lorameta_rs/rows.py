"""The rows of a dataset file, one at a time: jsonl, json, csv, tsv, txt, parquet, .gz of these.

What the fields of a row mean is the matter of `dataset`. Here memory is bounded by the longest
row, whatever the file's size, and every fault is said with its place.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from lorameta_rs.errors import InvalidDataset
from lorameta_rs.files import reading
from lorameta_rs.json_stream import Decoder, Scanner

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    Row = tuple[str, Any]  # its place, as "line 7", and what stands there

MAX_ROW = 1 << 20
"""Bytes that one row may have: a novel. Tokenising a text takes 150 times its size."""

_ROWS_FIELD = "Instances"


class DatasetWarning(UserWarning):
    """A dataset can be used, but probably does not say what its author meant."""


@dataclass(frozen=True)
class Source:
    """One dataset file, its format told by its suffix.

    `select` is asked which of the columns that a parquet file has are to be read.
    """

    path: Path
    max_row: int = MAX_ROW
    select: Callable[[list[str]], Collection[str]] = tuple

    @property
    def compressed(self) -> bool:
        """Whether the file is one of another format inside gzip."""
        return self.path.suffix.lower() == ".gz"

    def rows(self) -> Iterator[Row]:
        """Every row with its place: an object where the format has fields, else any JSON value.

        Raises:
            MissingFile, UnreadableFile: the file cannot be opened or read.
            InvalidDataset: the content is not what the suffix says; the place is named.
            MissingExtra: parquet without pyarrow.
        """
        plain = self.path.with_suffix("") if self.compressed else self.path
        read = READERS.get(plain.suffix.lower())
        if read is None:
            raise self.fault(f"unknown format: expected {', '.join(READERS)} or .gz of these")
        with reading(self.path) as file:
            if not self.compressed:
                yield from read(self, file)
                return
            try:
                yield from read(self, io.BufferedReader(gzip.GzipFile(fileobj=file)))
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise self.fault(f"not a whole gzip file: {error}") from None

    def fault(self, what: str, place: str | None = None) -> InvalidDataset:
        """The error to raise: the file, the place in it, and `what` is wrong there."""
        return InvalidDataset(f"`{self.path}`{f', {place}' if place else ''}: {what}")

    def warn(self, what: str, place: str | None = None) -> None:
        """Say `what` as a `DatasetWarning`; reading goes on."""
        warnings.warn(DatasetWarning(str(self.fault(what, place))), stacklevel=3)


def excerpt(text: str, width: int = 60) -> str:
    r"""The beginning of `text`, fit for a message: one line, nothing that steers a terminal.

    >>> excerpt("two\nlines, and much more", 14)
    'two\\nlines, an…'
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:width]
    )
    return shown if len(text) <= width and len(shown) <= width else f"{shown[:width]}…"


def _lines(source: Source, stream: io.BufferedReader) -> Iterator[tuple[int, str]]:
    """Each line, with its end, and its number."""
    for number in itertools.count(1):
        line = stream.readline(source.max_row + 1)
        if not line:
            return
        if len(line) > source.max_row:
            raise source.fault(f"longer than {source.max_row:,} bytes", f"line {number}")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise source.fault(f"not UTF-8: {error.reason}", f"line {number}") from None
        if "\0" in text:  # UTF-16 without its mark, or no text at all
            raise source.fault("not UTF-8 text: it has a NUL byte", f"line {number}")
        yield number, text


def _text_lines(source: Source, stream: io.BufferedReader) -> Iterator[Row]:
    for number, line in _lines(source, stream):
        if line.strip():
            yield f"line {number}", {"text": line.rstrip("\r\n")}


def _json_lines(source: Source, stream: io.BufferedReader) -> Iterator[Row]:
    def decoded() -> Iterator[Row]:
        for number, line in _lines(source, stream):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                yield place, decoder.decode(line)
            except json.JSONDecodeError as error:
                what = f"not valid JSON at column {error.colno}: {error.msg}"
                raise source.fault(what, place) from None

    decoder = Decoder()
    yield from _warn_repeated(source, decoder, decoded())


def _json(source: Source, stream: io.BufferedReader) -> Iterator[Row]:
    """An array of rows, an object that has one, or rows line by line: all go by this suffix."""
    head = stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    by_line = head.startswith(b"{") and not _holds_rows(_first_line(source, stream), source.max_row)
    stream.seek(0)
    if by_line:
        yield from _json_lines(source, stream)
        return
    decoder = Decoder()
    document = _Document(source, Scanner(stream, decoder, source.max_row))
    yield from _warn_repeated(source, decoder, document.rows())


def _first_line(source: Source, stream: io.BufferedReader) -> bytes:
    """The first line that is not blank, or as much of it as a row may have and one byte more."""
    line = b"\n"
    while line and not line.strip():
        line = stream.readline(source.max_row + 1)
    return line


def _holds_rows(line: bytes, max_row: int) -> bool:
    """Whether a file's first line is, or begins, an object around its rows, and not a row."""
    if len(line) > max_row:
        return True
    try:
        text = line.decode("utf-8-sig")
        value = Decoder().decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text.rstrip())  # nothing wrong but that it goes on
    except UnicodeDecodeError:
        return False
    return isinstance(value, dict) and isinstance(value.get(_ROWS_FIELD), list)


@dataclass
class _Document:
    """A file that is one JSON value: an array of rows, or an object with such an array."""

    source: Source
    text: Scanner
    place: str | None = None

    def rows(self) -> Iterator[Row]:
        """Every row with its place."""
        try:
            yield from self._of_object() if self.text.peek() == "{" else self._elements()
            if self.text.peek():
                raise self.source.fault("something follows the end of the JSON")
        except json.JSONDecodeError as error:
            raise self.source.fault(f"not valid JSON: {error.msg}", self.place) from None
        except UnicodeDecodeError as error:
            # Text is decoded ahead of the row that is parsed.
            where = f"in or after {self.place or 'the beginning'}"
            raise self.source.fault(f"not UTF-8: {error.reason}", where) from None

    def _of_object(self) -> Iterator[Row]:
        """The rows in the field `Instances`, where Super-NaturalInstructions has them."""
        found = False
        others: list[str] = []
        for name in self._names():
            if name != _ROWS_FIELD:
                others = [*others, name][:5]
                self.text.value()
                continue
            if found:
                raise self.source.fault(f"field `{_ROWS_FIELD}` is there twice")
            found = True
            yield from self._elements()
        if not found:
            names = excerpt(", ".join(f"`{name}`" for name in others), 80) or "no fields"
            raise self.source.fault(
                f"an object with {names}: expected an array of rows, `[{{…}}, …]`, an object a "
                f"line, or an object whose field `{_ROWS_FIELD}` is an array of rows"
            )

    def _names(self) -> Iterator[str]:
        """The names of an object's fields; who asks for the next has taken the value."""
        self.text.take()
        if self.text.peek() == "}":
            self.text.take()
            return
        while True:
            if self.text.peek() != '"':
                self._expect('a name in `"`')
            name = self.text.value()
            self.place = f"field `{excerpt(name)}`"
            if self.text.take() != ":":
                self._expect("`:`")
            yield name
            separator = self.text.take()
            if separator == "}":
                return
            if separator != ",":
                self._expect("`,` or `}` after it")

    def _elements(self) -> Iterator[Row]:
        """The elements of an array."""
        if self.text.take() != "[":
            what = "expected an array of rows, `[{…}, …]`, or an object a line"
            raise self.source.fault(what, self.place)
        if self.text.peek() == "]":
            self.text.take()
            return
        for number in itertools.count(1):
            self.place = f"row {number}"
            yield self.place, self.text.value()
            separator = self.text.take()
            if separator == "]":
                return
            if separator != ",":
                self._expect("`,` or `]` after it")

    def _expect(self, what: str) -> NoReturn:
        raise self.source.fault(f"not valid JSON: expected {what}", self.place)


def _warn_repeated(source: Source, decoder: Decoder, rows: Iterator[Row]) -> Iterator[Row]:
    """`rows`, and one warning: a file that repeats a name mostly does so in every row."""
    warned = False
    for place, row in rows:
        if decoder.repeated is not None and not warned:
            name = excerpt(decoder.repeated)
            source.warn(f"field `{name}` is given twice, the last one counts", place)
            warned = True
        yield place, row


def _csv(source: Source, stream: io.BufferedReader, *, delimiter: str) -> Iterator[Row]:
    records = _records(source, stream, delimiter)
    place, header = next(records, ("", []))
    repeated = next((name for name, count in Counter(header).items() if count > 1), None)
    if repeated is not None:
        raise source.fault(f"column `{excerpt(repeated)}` is there twice", place)
    if len(header) == 1 and any(other in header[0] for other in ";\t,|"):
        what = f"the header is one column, `{excerpt(header[0])}`"
        raise source.fault(f"{what}: .csv has commas between columns, .tsv has tabs", place)
    for place, record in records:
        if len(record) != len(header):
            what = f"expected {len(header)} fields as in the header, found {len(record)}"
            raise source.fault(what, place)
        yield place, dict(zip(header, record, strict=True))


def _records(
    source: Source, stream: io.BufferedReader, delimiter: str
) -> Iterator[tuple[str, list[str]]]:
    """The records that are not blank, each with the line it begins on."""
    taken = 0

    def lines() -> Iterator[str]:
        nonlocal taken
        for _, line in _lines(source, stream):
            taken += len(line)
            if taken > source.max_row:
                raise csv.Error(f"longer than {source.max_row:,} characters: an unclosed quote?")
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        place, taken = f"line {reader.line_num + 1}", 0
        # The limit is the whole process's: it is ours for one record, then given back.
        limit = csv.field_size_limit(source.max_row)
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise source.fault(f"not valid CSV: {_csv_fault(error)}", place) from None
        finally:
            csv.field_size_limit(limit)
        if record is None:
            return
        if record:
            yield place, record


def _csv_fault(error: csv.Error) -> str:
    """What is wrong with a record, without Python's advice to programmers."""
    what = str(error)
    if what.startswith("new-line character"):
        return "its lines end with a lone CR, expected LF or CRLF"
    if "expected after" in what:
        return f'{what}\na field that holds `"` stands in quotes, with each `"` in it doubled'
    return what


def _parquet(source: Source, stream: io.BufferedReader) -> Iterator[Row]:
    from lorameta_rs.parquet import parquet_rows

    yield from parquet_rows(source, stream)


READERS: dict[str, Callable[[Source, io.BufferedReader], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": partial(_csv, delimiter=","),
    ".tsv": partial(_csv, delimiter="\t"),
    ".txt": _text_lines,
    ".parquet": _parquet,
}
"""What reads a file of each suffix, the likeliest first."""
