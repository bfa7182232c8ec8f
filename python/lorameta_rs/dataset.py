"""The texts of a dataset, one at a time: which fields of a row make up its text.

A row's text is its input followed by its answer with nothing between, as the paper's authors have
it. Only several *inputs* are joined, by a newline; no template is applied. Of a field that holds a
list the first entry counts, as Super-NaturalInstructions has it; of a chat, all contents, of which
the last is the answer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorameta_rs.errors import InvalidSetting
from lorameta_rs.files import refusals
from lorameta_rs.rows import MAX_ROW, READERS, DatasetWarning, Source, excerpt

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

__all__ = ["DatasetWarning", "Example", "examples", "find", "texts"]

_COLUMNS = "`--columns` names the fields to use; for a member of a bank, `index --columns`"


class Example(NamedTuple):
    """A row's text in its two parts; the answer is empty where the row does not tell them apart."""

    before: str
    answer: str = ""

    @property
    def text(self) -> str:
        """The row's text."""
        return self.before + self.answer


def texts(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    vocab_size: int = 1 << 32,
    max_row: int = MAX_ROW,
) -> Iterator[str | list[int]]:
    """Each row's text, or its token ids if the row has them ready; all else as `examples`."""
    for row in examples(path, columns=columns, vocab_size=vocab_size, max_row=max_row):
        yield row.text if isinstance(row, Example) else row


def examples(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    vocab_size: int = 1 << 32,
    max_row: int = MAX_ROW,
) -> Iterator[Example | list[int]]:
    r"""Each row's input and answer, or its token ids if the row has them ready.

    Errors come while iterating.

    The first row tells which fields to use, and every other row must have them too. In order:
    `instruction`, `input` (may be missing) and `output`; `input` and `output`; `prompt` and
    `completion`; `question` and `answer`; `messages`; `text`; `input_ids`.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
    ...     print("prompt,completion\none and one is, two", file=file, flush=True)
    ...     list(examples(file.name))
    [Example(before='one and one is', answer=' two')]

    Args:
        path: A jsonl, json, csv, tsv, txt (each line a row) or parquet file, or a .gz of these. A
            json file is an array of rows, an object with such an array as `Instances`, or jsonl.
        columns: The fields to use instead; several are joined by a newline, and the last is the
            answer.
        vocab_size: Token ids have to be smaller.
        max_row: Bytes that one row may have.

    Raises:
        MissingFile, UnreadableFile: the file cannot be opened or read.
        InvalidDataset: it has no rows, or one is broken or lacks a field; file and row are named.
        MissingExtra: parquet without pyarrow.
        InvalidSetting: `columns` names no field.

    Warns:
        DatasetWarning: a row names a field twice, or every text is empty.
    """
    if columns is not None and (isinstance(columns, str) or not columns):
        raise InvalidSetting(f"`columns` is {columns!r}, expected a list of one or more fields")
    chosen = None if columns is None else _Layout(tuple(columns))

    def select(names: list[str]) -> list[str]:
        try:
            return _needed(names, chosen)
        except _UnfitError as error:
            raise source.fault(str(error)) from None

    source = Source(Path(path), max_row, select)
    layout = chosen
    rows, empty = 0, True
    for place, row in source.rows():
        try:
            if not isinstance(row, dict):
                raise _UnfitError(f"expected an object with named fields, found {_described(row)}")
            layout = layout or _recognised(row)
            content = layout.content(row, vocab_size)
        except _UnfitError as error:
            raise source.fault(str(error), place) from None
        size = len(content.text if isinstance(content, Example) else content)
        if size > max_row:  # parquet has no lines whose length could be looked at before
            raise source.fault(f"longer than {max_row:,} characters or token ids", place)
        rows += 1
        empty = empty and size == 0
        yield content
    if rows == 0:
        raise source.fault("the dataset has no rows")
    if empty:
        source.warn("the text of every row is empty")


def find(folder: str | os.PathLike[str]) -> Path | None:
    """The dataset in a member's folder: `train.*`, else `dataset.*`, else `data.*`, if any.

    Of several, the format named first in `READERS` is taken, and a plain file before its .gz.

    Raises:
        MissingFile, UnreadableFile: the folder cannot be listed.
    """
    folder = Path(folder)
    with refusals(folder), os.scandir(folder) as entries:
        files = {entry.name for entry in entries if entry.is_file()}
    for stem in ("train", "dataset", "data"):
        for suffix in READERS:
            for name in (f"{stem}{suffix}", f"{stem}{suffix}.gz"):
                if name in files:
                    return folder / name
    return None


class _UnfitError(Exception):
    """Why a row has no text; who knows the row's place adds it."""


@dataclass(frozen=True)
class _Layout:
    """The fields of a row that make up its text."""

    inputs: tuple[str, ...]
    output: str | None = None
    optional: str | None = None
    ids: bool | None = None
    """Whether its only field holds token ids; None where it may hold either."""

    @cached_property
    def fields(self) -> tuple[str, ...]:
        return self.inputs if self.output is None else (*self.inputs, self.output)

    @cached_property
    def required(self) -> tuple[str, ...]:
        return tuple(name for name in self.fields if name != self.optional)

    def check(self, names: Collection[str]) -> None:
        """See that a row with these fields has all that are required."""
        for name in self.required:
            if name not in names:
                what = f"no field `{excerpt(name)}`, found {_listed(names)}"
                raise _UnfitError(f"{what}\n{_COLUMNS}")

    def content(self, row: dict[str, Any], vocab_size: int) -> Example | list[int]:
        """The text of `row`, or its token ids where its only field is a list of numbers."""
        self.check(row)
        if len(self.fields) == 1:
            value = row[self.fields[0]]
            numbers = value == [] or (isinstance(value, list) and isinstance(value[0], int | float))
            if self.ids or (numbers and self.ids is None):
                return _token_ids(self.fields[0], value, vocab_size)
        parts = [text for name in self.inputs for text in self._texts(row, name)]
        if self.output is not None:
            found = Example(_joined(parts), "\n".join(self._texts(row, self.output)))
        else:
            text, answer = _joined(parts), parts[-1] if len(parts) > 1 else ""
            found = Example(text[: len(text) - len(answer)], answer)
        _check_characters(found.text)
        return found

    def _texts(self, row: dict[str, Any], name: str) -> list[str]:
        value = row.get(name)
        match value:
            case str() as text:
                return [text]
            case [str() as first, *_]:
                return [first]
            case [dict(), *_]:
                return list(_contents(name, value))
            case None if name == self.optional:
                return []
        what = f"field `{excerpt(name)}` holds {_described(value)}"
        raise _UnfitError(f"{what}, expected text or an array that begins with text")


_LAYOUTS = (
    _Layout(("instruction", "input"), "output", optional="input"),
    _Layout(("input",), "output"),
    _Layout(("prompt",), "completion"),
    _Layout(("question",), "answer"),
    _Layout(("messages",), ids=False),
    _Layout(("text",), ids=False),
    _Layout(("input_ids",), ids=True),
)


def _recognised(names: Collection[str]) -> _Layout:
    for layout in _LAYOUTS:
        if all(name in names for name in layout.required):
            return layout
    expected = "; ".join(_listed(layout.required, " and ") for layout in _LAYOUTS)
    raise _UnfitError(
        f"its fields make no known text, found {_listed(names)}\nexpected {expected}\n{_COLUMNS}"
    )


def _needed(names: list[str], chosen: _Layout | None) -> list[str]:
    """The columns to read of those that a file has."""
    layout = chosen or _recognised(names)
    layout.check(names)
    return [name for name in layout.fields if name in names]


def _joined(parts: Iterable[str]) -> str:
    """Line by line; an empty input, as the optional one often is, adds no empty line."""
    return "\n".join(part for part in parts if part)


def _contents(name: str, messages: list[Any]) -> Iterator[str]:
    for number, message in enumerate(messages, 1):
        match message:
            case {"content": str() as text}:
                yield text
            case {"content": None}:  # a message that only calls a tool
                yield ""
            case {"content": [*parts]}:  # text between images
                yield from [text for part in parts for text in _part_text(part)] or [""]
            case _:
                where = f"message {number} of field `{excerpt(name)}`"
                raise _UnfitError(f"{where} has no text as its `content`")


def _part_text(part: Any) -> list[str]:
    match part:
        case {"text": str() as text}:
            return [text]
    return []


def _token_ids(name: str, values: Any, vocab_size: int) -> list[int]:
    if not isinstance(values, list):
        what = f"field `{excerpt(name)}` holds {_described(values)}"
        raise _UnfitError(f"{what}, expected an array of token ids")
    for value in values:
        if type(value) is not int or not 0 <= value < vocab_size:
            what = f"field `{excerpt(name)}` holds {_described(value)}"
            raise _UnfitError(f"{what}, no token id: those are integers from 0 to {vocab_size - 1}")
    return values


def _check_characters(text: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and has no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = excerpt(text[error.start])
        raise _UnfitError(f"the text has `{lone}`, half of a surrogate pair") from None


def _described(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text `{excerpt(value, 30)}`"
        case []:
            return "an empty array"
        case [str() | int() | float() | None as first, *_]:
            return f"an array that begins with {_described(first)}"
        case list():
            return "an array"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"


def _listed(names: Iterable[str], separator: str = ", ") -> str:
    return excerpt(separator.join(f"`{name}`" for name in names), 80) or "none"
