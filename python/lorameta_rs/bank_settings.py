"""`bank.toml`: what a user says of a bank; never written by this program."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorameta_rs import files
from lorameta_rs.errors import InvalidBank

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

FILE_NAME = "bank.toml"

_LARGEST = 1 << 20
_OF_BANK = ("base_model", "tokenizer")
_OF_MEMBERS = ("datasets", "families")


@dataclass(frozen=True)
class BankSettings:
    """What the user's `bank.toml` says; every key is optional."""

    base_model: str | None = None
    tokenizer: str | None = None
    datasets: dict[str, str] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    """What else the file has, each as a text to be shown."""

    @classmethod
    def load(cls, folder: Path) -> BankSettings:
        """The settings of the bank in `folder`; none where it has no `bank.toml`.

        Raises:
            MissingFile, UnreadableFile: The folder or the file cannot be read.
            InvalidBank: The file is not TOML, or holds something else.
        """
        path = folder / FILE_NAME
        if not path.exists():
            with files.refusals(folder):
                folder.stat()
            return cls()
        with files.reading(path) as file:
            text = file.read(_LARGEST)
        try:
            found = tomllib.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise InvalidBank(f"`{path}`: not TOML: {error}") from error
        bank, datasets, families = (found.pop(name, {}) for name in ("bank", *_OF_MEMBERS))
        for name, table in (("bank", bank), ("datasets", datasets), ("families", families)):
            texts = isinstance(table, dict) and all(isinstance(v, str) for v in table.values())
            if not texts or any("\0" in value for value in table.values()):
                raise InvalidBank(f"`{path}`: `[{name}]` has to be a table of texts")
        unknown = [f"`{key}` in `[bank]`" for key in bank if key not in _OF_BANK]
        unknown += [f"`[{n}]`" if isinstance(v, dict) else f"`{n}`" for n, v in found.items()]
        return cls(
            bank.get("base_model"), bank.get("tokenizer"), datasets, families, tuple(unknown)
        )

    def doubts(self, folder: Path, names: Collection[str]) -> list[str]:
        """What of it means nothing to the bank in `folder`, which has folders of these names."""
        path = folder / FILE_NAME
        known = f"known are {', '.join(f'`{key}`' for key in _OF_BANK)} in `[bank]`, " + (
            " and ".join(f"`[{section}]`" for section in _OF_MEMBERS)
        )
        found = [f"`{path}`: {what} means nothing; {known}" for what in self.unknown]
        for section in _OF_MEMBERS:
            strange = [name for name in getattr(self, section) if name not in names]
            where = f"`{path}`: `[{section}]` names"
            found += [f"{where} `{name}`, which is no member" for name in strange]
        return found
