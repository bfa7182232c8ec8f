"""From coefficients to an adapter folder: tensors by the core, configuration, card, provenance."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorameta_rs import _core, files
from lorameta_rs.card import model_card
from lorameta_rs.config import as_json
from lorameta_rs.config_fields import FILE_NAME
from lorameta_rs.errors import FaultyMembers, InvalidSetting, NotFinite
from lorameta_rs.formats import FORMATS
from lorameta_rs.formats.conversion import check, known_base, write
from lorameta_rs.index import faults, hash_adapters, note_idle
from lorameta_rs.member import GGUF_WEIGHTS, MLX_WEIGHTS, WEIGHTS, Member, open_members
from lorameta_rs.provenance import FILE_NAME as PROVENANCE
from lorameta_rs.provenance import provenance
from lorameta_rs.result import result_config
from lorameta_rs.servers import refusing
from lorameta_rs.staging import staged
from lorameta_rs.sums import Sums, used_members

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.fingerprint import Fingerprint
    from lorameta_rs.formats.base import Base
    from lorameta_rs.ranking import Ranking

SPARSE = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
METHODS = ("auto", "soup", "svd", "cat", "linear", *SPARSE, *(f"{name}_svd" for name in SPARSE))
"""The ways to combine adapters. `soup`: Σ c_i A_i and Σ c_i B_i, the paper's; `svd`: the best
approximation of Σ c_i ΔW_i of a low rank; `cat`: that sum exactly, its rank the sum of ranks;
`auto`: `soup` where that errs by at most 1 %, else `svd`. The others are those of PEFT: `linear`
and `SPARSE` act on A and B apart, the `_svd` forms on ΔW, which they form a module at a time."""

MAJORITIES = ("total", "frequency")
"""Which sign `ties` elects: that of the sum of the members, or of the greater number of them."""

NORMALIZATIONS = ("none", "unit")
"""What is done with the members' norms. `unit`: each ΔW is brought to norm one in each module, and
the sum to the weighted mean of the norms."""

DTYPES = ("float32", "float16", "bfloat16")
CARD = "README.md"
FILES = (PROVENANCE, WEIGHTS, FILE_NAME, CARD)
"""What a folder of PEFT has after a merge."""
OWNED = (*FILES, GGUF_WEIGHTS, MLX_WEIGHTS)
"""What a merge may have written into a folder that it may replace."""

MEMORY = 64 << 20


@dataclass(frozen=True, eq=False)
class Job:
    """One adapter to be made."""

    coefficients: Floats
    """One number a member of the bank [n]; with `modules` one for each of them too [n, modules]."""
    out: Path
    """The folder to be made."""
    ranking: Ranking | None = None
    """Where the coefficients come from; None if they were given."""
    dataset: Path | None = None
    """The new dataset; None if the coefficients were given."""
    fingerprint: Fingerprint | None = None
    """Its fingerprint."""
    modules: tuple[str, ...] = ()
    """Regular expressions over module names, of which the first that matches counts, as in PEFT's
    `rank_pattern`; or numbers of layers. A module that none matches gets nothing."""
    refined: Mapping[str, object] | None = None
    """How `refine` came to the coefficients, for the record."""


@dataclass(frozen=True)
class Options:
    """How jobs are run."""

    method: str = "auto"
    """One of `METHODS`."""
    rank: int | None = None
    """Of the result of `svd`; 16 unless given, or as much as there is."""
    energy: float | None = None
    """Instead of a rank: the share of ‖ΔW‖² that every module keeps at least."""
    normalize: str | None = None
    """One of `NORMALIZATIONS`. Unless given it is `unit` where the coefficients come from comparing
    datasets and the method sums ΔW, so that no member counts for more because it is larger; weights
    given by hand are taken as they are."""
    density: float | None = None
    """The share of the numbers that the methods of `SPARSE` keep of each member, in (0, 1]."""
    majority_sign: str = "total"
    """One of `MAJORITIES`."""
    seed: int = 0
    """Of what is random: what `dare_…` keeps, and the sketch of `svd` where the ranks add up to
    more than 384."""
    dtype: str = "float32"
    """One of `DTYPES`: the type of the tensors that are written."""
    formats: tuple[str, ...] = ("peft",)
    """Those of `FORMATS` that are written: one into the output's folder, several into one each
    inside it."""
    base: Base | None = None
    """The base model, which `gguf` depends on; None for what the bank says of it."""
    threads: int = 0
    """Worker threads; 0 for one a core, or two where a disk may have to be waited for."""
    memory: int = MEMORY
    """The budget for what the merge allocates and keeps mapped, in bytes."""
    io: str = "read"
    """How files are read: `read`, or `mmap`, for files that nobody cuts short meanwhile."""
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
            ("normalize", self.normalize or NORMALIZATIONS[0], NORMALIZATIONS),
            ("majority_sign", self.majority_sign, MAJORITIES),
            ("io", self.io, ("read", "mmap")),
            *(("format", one, FORMATS) for one in self.formats),
        ):
            if found not in known:
                raise InvalidSetting(f"{name} `{found}`: expected one of {', '.join(known)}")
        if not self.formats:
            raise InvalidSetting("formats: none is given")
        for name, number, least in (
            ("threads", self.threads, 0),
            ("memory", self.memory, 1),
            ("rank", 1 if self.rank is None else self.rank, 1),
            ("seed", self.seed, 0),
        ):
            if not least <= number < 2**63:
                raise InvalidSetting(f"{name} is {number}, expected {least} or more")
        if self.rank is not None and self.energy is not None:
            raise InvalidSetting("rank and energy both choose the rank: give one")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InvalidSetting(f"energy is {self.energy}, expected a share above 0, up to 1")
        majority = None if self.majority_sign == MAJORITIES[0] else self.majority_sign
        given = {
            "rank": self.rank,
            "energy": self.energy,
            "density": self.density,
            "majority_sign": majority,
        }
        for name, taken in (
            ("rank", self.method == "auto" or self.method.endswith("svd")),
            ("energy", self.method in ("auto", "svd")),
            ("density", self.method.removesuffix("_svd") in SPARSE),
            ("majority_sign", "ties" in self.method),
        ):
            if given[name] is not None and not taken:
                raise InvalidSetting(f"{name}: the method `{self.method}` takes none")
        if self.method.removesuffix("_svd") in SPARSE and self.density is None:
            raise InvalidSetting(
                f"density: the method `{self.method}` needs it: the share of the numbers to keep"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise InvalidSetting(f"density is {self.density}, expected a share above 0, up to 1")
        if self.method == "soup" and self.normalize == "unit":
            raise InvalidSetting("normalize: norms are those of ΔW, which `soup` does not sum")
        if self.method.endswith("svd") and self.allow_nan:
            raise InvalidSetting(
                f"allow_nan: `{self.method}` cannot decompose NaN; `soup` and `cat` let it by"
            )

    @classmethod
    def paper(cls) -> Options:
        """The paper's operator: factors summed apart, no norms; beside `ranking.Settings.paper`."""
        return cls(method="soup", normalize="none")


@dataclass(frozen=True, eq=False)
class Merged:
    """What a merge did, or would do."""

    plan: _core.Plan
    """What is read and taken."""
    method: str
    """The method, chosen if it was `auto`."""
    reason: str | None
    """Why `auto` chose it; None if it was asked for."""
    soup_error: float | None
    """By how much of ΔW `soup` would have erred at most, where the choice depended on it."""
    soup_error_exact: bool
    """Whether that was computed of every module, and not estimated."""
    index_bytes: int
    """The size of the members that are to be indexed first; none, when that has been done."""
    outcomes: list[_core.Outcome]
    """For each job its rank where the method chose it, and what of ΔW that keeps."""


def plan(bank: Bank, jobs: Sequence[Job], options: Options | None = None) -> Merged:
    """What `merge` would read and take, without doing it; errors as `merge`."""
    options = options or Options()
    used = used_members(bank, jobs)
    _see_finite(bank, used, options)
    try:
        sums = Sums.of(bank, jobs, options, dry=True)
    except NotFinite:
        hash_adapters(bank, used, keep=False)
        _see_finite(bank, used, options)  # and say who is to blame
        raise
    result_config(bank.base_model, sums.members, sums.rank or 1, 1.0)
    _with_base(options, bank, sums.members)
    run = replace(options, method=sums.method, normalize=sums.normalize)
    planned = _core.plan(sums.terms, run)
    unknown = [member for member in used if bank.index.sha256(member) is None]
    return _merged(planned, sums, [], sum(member.adapter.size for member in unknown))


def merge(
    bank: Bank,
    jobs: Sequence[Job],
    options: Options | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Merged:
    """Make all jobs' adapters in one pass over the members that any of them uses.

    What the bank's index lacks of these members is added to it first.

    Args:
        bank: The adapters; those without a coefficient are never read.
        jobs: The adapters to be made. All appear, or none.
        options: How; the results depend on the method and the options in `provenance.OF_RESULT`
            alone, and on `memory` where `svd` has to sketch.
        progress: Told bytes read and bytes in all, every 40 ms.

    Returns:
        What was read and taken, and what became of each job.

    Raises:
        InvalidSetting: A coefficient is not finite, all are zero, or the budget is too small.
        LayoutMismatch: The members differ in what the base is, or, for `soup`, in rank.
        FaultyMembers: A tensor of a member holds NaN or infinity, and `allow_nan` is not set.
        NotFinite: A sum left the range of its type, likewise.
        FileChanged: A member's file changed meanwhile, or is not what the index recorded.
        OutputExists: An output exists, and `force` is not set.
        UnreadableFile: A file cannot be read or written.
    """
    options = options or Options()
    used = used_members(bank, jobs)
    hash_adapters(bank, used, verify=options.verify)
    _see_finite(bank, used, options)
    sums = Sums.of(bank, jobs, options)
    result_config(
        bank.base_model, sums.members, sums.rank or 1, 1.0
    )  # what it refuses, before the work
    run = replace(options, method=sums.method, normalize=sums.normalize)
    run = _with_base(run, bank, sums.members)
    places = [written_to(job.out, run.formats) for job in jobs]
    outs = [place for folders in places for place in folders.values()]
    with staged(outs, OWNED, options.force) as stages:
        left = iter(stages)
        stages_of = [{to: next(left) for to in folders} for folders in places]
        first = [next(iter(folders.values())) for folders in stages_of]
        done, outcomes = _core.combine(
            sums.terms,
            [os.fspath(stage / WEIGHTS) for stage in first],
            run,
            progress,
        )
        for i, (job, outcome) in enumerate(zip(jobs, outcomes, strict=True)):
            rank = outcome.rank or sums.rank
            assert rank is not None, "a method that keeps the rank has been given one"
            config = result_config(bank.base_model, sums.members, rank, sums.alpha or rank)
            record = provenance(bank, job, run)
            _write(first[i] / FILE_NAME, as_json(config))
            _convert(first[i], stages_of[i], run)
            seen = written_to(Path(job.out.absolute().name), run.formats)
            gguf = _beside(job.out, None if run.base is None else run.base.gguf)
            for to, stage in stages_of[i].items():
                served = to == "peft" and "vLLM" not in refusing(_opened(stage))
                card = model_card(record, config, seen[to], to, gguf=gguf, served=served)
                _write(stage / PROVENANCE, record.as_json())
                _write(stage / CARD, card)
    return _merged(done, sums, outcomes, 0)


def _see_finite(bank: Bank, members: Sequence[Member], options: Options) -> None:
    """Note what the index knows to be odd in members, or raise `FaultyMembers`."""
    note_idle(bank, members)
    reasons = faults(bank, members)
    if reasons and not options.allow_nan:
        raise FaultyMembers(reasons)
    for name, reason in reasons.items():
        bank.note(f"`{name}` is used all the same: {reason}")


def _merged(
    plan: _core.Plan, sums: Sums, outcomes: list[_core.Outcome], index_bytes: int
) -> Merged:
    """What is said of a merge."""
    return Merged(
        plan,
        sums.method,
        sums.reason,
        sums.soup_error,
        sums.soup_error_exact,
        index_bytes,
        outcomes,
    )


def _with_base(options: Options, bank: Bank, members: Sequence[Member]) -> Options:
    """The options with the base that is known, after a look at what the formats can express.

    Raises:
        InvalidSetting: One of them cannot express the members, or needs to know more of the base.
    """
    if "gguf" in options.formats:
        options = replace(options, base=known_base(options.base, bank.folder))
    for member in {member.adapter.layout: member for member in members}.values():
        for to in options.formats:
            check(member, to, options.base, options)
    return options


def written_to(out: Path, formats: Sequence[str]) -> dict[str, Path]:
    """The folder of each format of an output."""
    chosen = [to for to in FORMATS if to in formats]
    return {to: out / to if len(chosen) > 1 else out for to in chosen}


def _write(path: Path, text: str) -> None:
    # A path need not be UTF-8: its other bytes become escapes, as JSON has them.
    files.write_whole(path, text.encode(errors="backslashreplace"))


def _opened(made: Path) -> Member:
    """The PEFT adapter in a folder that was just written."""
    (member,) = open_members([made])
    assert isinstance(member, Member), "what was just written can be read"
    return member


def _beside(out: Path, path: Path | None) -> Path | None:
    """A path as it is seen from beside an output; an absolute one stays what it is."""
    if path is None or path.is_absolute():
        return path
    try:
        return Path(os.path.relpath(path, out.absolute().parent))
    except ValueError:  # on another drive
        return path.absolute()


def _convert(made: Path, folders: Mapping[str, Path], options: Options) -> None:
    """Write the PEFT adapter in `made` in the other formats, and drop it if it is not one."""
    others = {to: folder for to, folder in folders.items() if to != "peft"}
    if not others:
        return
    # Without a name: done again into another folder, the file is to be the same.
    member = replace(_opened(made), name="")
    if "peft" not in folders:
        (made / FILE_NAME).unlink()
    for to, folder in others.items():
        write(member, folder, to, options.dtype, options.base, options)
    if "peft" not in folders:
        (made / WEIGHTS).unlink()
