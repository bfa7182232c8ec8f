"""`lorameta-rs index`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options
from lorameta_rs.cli.rank import fingerprinted

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("bank", type=options.PATH)
@options.columns("the members' datasets")
@options.bank
@click.option(
    "--metric",
    "metrics",
    type=options.Metrics(),
    multiple=True,
    default=(options.METRIC,),
    show_default=True,
    help="Compare the members' datasets with each other as `rank` and `merge` do by this.",
)
@options.as_json
def index(bank: Path, metrics: tuple[str, ...], as_json: bool, **arguments: Any) -> None:
    """Prepare a bank: count its datasets' tokens, hash its adapters.

    Does only what is missing or out of date. `merge` and `rank` do so too for what they use, where
    they have to, but `index` also finds out how near is near in a large bank.
    """
    from lorameta_rs.distance import applicable
    from lorameta_rs.index import hash_adapters, leave_out_not_finite, nearest_distances
    from lorameta_rs.modules import lacking

    opened = options.bank_from(bank, arguments, arguments["columns"])
    made = fingerprinted(opened)
    with console.steps("hashing adapters", len(opened)) as step:
        hashed = hash_adapters(opened, progress=step)
    leave_out_not_finite(opened)
    console.report(opened)
    if (odd := lacking(opened.members)) is not None:
        console.warn(odd)
    for metric in metrics:
        for name in applicable(metric, opened.fingerprints):
            with console.progress(f"comparing datasets by {name}") as update:
                nearest_distances(opened, name, patient=True, progress=update)
    if as_json:
        reasons = {name: str(error) for name, error in opened.left_out.items()}
        console.data(
            {
                "members": opened.names,
                "fingerprints_made": made,
                "adapters_hashed": hashed,
                "left_out": reasons,
            }
        )
        return
    console.say(
        f"{console.number(len(opened), 'member')}: {console.number(made, 'fingerprint')} made, "
        f"{console.number(hashed, 'adapter')} hashed, "
        f"{console.number(len(opened.left_out), 'folder')} left out"
    )
