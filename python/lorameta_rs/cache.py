"""What a base model said, kept on the disk, so that a run that was broken off can be taken up."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from lorameta_rs import files
from lorameta_rs.errors import LoraMetaError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Cache:
    """Lists in a folder, as JSON, each under the hash of all that it depends on.

    Args:
        folder: Made when something is kept; None keeps nothing.
        of: What all lists depend on.
    """

    def __init__(self, folder: Path | None, *of: object) -> None:
        self.folder = folder
        self.of = of

    def load(self, count: int, *key: object) -> list[Any] | None:
        """The list of a key, `count` long; None if there is none, or none that can be read."""
        if self.folder is None:
            return None
        try:
            with files.reading(self.folder / self._name(key)) as file:
                found = json.load(file)
        except (LoraMetaError, ValueError, RecursionError):
            return None
        return found if isinstance(found, list) and len(found) == count else None

    def keep(self, found: Sequence[object], *key: object) -> None:
        """Keep a list; errors as `files.write_whole`."""
        if self.folder is not None:
            with files.refusals(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            files.write_whole(self.folder / self._name(key), json.dumps(found).encode())

    def _name(self, key: tuple[object, ...]) -> str:
        text = json.dumps([*self.of, *key]).encode()
        return f"{hashlib.sha256(text).hexdigest()}.json"
