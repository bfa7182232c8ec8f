"""`lorameta-rs index`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("bank", type=options.PATH)
@options.bank
@click.option(
    "--metric",
    "metrics",
    type=click.Choice(options.METRICS),
    multiple=True,
    default=("js",),
    show_default=True,
    help="Compare the members' datasets with each other by this metric.",
)
@options.as_json
def index(bank: Path, metrics: tuple[str, ...], as_json: bool, **arguments: Any) -> None:
    """Prepare a bank: a fingerprint of every dataset, a hash of every adapter.

    Does only what is missing or out of date. `merge` and `rank` make missing fingerprints too.
    """
    from lorameta_rs.index import hash_adapters, make_fingerprints, nearest_distances

    opened = options.bank_from(bank, arguments)
    failed = len(opened.left_out)
    console.report(opened)
    with console.steps("counting tokens", len(opened)) as step:
        made = make_fingerprints(opened, progress=step)
    failed += len(opened.left_out)
    console.report(opened)
    with console.steps("hashing adapters", len(opened)) as step:
        hashed = hash_adapters(opened, progress=step)
    for metric in metrics:
        with console.progress(f"comparing datasets by {metric}") as update:
            nearest_distances(opened, metric, patient=True, progress=update)
    counts = {
        "members": len(opened),
        "fingerprints_made": sum(made.values()),
        "adapters_hashed": hashed,
        "left_out": failed,
    }
    if as_json:
        console.data(counts)
        return
    console.say(
        f"{counts['members']} members indexed: {counts['fingerprints_made']} fingerprints made, "
        f"{hashed} adapters hashed, {failed} folders left out"
    )
