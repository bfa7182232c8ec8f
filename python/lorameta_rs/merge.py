"""From coefficients to an adapter folder: tensors by the core, configuration, card, provenance."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import _core, files
from lorameta_rs.card import model_card
from lorameta_rs.config import FILE_NAME, as_json, portable_config
from lorameta_rs.errors import FileChanged, InvalidSetting, LayoutMismatch, UnreadableFile
from lorameta_rs.index import Index
from lorameta_rs.member import WEIGHTS
from lorameta_rs.provenance import FILE_NAME as PROVENANCE
from lorameta_rs.provenance import provenance
from lorameta_rs.staging import staged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.fingerprint import Fingerprint
    from lorameta_rs.member import Member
    from lorameta_rs.ranking import Ranking

METHODS = ("soup",)
"""The ways to combine adapters. `soup`: Σ c_i A_i and Σ c_i B_i, the paper's."""

DTYPES = ("float32", "float16", "bfloat16")
CARD = "README.md"
FILES = (PROVENANCE, WEIGHTS, FILE_NAME, CARD)

MEMORY = 64 << 20


@dataclass(frozen=True, eq=False)
class Job:
    """One adapter to be made."""

    coefficients: Floats
    """One number a member of the bank [n]."""
    out: Path
    """The folder to be made."""
    ranking: Ranking | None = None
    """Where the coefficients come from; None if they were given."""
    dataset: Path | None = None
    """The new dataset; None if the coefficients were given."""
    fingerprint: Fingerprint | None = None
    """Its fingerprint."""


@dataclass(frozen=True)
class Options:
    """How jobs are run."""

    method: str = "soup"
    """One of `METHODS`."""
    dtype: str = "float32"
    """One of `DTYPES`: the type of the tensors that are written."""
    threads: int = 0
    """Worker threads; 0 for one a core."""
    memory: int = MEMORY
    """The budget for what the merge allocates and keeps mapped, in bytes."""
    io: str = "read"
    """`mmap` for mapped files, which must not be cut short meanwhile; `read` for network mounts;
    `auto` for what is faster: mapped for up to three targets of float32, else read."""
    allow_nan: bool = False
    """Sum NaN and infinity like other numbers."""
    force: bool = False
    """Replace outputs that exist."""
    verify: bool = False
    """Hash the members' files, and compare with what the index recorded."""

    def __post_init__(self) -> None:
        for name, found, known in (
            ("method", self.method, METHODS),
            ("dtype", self.dtype, DTYPES),
            ("io", self.io, ("read", "mmap")),
        ):
            if found not in known:
                raise InvalidSetting(f"{name} `{found}`: expected one of {', '.join(known)}")


@dataclass(frozen=True, eq=False)
class _Sum:
    """What the core is to do: the members that any job uses, and how their factors add up."""

    members: list[Member]
    coefficients: list[list[float]]
    strengths: list[list[float]] | None
    rank: int
    alpha: float

    @classmethod
    def of(cls, bank: Bank, jobs: Sequence[Job]) -> _Sum:
        rows = np.array([_checked(job.coefficients, bank) for job in jobs])
        used = np.flatnonzero(rows.any(axis=0))
        members = [bank.members[i] for i in used]
        rank = _one_rank(members)
        alpha, strengths = _scaling(members, rank)
        return cls(members, rows[:, used].tolist(), strengths, rank, alpha)

    @property
    def adapters(self) -> list[_core.Adapter]:
        return [member.adapter for member in self.members]


def plan(bank: Bank, jobs: Sequence[Job], options: Options | None = None) -> _core.Plan:
    """What `merge` would read and take, without doing it; errors as `merge`."""
    options = options or Options()
    total = _Sum.of(bank, jobs)
    return _core.plan_soup(
        total.adapters,
        total.coefficients,
        strengths=total.strengths,
        threads=options.threads,
        memory=options.memory,
        io=options.io,
    )


def merge(
    bank: Bank,
    jobs: Sequence[Job],
    options: Options | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> _core.Plan:
    """Make all jobs' adapters in one pass over the members that any of them uses.

    Args:
        bank: The adapters; those without a coefficient are never read.
        jobs: The adapters to be made. All appear, or none.
        options: How; the results depend on `method`, `dtype` and `allow_nan` alone.
        progress: Told bytes read and bytes in all, every 40 ms.

    Returns:
        What was read and taken.

    Raises:
        InvalidSetting: A coefficient is not finite, all are zero, or the budget is too small.
        LayoutMismatch: The members differ in rank, or in what the base is.
        NotFinite: A tensor or a sum holds NaN or infinity, and `allow_nan` is not set.
        FileChanged: A member's file changed meanwhile, or is not what the index recorded.
        OutputExists: An output exists, and `force` is not set.
        UnreadableFile: A file cannot be read or written.
    """
    options = options or Options()
    total = _Sum.of(bank, jobs)
    config = _config(bank, total)
    index = Index.of(bank)
    hashes = {member.name: _hash(member, index, options.verify) for member in total.members}
    outs = [job.out for job in jobs]
    with staged(outs, FILES, options.force) as stages:
        try:
            done = _core.soup(
                total.adapters,
                total.coefficients,
                [os.fspath(stage / WEIGHTS) for stage in stages],
                strengths=total.strengths,
                dtype=options.dtype,
                threads=options.threads,
                memory=options.memory,
                io=options.io,
                allow_nan=options.allow_nan,
                progress=progress,
            )
            for stage, job in zip(stages, jobs, strict=True):
                record = provenance(bank, job, options, hashes)
                for name, text in (
                    (FILE_NAME, as_json(config)),
                    (PROVENANCE, record.as_json()),
                    (CARD, model_card(record, config, job.out)),
                ):
                    # A path need not be UTF-8: its other bytes become escapes, as JSON has them.
                    files.write_whole(stage / name, text.encode(errors="backslashreplace"))
        except UnreadableFile as error:
            raise _of_output(error, stages, outs) from error
    return done


def _checked(coefficients: Floats, bank: Bank) -> Floats:
    row = np.asarray(coefficients, dtype=np.float64)
    if row.shape != (len(bank),):
        raise InvalidSetting(f"{row.shape} coefficients for {len(bank)} members")
    if not np.isfinite(row).all():
        name = bank.names[int(np.flatnonzero(~np.isfinite(row))[0])]
        raise InvalidSetting(f"the coefficient of `{name}` is not a finite number")
    if not row.any():
        raise InvalidSetting("all coefficients are zero")
    return row


def _one_rank(members: Sequence[Member]) -> int:
    """The rank that all modules of all members have.

    Raises:
        LayoutMismatch: There are several.
    """
    first = members[0]
    ranks = sorted(first.ranks)
    for member in members:
        if member.ranks != {ranks[0]}:
            mine = ", ".join(str(rank) for rank in sorted(member.ranks))
            theirs = ", ".join(str(rank) for rank in ranks)
            raise LayoutMismatch(
                f"`{member.folder}` has rank {mine}"
                + (f", `{first.folder}` has rank {theirs}" if member is not first else "")
                + ": `soup` adds factors entry by entry and needs one rank for all modules\n"
                "leave members of other ranks out with --exclude NAME"
            )
    return ranks[0]


def _scaling(members: Sequence[Member], rank: int) -> tuple[float, list[list[float]] | None]:
    """The alpha to be written, and what each member's B is multiplied with in each module.

    One scaling everywhere: alpha stays, and nothing is multiplied. Otherwise each member's scaling
    goes into its B, and alpha = r says that it is there. So it does where alpha would not mean the
    same to every client: not an integer for rsLoRA's √r, or zero, which llama.cpp takes for none.
    """
    scalings = {scaling for member in members for scaling in member.scalings}
    if len(scalings) == 1:
        (scaling,) = scalings
        plain = not any(member.config.use_rslora for member in members)
        alpha = round(scaling * rank, 9)
        if scaling > 0 and (plain or alpha.is_integer()):
            return alpha, None
    return float(rank), [member.scalings for member in members]


def _config(bank: Bank, total: _Sum) -> dict[str, object]:
    """The configuration of the result.

    Raises:
        LayoutMismatch: The members disagree on something that it must say.
    """
    members = total.members
    for name in ("fan_in_fan_out", "layer_replication"):
        values = [getattr(member.config, name) for member in members]
        for member, value in zip(members, values, strict=True):
            if value != values[0]:
                raise LayoutMismatch(
                    f"`{member.config.path}`: `{name}` is {value}, in `{members[0].name}` it is "
                    f"{values[0]}\nleave one of them out with --exclude NAME"
                )
    tasks = {member.config.task_type for member in members}
    config = portable_config(
        bank.base_model or members[0].config.base_model_name_or_path,
        total.rank,
        total.alpha,
        _target_modules({module.name for member in members for module in member.modules}),
        fan_in_fan_out=members[0].config.fan_in_fan_out,
        task_type=tasks.pop() if len(tasks) == 1 else None,
    )
    if members[0].config.layer_replication is not None:
        config["layer_replication"] = members[0].config.layer_replication
    return config


def _target_modules(names: set[str]) -> list[str]:
    """The modules by their last names where those mean the same modules, else in full.

    A last name stands for every module that ends with it. That is right if each block of the model
    has all of them; a number, as in `mlp.0`, would also stand for whole layers.
    """
    blocks: dict[str, set[str]] = {}
    for name in names:
        block, _, last = name.rpartition(".")
        blocks.setdefault(last, set()).add(block)
    same_layers = len({frozenset(_layers(found)) for found in blocks.values()}) == 1
    if same_layers and _gapless(names) and not any(last.isdigit() for last in blocks):
        return sorted(blocks)
    return sorted(names)


def _layers(blocks: set[str]) -> set[str]:
    """The layer numbers among the parts of module paths."""
    return {part for block in blocks for part in block.split(".") if part.isdigit()}


def _gapless(names: set[str]) -> bool:
    """Whether the layers are 0 to n − 1, as far as one can tell without the model."""
    layers = {int(part) for part in _layers(names)}
    return layers == set(range(len(layers)))


def _hash(member: Member, index: Index, verify: bool) -> str | None:
    """The SHA-256 of a member's file as far as it is known, or is to be known.

    Raises:
        FileChanged: The file is not what the index recorded.
    """
    recorded = index.adapters.get(member.name)
    if not verify:
        return index.sha256(member)
    found = files.sha256(member.adapter.path)
    if recorded is not None and recorded.sha256 != found:
        raise FileChanged(
            f"`{member.adapter.path}` has SHA-256 {found[:12]}…, the index recorded "
            f"{recorded.sha256[:12]}…\nif that is right, run `lorameta-rs index`"
        )
    return found


def _of_output(error: UnreadableFile, stages: Sequence[Path], outs: Sequence[Path]) -> Exception:
    """The error, said of the output that the user knows and not of the folder beside it."""
    for stage, out in zip(stages, outs, strict=True):
        if str(error.filename).startswith(str(stage)):
            name = Path(str(error.filename)).relative_to(stage)
            return UnreadableFile(error.errno, error.strerror, str(out / name))
    return error
