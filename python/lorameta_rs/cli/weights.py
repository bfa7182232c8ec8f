"""Coefficients that a user gives `merge` by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lorameta_rs import files
from lorameta_rs.errors import InvalidAdapter, InvalidSetting
from lorameta_rs.json_stream import Decoder
from lorameta_rs.rows import excerpt
from lorameta_rs.sums import first_match

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorameta_rs.bank import Bank

_LARGEST_FILE = 16 << 20


def read_weights(given: Sequence[str]) -> tuple[dict[str, list[float]], tuple[str, ...]]:
    """Each name's numbers, and the modules that they are for: one number for all if there are none.

    From `NAME=0.3`, a JSON file `{"name": 0.3}`, or one with a number for each of several modules:
    `{"modules": ["0", "1", ".*q_proj"], "weights": {"name": [0.3, 0.1, 1.0]}}`.
    """
    weights: dict[str, list[float]] = {}
    modules: tuple[str, ...] = ()
    for word in given:
        if not word:
            raise InvalidSetting("--weights is empty, expected a JSON file or NAME=0.3")
        name, equals, number = word.rpartition("=")
        by_hand = equals and not os.path.exists(word)  # noqa: PTH110, no name is too long for it
        found: object = {name: _number(number)} if by_hand else _content(word)
        match found:
            case {"modules": [*patterns], "weights": dict(rows)} if len(given) == 1 and all(
                isinstance(pattern, str) for pattern in patterns
            ):
                modules, found = tuple(patterns), rows
            case dict():
                pass
            case _:
                raise InvalidSetting(f"`{word}`: expected an object of names and numbers")
        for member, value in found.items():
            row = value if modules and isinstance(value, list) else [value] * max(len(modules), 1)
            if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in row):
                raise InvalidSetting(f"`{word}`: the weight of `{member}` is not a number")
            if len(row) != max(len(modules), 1):
                raise InvalidSetting(
                    f"`{word}`: `{member}` has {len(row)} weights for {len(modules)} modules"
                )
            if member in weights:
                raise InvalidSetting(f"`{word}`: the weight of `{member}` is given twice")
            weights[member] = [float(one) for one in row]
    return weights, modules


def check_modules(file: str, modules: Sequence[str], bank: Bank) -> None:
    """See that each of the modules that a weights file names is one of the bank."""
    names = sorted({module.name for member in bank.members for module in member.modules})
    for key in modules:
        try:
            found = first_match([key], names)
        except InvalidAdapter as error:
            raise InvalidSetting(f"`{file}`: {error}") from error
        if all(match is None for match in found):
            raise InvalidSetting(
                f"`{file}`: no module of the bank matches `{excerpt(key)}`; one is `{names[0]}`"
            )


def _content(path: str) -> object:
    with files.reading(Path(path)) as file:
        text = file.read(_LARGEST_FILE)
    decoder = Decoder()
    try:
        found = decoder.decode(text.decode("utf-8-sig"))
    except ValueError as error:
        raise InvalidSetting(f"`{path}`: not JSON: {error}") from error
    if decoder.repeated is not None:
        raise InvalidSetting(f"`{path}`: `{decoder.repeated}` is there twice")
    return found


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
