"""`bank.toml`: what a user says of a bank; never written by this program."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorameta_rs import files
from lorameta_rs.errors import InvalidBank

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "bank.toml"

_LARGEST = 1 << 20


@dataclass(frozen=True)
class BankSettings:
    """What the user's `bank.toml` says; every key is optional."""

    base_model: str | None = None
    tokenizer: str | None = None
    datasets: dict[str, str] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)

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
        bank = found.get("bank", {})
        datasets, families = found.get("datasets", {}), found.get("families", {})
        for name, table in (("bank", bank), ("datasets", datasets), ("families", families)):
            texts = isinstance(table, dict) and all(isinstance(v, str) for v in table.values())
            if not texts or any("\0" in value for value in table.values()):
                raise InvalidBank(f"`{path}`: `[{name}]` has to be a table of texts")
        return cls(bank.get("base_model"), bank.get("tokenizer"), datasets, families)
