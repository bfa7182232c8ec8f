"""The fingerprints that a bank keeps: which can be used, which have to be made again, and why."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING

from lorameta_rs import files
from lorameta_rs.errors import LoraMetaError
from lorameta_rs.fingerprint import Fingerprint, Fingerprints, load_all

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorameta_rs.bank import Bank
    from lorameta_rs.member import Member

FILE_NAME = "fingerprint.safetensors"


class BankFingerprints:
    """The members' fingerprints: those on disk, and those that were just made."""

    def __init__(self, bank: Bank, folder: Path | None) -> None:
        """Nothing is read yet; `folder` is where they are kept, None for beside the adapters."""
        self._bank = bank
        self._folder = folder
        self._reasons: dict[str, str | None] = {}
        self._broken: dict[str, str] = {}

    def path(self, name: str) -> Path:
        """Where a member's fingerprint lies, or will."""
        return (self._folder or self._bank.folder) / name / FILE_NAME

    def file(self, name: str) -> Path | None:
        """The file to be read: one published beside its adapter serves until there is another."""
        for path in (self.path(name), self._bank.folder / name / FILE_NAME):
            with files.refusals(path):
                if path.exists():
                    return path
        return None

    @cached_property
    def loaded(self) -> dict[str, Fingerprint]:
        """The fingerprints that can be read, by name; what is wrong with others is noted."""
        paths = {name: path for name in self._bank.names if (path := self.file(name)) is not None}
        loaded, faults = load_all(paths)
        self._broken = {name: f"`{name}`: {error}" for name, error in faults.items()}
        for note in self._broken.values():
            self._bank.note(note)
        return loaded

    def keep(self, name: str, fingerprint: Fingerprint) -> None:
        """Take one that was just made, instead of the one on disk."""
        self.loaded[name] = fingerprint
        self._reasons[name] = None
        if (note := self._broken.pop(name, None)) in self._bank.notes:
            self._bank.notes.remove(note)  # its advice, to make another, has been followed

    def stack(self, names: Sequence[str]) -> Fingerprints:
        """The matrix of these members' rows."""
        return Fingerprints.stack([self.loaded[name] for name in names])

    def unusable(self, members: Sequence[Member]) -> dict[str, str]:
        """Those of these members without a fingerprint that can be used, and why."""
        for member in members:
            if member.name not in self._reasons:
                self._reasons[member.name] = self._fault(member)
        names = [member.name for member in members]
        self._reasons |= self._strangers(names)
        return {name: why for name in names if (why := self._reasons[name]) is not None}

    def _fault(self, member: Member) -> str | None:
        """Why a member's fingerprint cannot be used, if so; nothing stops at one bad member."""
        data = self._bank.dataset(member)
        fingerprint = self.loaded.get(member.name)
        if fingerprint is None:
            if self.file(member.name) is None:
                return "it has no fingerprint" + ("" if data else " and no dataset")
            return "its fingerprint cannot be read" + ("" if data else ", and it has no dataset")
        try:
            return self._staleness(member, fingerprint, data)
        except LoraMetaError as error:
            # Whoever has the fingerprint needs no dataset: one that is gone does no harm.
            why = self._staleness(member, fingerprint, None)
            if why is None:
                self._bank.note(f"`{member.name}`: its fingerprint is used as it is: {error}")
            return why

    def _staleness(self, member: Member, fingerprint: Fingerprint, data: Path | None) -> str | None:
        bank = self._bank
        why = fingerprint.staleness(
            dataset=data,
            tokenizer=bank.tokenizer if bank.has_tokenizer else None,
            columns=bank.columns if data is not None else None,
        )
        return None if why is None else f"`{self.file(member.name)}`: {why}"

    def _strangers(self, names: Sequence[str]) -> dict[str, str]:
        """Those of another tokenizer than most, in a bank that has none to compare them with."""
        if self._bank.has_tokenizer:
            return {}
        fresh = {name: self.loaded[name] for name in names if not self._reasons[name]}
        known = Counter(one.identity for one in fresh.values())
        usual = max(known, key=lambda identity: known[identity], default="")
        return {
            name: f"`{self.file(name)}`: it was made with another tokenizer than most of the "
            f"bank's: {one.identity}, not {usual}"
            for name, one in fresh.items()
            if one.identity != usual
        }
