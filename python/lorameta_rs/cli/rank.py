"""`lorameta-rs rank`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options

if TYPE_CHECKING:
    from pathlib import Path

    from lorameta_rs.bank import Bank
    from lorameta_rs.ranking import Ranking

HEADERS = ("member", "distance", "similarity", "coefficient")


@click.command()
@click.argument("bank", type=options.PATH)
@click.argument("dataset", type=options.PATH)
@options.settings
@options.bank
@options.as_json
def rank(bank: Path, dataset: Path, as_json: bool, **arguments: Any) -> None:
    """List the members of BANK, nearest to DATASET first, with the coefficients they would get."""
    from lorameta_rs.fingerprint import token_distribution
    from lorameta_rs.ranking import rank

    settings = options.settings_from(arguments)
    opened = fingerprinted(options.bank_from(bank, arguments))
    columns = arguments["columns"]
    target = token_distribution(dataset, tokenizer=opened.tokenizer, columns=columns)
    found = rank(opened, target, settings)
    if as_json:
        console.data(described(found))
        return
    console.table(HEADERS, rows(found))
    say_relevance(found)


def fingerprinted(bank: Bank, keep: bool = True) -> Bank:
    """The bank with a fingerprint for every member; those that can have none are left out."""
    from lorameta_rs.index import make_fingerprints

    console.report(bank)
    with console.steps("counting tokens", len(bank.unfingerprinted())) as step:
        make_fingerprints(bank, keep=keep, progress=step)
    console.report(bank)
    return bank


def rows(ranking: Ranking, most: int | None = None) -> list[tuple[str, str, str, str]]:
    """The members nearest first, as a table's rows."""
    similarity = ranking.similarity
    return [
        (
            ranking.names[i],
            f"{ranking.distances[i]:.6g}",
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
    return {"settings": asdict(ranking.settings), "members": members, "relevance": relevance}


def say_relevance(ranking: Ranking) -> None:
    """How good a match the bank is."""
    about = ranking.relevance
    if about.percentile is None:
        than = "how that compares within the bank is not known; `lorameta-rs index` finds out"
    else:
        than = f"farther than {about.percentile:.0f} % of the bank's own are from their nearest"
    console.say(
        f"nearest is `{about.nearest}` at {about.distance:.4g}: {than}; "
        f"in effect {about.effective_number:.1f} adapters take part"
    )
    if about.warning is not None:
        console.warn(about.warning)
