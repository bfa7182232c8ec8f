"""What `index` does to a bank: fingerprints for its datasets, and a file of what else is slow.

`index.json` holds each adapter's SHA-256 and the norms of what it does, and, for each metric, how
far every member's dataset is from the nearest other, which a new one's distance is compared with.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lorameta_rs import _core, distance, files
from lorameta_rs._metrics import bank_rows
from lorameta_rs.errors import (
    FileChanged,
    InvalidBank,
    LoraMetaError,
    NotFinite,
    UnreadableFile,
)
from lorameta_rs.fingerprint import Fingerprint, token_distribution
from lorameta_rs.relevance import leave_one_out_nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.member import Member

FORMAT = 1

# Members whose distances from each other take about a second by any metric.
_QUICK = 150


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """Which file a hash was made of, to see later whether it is still the same."""

    sha256: str
    size: int
    mtime_ns: int
    norms: array[float] | None = None
    """‖B A‖ in each of its modules, without the scaling; None where they cannot be computed."""
    fault: str | None = None
    """Why they cannot: which tensor holds NaN or infinity."""
    zeros: list[str] | None = None
    """Which tensors hold only zeros, where a norm is zero."""

    def is_sound(self) -> bool:
        """Whether its values are of their kinds: somebody else may have written to the file."""
        texts = (self.sha256, self.fault or "", *(self.zeros or []))
        return isinstance(self.norms, array | None) and all(isinstance(one, str) for one in texts)

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
                found = json.load(file, object_hook=_packed)
            if found["format"] != FORMAT:
                return cls(path)
            adapters = {name: AdapterRecord(**one) for name, one in found["adapters"].items()}
            sound = {name: record for name, record in adapters.items() if record.is_sound()}
            return cls(path, sound, dict(found["nearest"]))
        except (LoraMetaError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls(path)

    def save(self) -> None:
        """Write it; errors as `files.write_whole`."""
        adapters = {name: asdict(record) for name, record in sorted(self.adapters.items())}
        content = {"format": FORMAT, "adapters": adapters, "nearest": self.nearest}
        text = json.dumps(content, indent=1, default=list) + "\n"
        try:
            with files.refusals(self.path.parent):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(self.path, text.encode())
        except UnreadableFile as error:
            hint = "keep it elsewhere with --fingerprints DIR"
            raise type(error)(error.errno, f"{error.strerror}\n{hint}", error.filename) from error

    def norms(self, member: Member) -> Sequence[float] | None:
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

    def zeros(self, member: Member) -> list[str]:
        """Which tensors of a member were found to hold only zeros, as `sha256` of its hash."""
        record = self._record(member)
        return [] if record is None else record.zeros or []

    def _record(self, member: Member) -> AdapterRecord | None:
        record = self.adapters.get(member.name)
        return record if record is not None and record.is_of(member) else None


def leave_out_not_finite(bank: Bank) -> None:
    """Leave out members that the index knows to hold NaN or infinity, and note what adds nothing.

    Raises:
        InvalidBank: None remains.
    """
    note_idle(bank, bank.members)
    bank.leave_out(faults(bank, bank.members))


def faults(bank: Bank, members: Sequence[Member]) -> dict[str, NotFinite]:
    """Those of these members that the index knows to hold NaN or infinity, and where."""
    known = {member.name: bank.index.fault(member) for member in members}
    return {name: NotFinite(fault) for name, fault in known.items() if fault is not None}


def note_idle(bank: Bank, members: Sequence[Member]) -> None:
    """Note the modules in which the index knows members to add nothing."""
    for member in members:
        pairs = zip(member.modules, bank.index.norms(member) or [], strict=False)
        if idle := [module.name for module, norm in pairs if norm == 0]:
            zeros = bank.index.zeros(member)
            bank.note(
                f"`{member.name}` changes nothing in {_and_more(idle)}"
                + (f"; only zeros are in {_and_more(zeros)}" if zeros else "")
            )


def _and_more(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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


def hash_adapters(
    bank: Bank,
    members: Sequence[Member] | None = None,
    *,
    verify: bool = False,
    keep: bool = True,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Record the SHA-256 and the norms of adapters that have none yet, or have changed.

    In a bank that cannot be written to they are known for this run alone, and a note says so.

    Args:
        bank: `bank.index` takes what is found.
        members: Those to look at; all, if they are not given.
        verify: Hash also those that have a record, and compare.
        keep: Write them into the bank.
        progress: Told each member's name before its turn.

    Returns:
        How many were recorded.

    Raises:
        FileChanged: With `verify`: a file is not what was recorded.
        MissingFile, UnreadableFile: An adapter cannot be read.
    """
    index = bank.index
    before = dict(index.adapters)
    for name in [name for name in index.adapters if not (bank.folder / name).is_dir()]:
        del index.adapters[name]
    looked_at = bank.members if members is None else members
    unknown = [member for member in looked_at if index.sha256(member) is None]
    try:
        for member in looked_at if verify else unknown:
            if progress is not None:
                progress(member.name)
            digest = files.sha256(member.adapter.path)
            if verify:
                _see_same(member, digest, index)
            if index.sha256(member) is None:
                index.adapters[member.name] = _looked_at(member, digest)
    finally:
        # What is known is kept, also where the rest was interrupted.
        if keep and index.adapters != before:
            try:
                index.save()
            except UnreadableFile as error:
                bank.note(f"adapters are hashed anew each time: {error}")
    return len(unknown)


def _see_same(member: Member, digest: str, index: Index) -> None:
    recorded = index.adapters.get(member.name)
    if recorded is not None and recorded.sha256 != digest:
        raise FileChanged(
            f"`{member.adapter.path}` has SHA-256 {digest[:12]}…, the index recorded "
            f"{recorded.sha256[:12]}…\nif that is right, delete `{index.path}`: "
            "it is made anew"
        )


def _looked_at(member: Member, digest: str) -> AdapterRecord:
    """What is to be known of a member's file beside its hash."""
    from lorameta_rs.merge import Options

    adapter = member.adapter
    record = AdapterRecord(digest, adapter.size, adapter.mtime_ns)
    try:
        norms = array("d", _core.norms([adapter], Options())[0])
    except NotFinite as error:
        return replace(record, fault=str(error))
    odd = _core.scan(adapter) if 0.0 in norms else []
    return replace(record, norms=norms, zeros=[name for name, what in odd if what == "only zeros"])


def _packed(found: dict[str, Any]) -> dict[str, Any]:
    """An object of the file, with norms in little memory: hundreds of lists take megabytes."""
    norms = found.get("norms")
    if isinstance(norms, list) and all(type(one) is float and 0 <= one < math.inf for one in norms):
        found["norms"] = array("d", norms)
    return found


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
    index = bank.index
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
    of = distance.part_of(metric)
    counts = bank.fingerprints if of is None else bank.fingerprints.part(of)
    for part in (counts.indptr, counts.ids, counts.counts, counts.relations):
        if part is not None:
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
