"""What `index` does to a bank: fingerprints for its datasets, and a file of what else is slow.

`index.json` holds each adapter's SHA-256 and the norms of what it does, and, for each metric, how
far every member's dataset is from the nearest other, which a new one's distance is compared with.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lorameta_rs import _core, distance, files
from lorameta_rs._metrics import bank_rows
from lorameta_rs.errors import InvalidBank, LoraMetaError, NotFinite, UnreadableFile
from lorameta_rs.fingerprint import Fingerprint, token_distribution
from lorameta_rs.relevance import leave_one_out_nearest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.member import Member

FORMAT = 1

# Members whose distances from each other take about a second by any metric.
_QUICK = 150


@dataclass(frozen=True)
class AdapterRecord:
    """Which file a hash was made of, to see later whether it is still the same."""

    sha256: str
    size: int
    mtime_ns: int
    norms: list[float] | None = None
    """‖B A‖ in each of its modules, without the scaling; None where they cannot be computed."""
    fault: str | None = None
    """Why they cannot: which tensor holds NaN or infinity."""

    def is_sound(self) -> bool:
        """Whether its values are of their kinds: somebody else may have written to the file."""
        sound = isinstance(self.sha256, str) and isinstance(self.fault, str | None)
        return sound and all(_is_norm(norm) for norm in self.norms or [])

    def is_of(self, member: Member) -> bool:
        """Whether the member's file has the size and time recorded here."""
        return (self.size, self.mtime_ns) == (member.adapter.size, member.adapter.mtime_ns)


@dataclass
class Index:
    """The contents of `index.json`; one that is missing or broken counts as empty."""

    path: Path
    adapters: dict[str, AdapterRecord] = field(default_factory=dict)
    nearest: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, bank: Bank) -> Index:
        """The bank's index as it is on disk."""
        path = bank.index_path
        try:
            with files.reading(path) as file:
                found = json.load(file)
            if found["format"] != FORMAT:
                return cls(path)
            adapters = {name: AdapterRecord(**one) for name, one in found["adapters"].items()}
            sound = {name: record for name, record in adapters.items() if record.is_sound()}
            return cls(path, sound, dict(found["nearest"]))
        except (LoraMetaError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls(path)

    def save(self) -> None:
        """Write it; errors as `files.write_whole`."""
        adapters = {name: vars(record) for name, record in sorted(self.adapters.items())}
        content = {"format": FORMAT, "adapters": adapters, "nearest": self.nearest}
        try:
            with files.refusals(self.path.parent):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(self.path, (json.dumps(content, indent=1) + "\n").encode())
        except UnreadableFile as error:
            hint = "keep it elsewhere with --fingerprints DIR"
            raise type(error)(error.errno, f"{error.strerror}\n{hint}", error.filename) from error

    def norms(self, member: Member) -> list[float] | None:
        """The recorded norms of a member's modules, as `sha256` of its hash."""
        record = self._record(member)
        kept = None if record is None else record.norms
        return kept if kept is not None and len(kept) == len(member.modules) else None

    def sha256(self, member: Member) -> str | None:
        """The recorded hash of a member's file; None if there is none, or the file has changed."""
        record = self._record(member)
        return None if record is None else record.sha256

    def fault(self, member: Member) -> str | None:
        """Which tensor of a member was found to hold NaN or infinity, as `sha256` of its hash."""
        record = self._record(member)
        return None if record is None else record.fault

    def _record(self, member: Member) -> AdapterRecord | None:
        record = self.adapters.get(member.name)
        return record if record is not None and record.is_of(member) else None


def leave_out_not_finite(bank: Bank) -> None:
    """Leave out members that the index knows to hold NaN or infinity, and note what adds nothing.

    Raises:
        InvalidBank: None remains.
    """
    index = Index.of(bank)
    for member in bank.members:
        pairs = zip(member.modules, index.norms(member) or [], strict=False)
        if idle := [module.name for module, norm in pairs if norm == 0]:
            more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
            bank.note(
                f"`{member.name}` changes nothing in `{idle[0]}`{more}: its `lora_B` or `lora_A` "
                "holds only zeros"
            )
    faults = {member.name: index.fault(member) for member in bank.members}
    bank.leave_out({name: NotFinite(fault) for name, fault in faults.items() if fault is not None})


def make_fingerprints(
    bank: Bank, *, keep: bool = True, progress: Callable[[str], None] | None = None
) -> dict[str, bool]:
    """Make what fingerprints are missing or stale, and leave out members for which that fails.

    In a bank that cannot be written to they are made for this run alone, and a note says so.

    Args:
        bank: `bank.left_out` and `bank.notes` take what goes wrong.
        keep: Write them into the bank.
        progress: Told each member's name before its turn.

    Returns:
        By name of each member that had none, whether it has one now.

    Raises:
        InvalidBank: No member has a fingerprint.
        MissingFile, UnreadableFile, InvalidBank: Fingerprints are to be made, and the bank has no
            tokenizer, or none that can be used.
    """
    made: dict[str, bool] = {}
    failed: dict[str, LoraMetaError] = {}
    unwritable = None
    missing, outdated = bank.unfingerprinted(), bank.outdated()
    if any(bank.dataset(member) for member in bank.members if member.name in missing):
        _ = bank.tokenizer.vocab_size  # whatever is wrong with it is no member's fault
    for member in [member for member in bank.members if member.name in missing]:
        if progress is not None:
            progress(member.name)
        data = bank.dataset(member)
        if data is None:
            reason = f"`{member.folder}`: {missing[member.name]}; it cannot be compared"
            if member.name in outdated:
                reason = (
                    f"{outdated[member.name]}; there is no dataset to make it again\n"
                    f"put its tokenizer into the bank, or its dataset into `{member.folder}` and "
                    "run `lorameta-rs index`"
                )
            failed[member.name] = InvalidBank(reason)
            continue
        columns = bank.columns_of(member)
        try:
            found = token_distribution(data, tokenizer=bank.tokenizer, columns=columns)
        except LoraMetaError as error:
            failed[member.name] = error
            continue
        bank.keep(member.name, found)
        made[member.name] = True
        if not keep:
            continue
        path = bank.fingerprint_path(member)
        try:
            with files.refusals(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            found.save(path)
        except (UnreadableFile, PermissionError) as error:
            unwritable = unwritable or error
        else:
            bank.keep(member.name, Fingerprint.load(path))  # its parts stay in the file
    if unwritable is not None:
        bank.notes.append(
            f"fingerprints are made anew each time: {unwritable}\n"
            "keep them elsewhere with --fingerprints DIR"
        )
    elif keep and made:
        bank.forget_fingerprints()  # read again they lie side by side, and need no copy to stack
    if failed:
        bank.leave_out(failed)
    for note in _equal_datasets(bank):
        bank.note(note)
    return made | dict.fromkeys(failed, False)


def _equal_datasets(bank: Bank) -> list[str]:
    """Notes on members whose datasets have the same token counts."""
    rows = bank_rows(bank.fingerprints)
    sizes = Counter((row.total, len(row.ids)) for row in rows)
    alike: dict[bytes, list[str]] = {}
    for name, row in zip(bank.names, rows, strict=True):
        if sizes[row.total, len(row.ids)] > 1:  # the others, nearly all, need no look
            digest = hashlib.sha256(np.ascontiguousarray(row.ids).data)
            digest.update(np.ascontiguousarray(row.counts).data)
            alike.setdefault(digest.digest(), []).append(name)
    return [
        ", ".join(f"`{name}`" for name in names)
        + " have the same token counts: one dataset under several names counts several times"
        for names in alike.values()
        if len(names) > 1
    ]


def hash_adapters(bank: Bank, progress: Callable[[str], None] | None = None) -> int:
    """Record the SHA-256 and the norms of every adapter that has none yet, or has changed.

    Returns:
        How many were hashed.
    """
    index = Index.of(bank)
    before = dict(index.adapters)
    gone = set(index.adapters) - set(bank.names) - set(bank.left_out)
    for name in gone:
        del index.adapters[name]
    unknown = [member for member in bank.members if index.sha256(member) is None]
    try:
        for member in unknown:
            if progress is not None:
                progress(member.name)
            adapter = member.adapter
            digest = files.sha256(adapter.path)
            norms, fault = norms_or_fault(member)
            index.adapters[member.name] = AdapterRecord(
                digest, adapter.size, adapter.mtime_ns, norms, fault
            )
    finally:
        # What is known is kept, also where the rest was interrupted.
        if index.adapters != before:
            index.save()
    return len(unknown)


def norms_or_fault(member: Member) -> tuple[list[float] | None, str | None]:
    """The norms of a member's modules, or which tensor holds NaN or infinity, from its file."""
    from lorameta_rs.merge import Options

    try:
        return _core.norms([member.adapter], Options())[0], None
    except NotFinite as error:
        return None, str(error)


def _is_norm(value: Any) -> bool:
    return type(value) is float and 0 <= value < math.inf


def nearest_distances(
    bank: Bank,
    metric: str,
    *,
    patient: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Floats | None:
    """Each member's distance to the nearest other member.

    Args:
        bank: Its members all have fingerprints.
        metric: A key of `distance.METRICS`.
        patient: Compute them however long it takes, and keep them in the index.
        progress: Told how many members are done, of how many.

    Returns:
        float64 [n], empty for a bank of one; None if they are not known and slow to compute.
    """
    index = Index.of(bank)
    key = _key(bank, metric)
    match index.nearest.get(metric):
        case {"fingerprints": of, "distances": [*kept]} if (
            of == key and len(kept) == len(bank) and all(_is_distance(one) for one in kept)
        ):
            return np.asarray(kept, dtype=np.float64)
    if len(bank) > _QUICK and not patient:
        return None
    tell = None if progress is None else lambda done: progress(done, len(bank))
    found = leave_one_out_nearest(distance.pairwise(metric, bank.fingerprints, tell))
    if patient and len(bank) > 1:
        index.nearest[metric] = {"fingerprints": key, "distances": found.tolist()}
        index.save()
    return found


def _is_distance(value: Any) -> bool:
    return type(value) is float and not math.isnan(value)


def _key(bank: Bank, metric: str) -> str:
    """What the members' distances depend on: their fingerprints, or that part, in order."""
    digest = hashlib.sha256()
    part = distance.part_of(metric)
    counts = bank.fingerprints if part is None else bank.fingerprints.part(part)
    for array in (counts.indptr, counts.ids, counts.counts, counts.relations):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
