"""A bank: a folder of adapters for one base model, each with its dataset or its fingerprint."""

from __future__ import annotations

import fnmatch
import stat
from collections import Counter
from copy import copy
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lorameta_rs import dataset, files
from lorameta_rs.bank_fingerprints import FILE_NAME as FINGERPRINT
from lorameta_rs.bank_fingerprints import BankFingerprints
from lorameta_rs.bank_settings import BankSettings
from lorameta_rs.config_fields import FILE_NAME
from lorameta_rs.errors import (
    InvalidBank,
    InvalidSetting,
    LayoutMismatch,
    LoraMetaError,
    MissingFile,
    UnreadableFile,
)
from lorameta_rs.formats.base import heads_in
from lorameta_rs.index import Index
from lorameta_rs.member import GGUF, MLX_WEIGHTS, PICKLE, WEIGHTS, Member, open_members
from lorameta_rs.modules import other_shape, usual_shapes
from lorameta_rs.provenance import FILE_NAME as PROVENANCE
from lorameta_rs.tokenizer import Tokenizer

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from lorameta_rs._metrics import Floats
    from lorameta_rs.fingerprint import Fingerprint, Fingerprints
    from lorameta_rs.ranking import Ranking

TOKENIZER = "tokenizer.json"
ANY_BASE = "any"


class Bank:
    """The adapters of a folder, those left out, and why.

    `members` and all that is made from them are in the order of `names`, which is sorted. A member
    that cannot be used does not stop a bank: `left_out` says by name what is wrong with it.
    Adapters that a merge has written into the folder are `generated`, and members only with a
    dataset or a fingerprint of their own, or where there are no others.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        fingerprints: str | os.PathLike[str] | None = None,
        columns: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str = (),
        drop_unsupported: bool = False,
        base_weights: str | os.PathLike[str] | None = None,
    ) -> None:
        """Read the configuration and header of every adapter in `folder`.

        Args:
            folder: Holds a folder for each member, and the base model's `tokenizer.json`.
            base_model: What the members' `base_model_name_or_path` has to be; `any` takes all
                of them. Without it, what `bank.toml` says, else what most members say.
            fingerprints: Where fingerprints are kept, for a bank that cannot be written to.
            columns: The fields of the members' datasets to use; without them, what a member's
                fingerprint was made from, else those that are recognised.
            exclude: Members to leave out; names, or patterns such as `task1*`.
            drop_unsupported: Take the factors alone of members that are more than plain LoRA:
                DoRA, biases, whole weights, trained tokens.
            base_weights: The base model's safetensors, or the folder that holds them; with it DoRA
                members are taken as they are.

        Raises:
            MissingFile, UnreadableFile: The folder cannot be read.
            InvalidBank: No member can be used, or `bank.toml` is broken.
        """
        self.folder = Path(folder)
        with files.refusals(self.folder):
            if self.folder.is_file():
                raise InvalidBank(f"`{folder}` is a file; a bank is a folder of adapter folders")
        self.drop_unsupported = drop_unsupported
        self.base_weights = None if base_weights is None else Path(base_weights)
        self.columns = None if columns is None else _several(columns)
        self._fingerprints_folder = None if fingerprints is None else Path(fingerprints)
        self._kept = BankFingerprints(self, self._fingerprints_folder)
        self.settings = BankSettings.load(self.folder)
        self.members: list[Member] = []
        self.left_out: dict[str, LoraMetaError] = {}
        self.notes: list[str] = []
        present = member_folders(self.folder)
        self.notes += self.settings.doubts(self.folder, [one.name for one in present])
        self.generated = [one.name for one in present if self._is_generated(one)]
        if len(self.generated) == len(present):
            self.generated = []
        members = [one for one in present if one.name not in self.generated]
        self._patterns = _several(exclude)
        self._note_idle([one.name for one in present])
        found = [one for one in members if not _matches(one.name, self._patterns)]
        if members and not found:
            raise InvalidBank(f"`{self.folder}`: --exclude leaves no member")
        folders = []
        for folder in found:
            if (fault := misnamed(folder)) is None:
                folders.append(folder)
            else:
                self.left_out[_printable(folder.name)] = fault
        opened_members = open_members(
            folders, drop_unsupported, heads_in(self.folder), dora=base_weights is not None
        )
        for one, opened in zip(folders, opened_members, strict=True):
            if isinstance(opened, Member):
                self.members.append(opened)
                self.notes += [f"`{opened.name}`: {note}" for note in opened.notes]
            else:
                self.left_out[one.name] = opened
        self.base_model = self._base_model(base_model)
        self._leave_out_foreign()
        if not self.members:
            raise InvalidBank(self._nothing_usable())
        self._note_odd_names()
        self._note_mixed_bases()

    @property
    def names(self) -> list[str]:
        """The members' names: their folders'."""
        return [member.name for member in self.members]

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer.

        Raises:
            MissingFile: The bank has none.
        """
        if not self.has_tokenizer:
            named = self.settings.tokenizer is not None
            reason = (
                "there is no such tokenizer, which `bank.toml` names"
                if named
                else "the bank has no tokenizer; copy the base model's `tokenizer.json` there"
            )
            raise MissingFile(2, reason, str(self._tokenizer_path))
        return Tokenizer(self._tokenizer_path)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer; a bank whose fingerprints are all there needs none."""
        with files.refusals(self._tokenizer_path):
            return self._tokenizer_path.exists()

    @property
    def _tokenizer_path(self) -> Path:
        return self.folder / (self.settings.tokenizer or TOKENIZER)

    @cached_property
    def fingerprints(self) -> Fingerprints:
        """The members' token counts as one sparse matrix [n, vocabulary], a row a member.

        Raises:
            InvalidBank: A member has no fresh fingerprint; `index` makes them.
        """
        faults = self.unfingerprinted()
        if faults:
            name, reason = next(iter(faults.items()))
            raise InvalidBank(
                f"`{self.folder}`: {len(faults)} of {len(self)} members have no usable "
                f"fingerprint, first `{name}`: {reason}\nmake them with `lorameta-rs index`"
            )
        return self._kept.stack(self.names)

    @property
    def without_answers(self) -> list[str]:
        """The members whose datasets do not tell answers from inputs, as far as they are known."""
        known = self._kept.loaded
        return [name for name in self.names if name in known and known[name].relations is None]

    def unfingerprinted(self) -> dict[str, str]:
        """The members without a fresh fingerprint, and why."""
        return self._kept.unusable(self.members)

    def outdated(self) -> dict[str, str]:
        """The members whose fingerprint is no longer right, and why."""
        unusable = self.unfingerprinted()
        return {name: why for name, why in unusable.items() if name in self._kept.loaded}

    def fingerprint_path(self, member: Member) -> Path:
        """Where a member's fingerprint lies, or will."""
        return self._kept.path(member.name)

    @property
    def base(self) -> dict[str, str | int]:
        """What `bank.toml` says of the base model: its architecture and its heads."""
        return self.settings.base

    @property
    def index_path(self) -> Path:
        """Where `index` keeps what later commands would compute again."""
        return (self._fingerprints_folder or self.folder) / "index.json"

    @cached_property
    def index(self) -> Index:
        """What `index` has kept, and what has been found since, in this run."""
        return Index.of(self)

    def dataset(self, member: Member) -> Path | None:
        """A member's dataset, if it has one."""
        named = self.settings.datasets.get(member.name)
        return dataset.find(member.folder) if named is None else self.folder / named

    def columns_of(self, member: Member) -> tuple[str, ...] | None:
        """The fields to make a member's fingerprint from, None for those that are recognised."""
        kept = self._kept.loaded.get(member.name)
        return kept.columns if self.columns is None and kept is not None else self.columns

    def fingerprint(self, member: Member) -> Fingerprint:
        """A member's fingerprint; there has to be one, as `make_fingerprints` sees to it."""
        return self._kept.loaded[member.name]

    def keep(self, name: str, fingerprint: Fingerprint) -> None:
        """Take a fingerprint that was just made, instead of the one on disk."""
        self._kept.keep(name, fingerprint)
        self.__dict__.pop("fingerprints", None)

    @property
    def families(self) -> dict[str, str]:
        """The members' families, as `bank.toml` has them."""
        return self.settings.families

    def without(self, names: Iterable[str]) -> Bank:
        """The same bank without some of its members."""
        rest = copy(self)
        gone = set(names)
        rest.members = [member for member in self.members if member.name not in gone]
        rest.left_out, rest.notes = dict(self.left_out), list(self.notes)
        rest.__dict__.pop("fingerprints", None)
        return rest

    def forget_fingerprints(self) -> None:
        """Give back the memory of all fingerprints; whoever asks for them reads them again.

        Those of a large bank are most of what a ranking holds, and a merge needs none.
        """
        self._kept = BankFingerprints(self, self._fingerprints_folder)
        self.__dict__.pop("fingerprints", None)

    def note(self, text: str) -> None:
        """Add to what is odd about the bank, once."""
        if text not in self.notes:
            self.notes.append(text)

    def leave_out(self, reasons: Mapping[str, LoraMetaError]) -> None:
        """Go on without some members.

        Raises:
            InvalidBank: None remains.
        """
        self.left_out |= reasons
        self.members = [member for member in self.members if member.name not in reasons]
        self.__dict__.pop("fingerprints", None)
        if not self.members:
            raise InvalidBank(self._nothing_usable())

    def require(self, names: Iterable[str]) -> None:
        """See that members which were asked for by name are not kept out.

        Raises:
            LoraMetaError: What is wrong with the first that is.
        """
        for name in names:
            if name in self.left_out:
                raise self.left_out[name]
            if name in self.generated:
                raise InvalidSetting(
                    f"`{self.folder / name}` is no member: a merge has made it, and it has no "
                    "dataset\nto combine what merges have made, give them a folder of their own"
                )
            for pattern in self._patterns:
                if _matches(name, [pattern]) and (self.folder / name).is_dir():
                    raise InvalidSetting(f"`{name}` is left out by --exclude `{pattern}`")

    def rank(self, target: Fingerprint, **settings: Any) -> Ranking:
        """The members' distances from a dataset, and the coefficients made of them.

        `settings` are the fields of `ranking.Settings`; see `ranking.rank`.
        """
        from lorameta_rs.ranking import Settings, rank

        return rank(self, target, Settings(**settings))

    def merge(self, coefficients: Floats, out: str | os.PathLike[str], **options: Any) -> Path:
        """Write the adapter Σ c_i (adapter i) as a PEFT folder.

        Args:
            coefficients: One number a member [n], in the order of `names`.
            out: The folder to be made.
            options: The fields of `merge.Options`: `method`, `rank`, `dtype`, `memory`, `force`, ….

        Returns:
            The path of the folder.

        Raises:
            LoraMetaError: As `merge.merge`.
        """
        from lorameta_rs.merge import Job, Options, merge

        merge(self, [Job(coefficients, Path(out))], Options(**options))
        return Path(out)

    def _is_generated(self, folder: Path) -> bool:
        """Whether a merge has made it, and nobody gave it what a member has."""
        try:
            with files.refusals(folder):
                return (
                    (folder / PROVENANCE).exists()
                    and folder.name not in self.settings.datasets
                    and self._kept.file(folder.name) is None
                    and dataset.find(folder) is None
                )
        except UnreadableFile:  # who opens it says why
            return False

    def _base_model(self, asked: str | None) -> str | None:
        """The base model that members have to be for, None for any."""
        if asked is not None:
            return None if asked == ANY_BASE else asked
        if self.settings.base_model is not None:
            return self.settings.base_model
        said = [member.config.base_model_name_or_path for member in self.members]
        counted = Counter(name for name in said if name is not None)
        return max(counted, key=lambda name: counted[name], default=None)

    def _leave_out_foreign(self) -> None:
        """Leave out members of another base model, or of other matrices than the others change."""
        kept = []
        foreign = {member.name: self._other_base(member) for member in self.members}
        shapes = usual_shapes([one for one in self.members if foreign[one.name] is None])
        for member in self.members:
            fault = foreign[member.name] or other_shape(member, shapes)
            if fault is None:
                kept.append(member)
            else:
                self.left_out[member.name] = fault
        self.members = kept

    def _other_base(self, member: Member) -> LayoutMismatch | None:
        base = member.config.base_model_name_or_path
        if self.base_model is None or base is None or base == self.base_model:
            return None
        if _last_part(base) == _last_part(self.base_model):
            self.notes.append(
                f"`{member.name}`: `base_model_name_or_path` is `{base}`, taken for "
                f"`{self.base_model}`"
            )
            return None
        return LayoutMismatch(
            f"`{member.folder / FILE_NAME}`: `base_model_name_or_path` is `{base}`, the bank's is "
            f"`{self.base_model}`\nchoose one with --base-model, or take all with "
            f"--base-model {ANY_BASE}"
        )

    def _nothing_usable(self) -> str:
        if not self.left_out:
            if (self.folder / FILE_NAME).exists():
                return f"`{self.folder}` is one adapter; a bank is a folder of adapter folders"
            return f"`{self.folder}` holds no adapter folder, none with `{WEIGHTS}`"
        reasons = "\n".join(str(error) for error in list(self.left_out.values())[:3])
        return f"`{self.folder}`: none of {len(self.left_out)} members can be used\n{reasons}"

    def _note_idle(self, names: Sequence[str]) -> None:
        idle = [p for p in self._patterns if not any(_matches(name, [p]) for name in names)]
        self.notes += [f"--exclude `{pattern}` matches no member" for pattern in idle]

    def _note_odd_names(self) -> None:
        if len(self) == 1:
            alone = f"`{self.names[0]}` is the only member"
            self.notes.append(f"{alone}: there is nothing to combine it with")
        for alike in _grouped({name: name.casefold() for name in self.names}).values():
            if len(alike) > 1:
                listed = ", ".join(f"`{name}`" for name in alike)
                self.notes.append(f"the names {listed} differ in case only")

    def _note_mixed_bases(self) -> None:
        said = [member.config.base_model_name_or_path for member in self.members]
        bases = {_last_part(base): base for base in said if base is not None}
        if self.base_model is None and len(bases) > 1:
            listed = ", ".join(f"`{base}`" for base in list(bases.values())[:3])
            self.notes.append(
                f"the members are for {len(bases)} base models: {listed}\na merge says that it is "
                "for the base of the first that it uses"
            )


def member_folders(bank: Path) -> list[Path]:
    """The folders of a bank that hold, or seem to be meant to hold, an adapter."""
    with files.refusals(bank):
        entries = sorted(bank.iterdir(), key=lambda path: path.name)
    return [entry for entry in entries if _is_member(entry)]


def misnamed(folder: Path) -> InvalidBank | None:
    """What is wrong with a member's name, if anything."""
    name = _printable(folder.name)
    if name == folder.name:
        return None
    odd = folder.with_name(name)
    return InvalidBank(f"`{odd}`: the folder's name is not UTF-8; give it another")


def _is_member(folder: Path) -> bool:
    known = (FILE_NAME, WEIGHTS, PICKLE, MLX_WEIGHTS, FINGERPRINT)
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            return False
        present = {entry.name for entry in folder.iterdir()}
        known_files = not present.isdisjoint(known) or any(n.endswith(GGUF) for n in present)
        return known_files or dataset.find(folder) is not None
    except OSError:  # a folder that is closed, or a link that leads nowhere: who opens it says so
        return not folder.name.startswith(".")


def _several(names: Sequence[str] | str) -> tuple[str, ...]:
    """One name is one name, and not its letters."""
    return (names,) if isinstance(names, str) else tuple(names)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _printable(name: str) -> str:
    """A file's name with escapes for the bytes that are not UTF-8, which no text can hold."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _grouped(keys: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return groups


def _last_part(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name
