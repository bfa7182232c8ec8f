"""`lorameta-rs calibrate`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options
from lorameta_rs.cli.rank import fingerprinted

if TYPE_CHECKING:
    from lorameta_rs.bank import Bank
    from lorameta_rs.calibration import Calibration

HEADERS = ("metric", "pipeline", "τ", "top-k", "normalize", "scale")
_SHOWN = 12


@click.command()
@click.argument("bank", type=options.PATH)
@click.option(
    "--metric",
    "metrics",
    type=options.Metrics(),
    multiple=True,
    help="Try this, and what else is given, beside the default; else several.",
)
@click.option(
    "--width",
    type=click.IntRange(1, 4000),
    default=64,
    show_default=True,
    help="Of the network of `neural`; the paper has 4000.",
)
@click.option(
    "--base",
    type=options.PATH,
    metavar="BASE.gguf",
    help="Choose by how likely this base finds the members' own answers (extra `llama`).",
)
@click.option(
    "--members",
    type=click.IntRange(2),
    default=12,
    show_default=True,
    help="How many are asked about, for --base.",
)
@click.option(
    "--rows",
    type=click.IntRange(4),
    default=8,
    show_default=True,
    help="Of each of their datasets, for --base.",
)
@click.option(
    "--candidates",
    type=click.IntRange(2, 32),
    default=8,
    show_default=True,
    help="Settings that are tried, for --base: the default, and the best by ΔW.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, help="Of the members and rows, for --base."
)
@options.bank
@options.threads
@options.as_json
@click.pass_context
def calibrate(
    context: click.Context,
    /,
    bank: Path,
    metrics: tuple[str, ...],
    base: Path | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Find the settings that suit BANK, and learn its pipelines.

    Makes each member's ΔW of the others by many settings, and keeps what comes nearest in BANK:
    `rank` and `merge` use it from then on. Also learns `--pipeline` neural, ridge and simplex.
    """
    from lorameta_rs.calibration import calibrated
    from lorameta_rs.distance import SEPARATOR
    from lorameta_rs.index import hash_adapters, leave_out_not_finite, nearest_distances
    from lorameta_rs.merge import Options

    if base is None:
        options.refuse(context, ("members", "rows", "candidates", "seed"), "--base", "without")
    opened = options.bank_from(bank, arguments)
    fingerprinted(opened)
    with console.steps("hashing adapters", len(opened)) as step:
        hash_adapters(opened, progress=step)
    leave_out_not_finite(opened)
    console.report(opened)
    with console.progress("multiplying adapters") as update:
        found, learned = calibrated(
            opened,
            metrics,
            arguments["width"],
            options=Options(threads=arguments["threads"]),
            progress=update,
        )
    learned.save(opened)
    if base is not None:
        found = _by_answers(opened, found, base, arguments)
    found.save(opened)
    for name in found.settings.metric.split(SEPARATOR):
        nearest_distances(opened, name, patient=True)
    if as_json:
        console.data(found.content)
        return
    measures = ("loss",) if base is not None else ("cosine", "error")
    console.table((*HEADERS, *measures, "against the default"), _rows(found, measures))
    console.say(f"chosen by {found.measure}: {found}")
    console.say("`rank` and `merge` use it for this bank, unless told otherwise")


def _by_answers(
    bank: Bank, found: Calibration, base: Path, arguments: dict[str, Any]
) -> Calibration:
    from lorameta_rs.calibration import by_answers, shortlist
    from lorameta_rs.likelihoods import losses, sample
    from lorameta_rs.refine import Refining

    how = Refining(
        base, rows=arguments["rows"], seed=arguments["seed"], threads=arguments["threads"]
    )
    candidates = shortlist(found, arguments["candidates"])
    members = sample(bank, arguments["members"], how)
    with tempfile.TemporaryDirectory() as folder, console.progress("asking") as update:
        return by_answers(
            found, candidates, losses(bank, candidates, members, how, Path(folder), update)
        )


def _rows(found: Calibration, measures: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The best, the best of each pipeline, and the default."""
    shown: list[dict[str, Any]] = []
    ranked = sorted(found.tried, key=lambda row: row.get("loss", -row.get("cosine", 0.0)))
    for row in ranked:
        seen = {(other["pipeline"], other.get("of_modules")) for other in shown}
        is_new = (row["pipeline"], row.get("of_modules")) not in seen
        if len(shown) < _SHOWN or is_new or row is found.tried[0]:
            shown.append(row)
    return [
        (
            row["metric"],
            row["pipeline"] + (" of each module" if row.get("of_modules") else ""),
            f"{row['temperature']:g}" if row["pipeline"] == "normalized" else "",
            "" if row["top_k"] is None else str(row["top_k"]),
            row["normalize"],
            f"{row['scale']:g}",
            *(f"{row[measure]:.4f}" for measure in measures),
            "{:+.4f} ± {:.4f}".format(*row["against"]),
        )
        for row in shown
    ]
