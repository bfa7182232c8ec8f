"""What the core is to add up: members, their coefficients in each module, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import _core
from lorameta_rs.base_weights import weight_files
from lorameta_rs.errors import InvalidSetting, LayoutMismatch
from lorameta_rs.shape import delta_norms

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.member import Member
    from lorameta_rs.merge import Job, Options

LARGEST_SOUP_ERROR = 0.01
"""Relative, of ΔW: up to it `auto` sums the factors apart."""


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of sums, as the core takes them.

    Attributes:
        adapters: The files of the members that any sum uses, opened.
        coefficients: For each sum and member one number, or one a module of the member.
        strengths: For each member and module the scaling of ΔW that goes into the tensors; None if
            `alpha` says it.
        base_weights: The base's files, which DoRA members need.
    """

    adapters: Sequence[_core.Adapter]
    coefficients: Sequence[Sequence[Sequence[float]]]
    strengths: Sequence[Sequence[float]] | None = None
    base_weights: Sequence[Path] = ()


@dataclass(frozen=True, eq=False)
class Sums:
    """The sums that the core makes in one pass, one for each job.

    Attributes:
        members: Those that any job uses.
        terms: What the core takes of them.
        method: The method, chosen if it was `auto`.
        reason: Why `auto` chose it; None if it was asked for.
        normalize: What is done with the members' norms, chosen if it was not given.
        soup_error: How far `soup` would be from the exact sum, at most of all jobs; None if that
            was not asked.
        soup_error_exact: Whether that was computed of every module, and not estimated.
        rank: That of all members; None if they differ.
        alpha: What the configuration says; None for the result's own rank.
    """

    members: list[Member]
    terms: Terms
    method: str
    reason: str | None
    normalize: str
    soup_error: float | None
    soup_error_exact: bool
    rank: int | None
    alpha: float | None

    @classmethod
    def of(cls, bank: Bank, jobs: Sequence[Job], options: Options, dry: bool = False) -> Sums:
        """What `jobs` ask for; `dry` leaves norms alone, which may take a reading of the bank.

        Raises:
            InvalidSetting: Coefficients are not finite, all zero, or for another bank.
            LayoutMismatch: `soup` was asked for, and the members differ in rank.
            MissingFile, UnreadableFile: The base's weights cannot be read.
        """
        rows = [_checked(job, bank) for job in jobs]
        used = _used(rows)
        members = [bank.members[i] for i in used]
        coefficients = [
            [_per_module(job, row[i], member) for i, member in zip(used, members, strict=True)]
            for job, row in zip(jobs, rows, strict=True)
        ]
        terms = Terms(
            [member.adapter for member in members],
            coefficients,
            [member.scalings for member in members],
            weight_files(bank.base_weights),
        )
        normalize = options.normalize or _normalization(jobs, options)
        method, reason, error, whole = _method(
            members, terms, replace(options, normalize=normalize)
        )
        rank = _common_rank(members)
        if normalize == "unit" and not dry:
            norms = delta_norms(members, bank.index, base_weights=terms.base_weights)
            terms = replace(terms, coefficients=unit_coefficients(coefficients, norms))
        alpha = None
        if method == "soup":
            alpha, strengths = common_scaling(members, _one_rank(members))
            terms = replace(terms, strengths=strengths)
        return cls(members, terms, method, reason, normalize, error, whole, rank, alpha)


def _normalization(jobs: Sequence[Job], options: Options) -> str:
    """What is done with the norms where the user did not say."""
    compared = all(job.ranking is not None for job in jobs)
    sums_deltas = options.method in ("auto", "svd", "cat") and not options.allow_nan
    return "unit" if compared and sums_deltas else "none"


def used_members(bank: Bank, jobs: Sequence[Job]) -> list[Member]:
    """The members that have a coefficient other than zero in any job.

    Raises:
        InvalidSetting: Coefficients are not finite, all zero, or for another bank.
    """
    return [bank.members[i] for i in _used([_checked(job, bank) for job in jobs])]


def _used(rows: Sequence[Floats]) -> list[int]:
    return np.flatnonzero(np.any([row.any(axis=1) for row in rows], axis=0)).tolist()


def _checked(job: Job, bank: Bank) -> Floats:
    """A job's coefficients as [members, patterns]."""
    row = np.asarray(job.coefficients, dtype=np.float64)
    matrix = row[:, None] if row.ndim == 1 and not job.modules else row
    if matrix.shape != (len(bank), max(len(job.modules), 1)):
        shape = (len(bank), len(job.modules)) if job.modules else (len(bank),)
        raise InvalidSetting(f"coefficients of shape {row.shape}, expected {shape}")
    if not np.isfinite(matrix).all():
        name = bank.names[int(np.flatnonzero(~np.isfinite(matrix).all(axis=1))[0])]
        raise InvalidSetting(f"the coefficient of `{name}` is not a finite number")
    if not matrix.any():
        raise InvalidSetting("all coefficients are zero")
    return matrix


def _per_module(job: Job, row: Floats, member: Member) -> list[float]:
    """A member's coefficient, or those of its modules; 0 for one that no pattern matches."""
    if not job.modules:
        return [float(row[0])]
    found = first_match(job.modules, [module.name for module in member.modules])
    return [0.0 if match is None else float(row[match]) for match in found]


def first_match(modules: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each module's name which of `Job.modules` counts; None where none matches.

    Raises:
        InvalidAdapter: One is no regular expression.
    """
    # A number is a layer: the part of a module's path that counts.
    patterns = [rf"{key}\..*" if key.isdigit() else key for key in modules]
    return _core.first_match(patterns, names)


def _method(
    members: Sequence[Member], terms: Terms, options: Options
) -> tuple[str, str | None, float | None, bool]:
    """The method and why `auto` chose it.

    And the error of `soup` where the choice depended on it, and whether it is exact.
    """
    if options.method != "auto":
        return options.method, None, None, True
    same_rank = _common_rank(members) is not None
    fixed = _only_svd(options)
    if options.allow_nan and fixed is None:
        reason = "`svd` could not decompose the NaN that is let by"
        return ("soup" if same_rank else "cat"), reason, None, True
    if fixed is None and any(member.config.use_dora for member in members):
        fixed = "DoRA changes the base's weights by more than B and A, which no sum of factors does"
    if fixed is None and not same_rank:
        fixed = "the ranks differ, and factors can be summed only where they are the same"
    if fixed is not None:
        return "svd", fixed, None, True
    errors, exact = _core.soup_errors(terms, options)
    error = max(errors)
    reason = (
        f"summing A and B apart would change ΔW by {'' if exact else '≈ '}{_percent(error)}, and "
        f"{_percent(LARGEST_SOUP_ERROR)} is let by"
    )
    return ("svd" if error > LARGEST_SOUP_ERROR else "soup"), reason, error, exact


def _only_svd(options: Options) -> str | None:
    """Why no other method does what the options ask for; None if others do."""
    if options.rank is not None:
        return "--rank was given"
    if options.energy is not None:
        return "--energy was given"
    if options.normalize != "none":
        return "each member's ΔW is brought to one norm, which no sum of factors can"
    return None


def _percent(share: float) -> str:
    """A share in percent, with two digits where it is small.

    >>> _percent(1.4142), _percent(0.00123)
    ('141 %', '0.12 %')
    """
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def unit_coefficients(
    coefficients: list[list[list[float]]], norms: Sequence[dict[str, float]]
) -> list[list[list[float]]]:
    """Coefficients that give each ΔW norm one, and each sum the weighted mean of the norms.

    In module m: c_i / n_im · Σ_j |c_j| n_jm / Σ_j |c_j|, over the members that change m: those
    whose norm is not zero there. Where none changes anything, all coefficients stay.
    """

    def of_job(rows: list[list[float]]) -> list[list[float]]:
        full = [
            row * len(own) if len(row) == 1 else row for row, own in zip(rows, norms, strict=True)
        ]
        total: dict[str, float] = {}
        weight: dict[str, float] = {}
        for row, own in zip(full, norms, strict=True):
            for c, (name, norm) in zip(row, own.items(), strict=True):
                if norm > 0:
                    total[name] = total.get(name, 0.0) + abs(c) * norm
                    weight[name] = weight.get(name, 0.0) + abs(c)
        brought = [
            [
                c / norm * (total[name] / weight[name]) if norm > 0 and c != 0 else 0.0
                for c, (name, norm) in zip(row, own.items(), strict=True)
            ]
            for row, own in zip(full, norms, strict=True)
        ]
        # A sum of zeros is zero, and no sum of nothing, which the core refuses.
        return brought if any(any(row) for row in brought) else full

    return [of_job(rows) for rows in coefficients]


def _common_rank(members: Sequence[Member]) -> int | None:
    ranks = {rank for member in members for rank in member.ranks}
    return ranks.pop() if len(ranks) == 1 else None


def _one_rank(members: Sequence[Member]) -> int:
    """The rank that all modules of all members have.

    Raises:
        LayoutMismatch: There are several.
    """
    if (rank := _common_rank(members)) is not None:
        return rank
    first = members[0]
    for member in members:
        if member.ranks != first.ranks or len(member.ranks) > 1:
            break
    mine, theirs = (", ".join(str(rank) for rank in sorted(one.ranks)) for one in (member, first))
    raise LayoutMismatch(
        f"`{member.folder}` has rank {mine}"
        + (f", `{first.folder}` has rank {theirs}" if member is not first else "")
        + ": `soup` adds factors entry by entry and needs one rank for all modules\n"
        "`--method svd` and `--method cat` take any ranks (--paper is `soup`)"
    )


def common_scaling(members: Sequence[Member], rank: int) -> tuple[float, list[list[float]] | None]:
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
