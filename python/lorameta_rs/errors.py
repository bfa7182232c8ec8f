"""What can be wrong with what a user gives us. The core raises these too.

Every message names the file, the tensor, field or row, what was expected and what was found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class LoraMetaError(Exception):
    """The input cannot be used. The command line prints the message and exits with status 1."""


class UnreadableFile(LoraMetaError, OSError):
    """The operating system refused a file; `errno` and `filename` are set."""

    def __str__(self) -> str:
        # As all other messages: the file first, and no number.
        if self.filename is None or self.strerror is None:
            return super().__str__()
        return f"`{self.filename}`: {self.strerror}"


class MissingFile(UnreadableFile, FileNotFoundError):
    """A file or folder that was named is not there; `filename` is its path."""


class InvalidAdapter(LoraMetaError, ValueError):
    """An adapter's file or configuration is broken, or holds what cannot be merged."""


class LayoutMismatch(LoraMetaError, ValueError):
    """Adapters that were to be combined differ in rank, shape or base model."""


class NotFinite(LoraMetaError, ValueError):
    """A tensor holds NaN or infinity, or a sum of finite numbers left the range of its type."""


class FaultyMembers(NotFinite):
    """Members to be combined hold NaN or infinity; `reasons` says of each by name which tensor."""

    def __init__(self, reasons: Mapping[str, NotFinite]) -> None:
        self.reasons = reasons
        more = f"\n{len(reasons) - 1} more hold such numbers" if len(reasons) > 1 else ""
        hint = "\nleave such an adapter out, or go on with --allow-nan"
        super().__init__(f"{next(iter(reasons.values()))}{more}{hint}")


class FileChanged(LoraMetaError):
    """An adapter's file changed while it was being read; nothing was written."""


class InvalidDataset(LoraMetaError, ValueError):
    """A dataset cannot be read, has no rows, or lacks the fields that make up a text."""


class InvalidBank(LoraMetaError, ValueError):
    """A bank has no usable member, or its settings, tokenizer or fingerprints do not fit."""


class InvalidSetting(LoraMetaError, ValueError):
    """A setting is out of its range, or does not go with another one."""


class OutputExists(LoraMetaError, FileExistsError):
    """The output is there already; `force` replaces it."""


class MissingExtra(LoraMetaError, ImportError):
    """An optional package is needed; the message says what to install."""
