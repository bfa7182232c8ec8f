"""JSON as datasets have it, value by value: neither a long file nor a hostile one fills memory."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from io import BufferedReader


class Decoder(json.JSONDecoder):
    """Reads huge integers and notices repeated names; too deep a nesting is a `JSONDecodeError`.

    `repeated` is the first name that an object had twice. As everywhere, its last value counts.
    """

    def __init__(self) -> None:
        super().__init__(parse_int=_integer, object_pairs_hook=self._object)
        self.repeated: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs) and self.repeated is None:
            [(self.repeated, _)] = Counter(name for name, _ in pairs).most_common(1)
        return fields

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """The value that begins at `idx`, and where it ends."""
        try:
            return super().raw_decode(s, idx)
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", s, idx) from None


def _integer(digits: str) -> int | float:
    """No integer that matters has more than 20 digits, and Python refuses those past 4,300."""
    return int(digits) if len(digits) <= 20 else float(digits)


class Scanner:
    """Values and the characters between them, from a UTF-8 stream: only a window of it is held.

    Every method may raise `UnicodeDecodeError`.
    """

    _CHUNK = 1 << 16
    _NOT_SPACE = re.compile(r"[^ \t\r\n]")
    _NOT_OF_NUMBER = re.compile(r"[^0-9+\-.eE]")

    def __init__(self, stream: BufferedReader, decoder: Decoder, limit: int) -> None:
        self._stream, self._decoder, self._limit = stream, decoder, limit
        self._characters = codecs.getincrementaldecoder("utf-8-sig")()
        self._window, self._at = "", 0

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            if found := self._NOT_SPACE.search(self._window, self._at):
                self._at = found.start()
                return found[0]
            self._at = len(self._window)
            if not self._widen():
                return ""

    def take(self) -> str:
        """As `peek`, and go past it."""
        character = self.peek()
        self._at += len(character)
        return character

    def value(self) -> Any:
        """The next value; `JSONDecodeError` if there is none, or none of at most `limit`."""
        self.peek()
        while True:
            long = len(self._window) - self._at > self._limit
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
            except json.JSONDecodeError:
                # Wrong, or not all there yet: only more text can tell.
                if long or not self._widen():
                    raise
                continue
            length = end - self._at
            # A number may go on behind the window.
            if long or self._NOT_OF_NUMBER.search(self._window, end) or not self._widen():
                self._at += length
                return value

    def _widen(self) -> bool:
        """Read more, as much again as is held, so that a long value is not scanned too often."""
        held = self._window[self._at :]
        chunk = self._stream.read(max(self._CHUNK, len(held)))
        self._window, self._at = held + self._characters.decode(chunk, final=not chunk), 0
        return bool(chunk)
