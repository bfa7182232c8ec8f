"""`lorameta-rs rank`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorameta_rs.bank import Bank
    from lorameta_rs.calibration import Calibration
    from lorameta_rs.ranking import Ranking, Settings
    from lorameta_rs.vectors import Vectors

HEADERS = ("member", "distance", "similarity", "coefficient")


@click.command()
@click.argument("bank", type=options.PATH)
@click.argument("dataset", type=options.PATH)
@options.settings
@options.calibration
@options.vectors
@options.columns("DATASET")
@options.bank
@options.as_json
@click.pass_context
def rank(
    context: click.Context, /, bank: Path, dataset: Path, as_json: bool, **arguments: Any
) -> None:
    """List the members of BANK, nearest to DATASET first.

    Each comes with the coefficient that `merge` would give it.
    """
    from lorameta_rs.calibration import ranked
    from lorameta_rs.fingerprint import token_distribution

    arguments = options.as_paper(context, arguments)
    opened = options.bank_from(bank, arguments)
    fingerprinted(opened)
    settings = calibrated(context, opened, arguments)
    given = vectors(opened, arguments["vectors"])
    with console.rows("counting the new tokens") as update:
        target = token_distribution(
            dataset,
            tokenizer=opened.tokenizer,
            columns=arguments["columns"],
            progress=update,
        )
    if given is not None:
        target = given.of(dataset, target)
    found = ranked(opened, target, settings)
    console.report(opened)
    if as_json:
        console.data(described(found))
        return
    console.table(HEADERS, rows(found))
    say_relevance(found)


def calibrated(
    context: click.Context, bank: Bank, arguments: dict[str, Any]
) -> Settings | Calibration:
    """How datasets are compared: as the bank was calibrated, or as given by hand.

    The paper's are given by hand, too. Of a calibration that is out of date the bank has a note.
    """
    from lorameta_rs.calibration import kept

    given = options.settings_from(arguments)
    by_hand = context.params["paper"] or any(
        context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        for name in options.SETTINGS
    )
    if by_hand or not arguments["calibration"]:
        return given
    found = kept(bank)
    if found is None:
        return given
    console.say(f"calibrated by {found.measure}: {found}")
    return found


def vectors(bank: Bank, paths: Sequence[Path]) -> Vectors | None:
    """The user's own vectors, if there are any, which the bank's members have then."""
    from lorameta_rs.vectors import Vectors

    if not paths:
        return None
    found = Vectors.load(paths)
    found.give(bank)
    return found


def fingerprinted(bank: Bank, keep: bool = True, allow_nan: bool = False) -> int:
    """Give every member a fingerprint, and leave those out that can have none.

    Those too that the index knows to hold NaN or infinity, unless `allow_nan`. Returns how many
    were made.
    """
    from lorameta_rs.index import leave_out_not_finite, make_fingerprints

    if not allow_nan:
        leave_out_not_finite(bank)
    console.report(bank)
    _say_outdated(bank)
    with console.steps("counting tokens", len(bank.unfingerprinted())) as step:
        made = make_fingerprints(bank, keep=keep, progress=step)
    console.report(bank)
    return sum(made.values())


def _say_outdated(bank: Bank) -> None:
    """Say which fingerprints there were to be used, and why they are made again instead."""
    reasons, outdated = bank.unfingerprinted(), bank.outdated()
    again = [
        member.name
        for member in bank.members
        if member.name in reasons
        and (member.name in outdated or bank.fingerprint_path(member).exists())
        and bank.dataset(member) is not None
    ]
    if not again:
        return
    names = ", ".join(f"`{name}`" for name in again[:3])
    if len(again) > 3:
        names += f" and {len(again) - 3} more"
    why = reasons[again[0]] if len(again) == 1 else f"the first because {reasons[again[0]]}"
    console.say(f"{console.number(len(again), 'fingerprint')} to be made again, of {names}: {why}")


def rows(ranking: Ranking, most: int | None = None) -> list[tuple[str, str, str, str]]:
    """The members nearest first, as a table's rows."""
    similarity = ranking.similarity
    return [
        (
            ranking.names[i],
            f"{ranking.distances[i]:#.6g}".rstrip("."),
            "" if similarity is None else f"{similarity[i]:.4f}",
            f"{ranking.coefficients[i]:.4f}",
        )
        for i in ranking.nearest_first()[:most]
    ]


def described(ranking: Ranking) -> dict[str, Any]:
    """A ranking as JSON has it, members nearest first, numbers in full precision."""
    similarity = ranking.similarity
    members = [
        {
            "name": ranking.names[i],
            "distance": float(ranking.distances[i]),
            "similarity": None if similarity is None else float(similarity[i]),
            "coefficient": float(ranking.coefficients[i]),
        }
        for i in ranking.nearest_first()
    ]
    relevance = asdict(ranking.relevance) | {"warning": ranking.relevance.warning}
    return {
        "settings": asdict(ranking.settings),
        "note": ranking.note,
        "members": members,
        "relevance": relevance,
    }


def say_relevance(ranking: Ranking) -> None:
    """How good a match the bank is."""
    about = ranking.relevance
    if ranking.note is not None:
        console.say(ranking.note)
    nearest = f"nearest is `{about.nearest}` at {about.distance:.4g}"
    if about.warning is not None:
        console.warn(about.warning)
    elif len(ranking.names) == 1:
        console.say(nearest)  # of a bank of one nobody knows how near its datasets are
    elif about.percentile is None:
        console.say(f"{nearest}; `lorameta-rs index` finds out how near that is for this bank")
    else:
        console.say(
            f"{nearest}, farther than {about.percentile:.0f} % of the bank's datasets are from "
            "their nearest"
        )
    console.say(
        f"in effect {about.effective_number:.1f} of {console.number(len(ranking.names), 'adapter')}"
        " take part"
    )
