"""The whole flow in one call: datasets in, adapter folders out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lorameta_rs.bank import Bank
from lorameta_rs.calibration import kept, ranked
from lorameta_rs.errors import FaultyMembers
from lorameta_rs.fingerprint import token_distribution
from lorameta_rs.index import leave_out_not_finite, make_fingerprints
from lorameta_rs.merge import Job, Options, merge
from lorameta_rs.ranking import Ranking, Settings

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from lorameta_rs.calibration import Calibration
    from lorameta_rs.vectors import Vectors

Made = TypeVar("Made")


def jobs_for(
    bank: Bank,
    datasets: Sequence[Path],
    outs: Sequence[Path],
    settings: Settings | Calibration,
    columns: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
    vectors: Vectors | None = None,
) -> list[Job]:
    """A job for each dataset, with the coefficients that the bank gives it.

    Its bank has all fingerprints, and its members theirs of `vectors`; `progress` is told how many
    rows of a dataset have been counted.
    """
    jobs = []
    for dataset, out in zip(datasets, outs, strict=True):
        target = token_distribution(
            dataset, tokenizer=bank.tokenizer, columns=columns, progress=progress
        )
        if vectors is not None:
            target = vectors.of(dataset, target)
        ranking = ranked(bank, target, settings)
        jobs.append(Job(ranking.coefficients, out, ranking, dataset, target))
    return jobs


def norms_of(jobs: Sequence[Job], settings: Settings | Calibration) -> str | None:
    """What a calibration that is used does with norms; None where a merge's own choice is that."""
    if isinstance(settings, Settings) or settings.normalize == "unit":
        return None
    used = any(job.ranking is not None and job.ranking.calibrated for job in jobs)
    return settings.normalize if used else None


def without_faulty(bank: Bank, make: Callable[[], Made]) -> Made:
    """What `make` makes of a bank, without the members that turn out to hold NaN or infinity.

    Of a member that was not indexed, nobody knows before it is to be merged. Then it is left out,
    and `make` begins again: it compares, and merges.

    Raises:
        InvalidBank: No member remains.
    """
    while True:
        try:
            return make()
        except FaultyMembers as error:
            bank.leave_out(error.reasons)


def generate(
    bank: Bank | str | os.PathLike[str],
    dataset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    options: Options | None = None,
    columns: Sequence[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Ranking:
    """Make an adapter for a dataset out of those of a bank.

    >>> import tempfile
    >>> from lorameta_rs.demo import copy_out
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     demo = copy_out(Path(folder, "demo"))
    ...     out = Path(folder, "predicted")
    ...     found = generate(demo.bank, demo.dataset, out, settings=Settings(top_k=3))
    ...     sorted(path.name for path in out.iterdir())
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'lorameta.json']
    >>> found.relevance.nearest, round(found.relevance.effective_number, 1)
    ('task026_topic_animals', 3.0)

    Args:
        bank: The bank, or its folder. Fingerprints that it lacks are made first; members that turn
            out to hold NaN or infinity are left out, as its `left_out` says.
        dataset: The new dataset; `dataset.examples` says which formats it may have.
        out: The folder to be made, a PEFT adapter.
        settings: The metric, and how its distances become coefficients; without them, as the bank
            was calibrated, if it was, as `merge` of the command line does.
        options: How the merge is run.
        columns: The fields of the new dataset to use.
        progress: Told bytes read and bytes in all during the merge.

    Returns:
        The bank's members with their distances and coefficients, and how relevant they are.

    Raises:
        LoraMetaError: What cannot be used, and what to do about it.
    """
    bank = bank if isinstance(bank, Bank) else Bank(bank)
    run = options or Options()
    if not run.allow_nan:
        leave_out_not_finite(bank)

    def make() -> Ranking:
        make_fingerprints(bank)
        how = settings or kept(bank) or Settings()
        (job,) = jobs_for(bank, [Path(dataset)], [Path(out)], how, columns)
        normalize = run.normalize or norms_of([job], how)
        merge(bank, [job], replace(run, normalize=normalize), progress)
        assert job.ranking is not None
        return job.ranking

    return without_faulty(bank, make)
