"""`bank.toml`: what a user says of a bank; written by this program for a copy of the bank alone."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorameta_rs import files
from lorameta_rs.errors import InvalidBank, MissingFile

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

FILE_NAME = "bank.toml"

_LARGEST = 1 << 20
_OF_BANK = ("base_model", "tokenizer")
_OF_MEMBERS = ("datasets", "families")
_OF_BASE = ("architecture", "heads", "kv_heads", "config")


@dataclass(frozen=True)
class BankSettings:
    """What the user's `bank.toml` says; every key is optional."""

    base_model: str | None = None
    tokenizer: str | None = None
    datasets: dict[str, str] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)
    base: dict[str, str | int] = field(default_factory=dict)
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
        with files.refusals(folder):
            folder.stat()
        try:
            with files.reading(path) as file:
                text = file.read(_LARGEST)
        except MissingFile:
            return cls()
        try:
            found = tomllib.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InvalidBank(f"`{path}`: not TOML: {error}") from error
        bank, datasets, families = (found.pop(name, {}) for name in ("bank", *_OF_MEMBERS))
        for name, table in (("bank", bank), ("datasets", datasets), ("families", families)):
            texts = isinstance(table, dict) and all(isinstance(v, str) for v in table.values())
            if not texts or any("\0" in value for value in table.values()):
                raise InvalidBank(f"`{path}`: `[{name}]` has to be a table of texts")
        base = found.pop("base", {})
        if not isinstance(base, dict) or not all(type(v) in (str, int) for v in base.values()):
            raise InvalidBank(f"`{path}`: `[base]` has to be a table of texts and integers")
        for name in ("heads", "kv_heads"):
            if name in base and (type(base[name]) is not int or not 0 < base[name] < 2**20):
                raise InvalidBank(f"`{path}`: `{name}` in `[base]` is no number of heads")
        unknown = [f"`{key}` in `[bank]`" for key in bank if key not in _OF_BANK]
        unknown += [f"`{key}` in `[base]`" for key in base if key not in _OF_BASE]
        unknown += [f"`[{n}]`" if isinstance(v, dict) else f"`{n}`" for n, v in found.items()]
        return cls(
            bank.get("base_model"), bank.get("tokenizer"), datasets, families, base, tuple(unknown)
        )

    @property
    def toml(self) -> str:
        """The file's text; empty where nothing is said."""
        tables: dict[str, Mapping[str, str | int | None]] = {
            "bank": {"base_model": self.base_model, "tokenizer": self.tokenizer},
            "base": self.base,
            "datasets": self.datasets,
            "families": self.families,
        }
        sections = []
        for name, table in tables.items():
            said = {key: value for key, value in table.items() if value is not None}
            lines = [f"{_toml(key)} = {_toml(value)}" for key, value in said.items()]
            if lines:
                sections.append("\n".join([f"[{name}]", *lines]) + "\n")
        return "\n".join(sections)

    @property
    def heads(self) -> tuple[int, int] | None:
        """The base model's heads, of queries and of keys, if they are said."""
        heads = self.base.get("heads")
        kv_heads = self.base.get("kv_heads", heads)
        return (heads, kv_heads) if isinstance(heads, int) and isinstance(kv_heads, int) else None

    def doubts(self, folder: Path, names: Collection[str]) -> list[str]:
        """What of it means nothing to the bank in `folder`, which has folders of these names."""
        path = folder / FILE_NAME
        known = f"known are {', '.join(f'`{key}`' for key in _OF_BANK)} in `[bank]`, " + (
            f"{', '.join(f'`{key}`' for key in _OF_BASE)} in `[base]`, "
            + " and ".join(f"`[{section}]`" for section in _OF_MEMBERS)
        )
        found = [f"`{path}`: {what} means nothing; {known}" for what in self.unknown]
        for section in _OF_MEMBERS:
            strange = [name for name in getattr(self, section) if name not in names]
            where = f"`{path}`: `[{section}]` names"
            found += [f"{where} `{name}`, which is no member" for name in strange]
        return found


def _toml(value: str | int) -> str:
    """As JSON has it, but for what TOML has otherwise: no surrogates, and DEL as an escape."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
