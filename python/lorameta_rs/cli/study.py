"""`lorameta-rs study`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options
from lorameta_rs.cli.rank import fingerprinted

if TYPE_CHECKING:
    from lorameta_rs.study import Study

HEADERS = ("adapter", "Rouge-L", "exact", "against the paper's", "of fine-tuned")


@click.command()
@click.argument("bank", type=options.PATH)
@click.option(
    "--base",
    type=options.PATH,
    required=True,
    metavar="BASE.gguf",
    help="The base model, which llama.cpp runs.",
)
@click.option(
    "--protocol",
    type=click.Choice(options.PROTOCOLS),
    default=options.PROTOCOLS[0],
    show_default=True,
    help="Leave one out, or leave its whole family out.",
)
@click.option(
    "--test",
    default="test.jsonl",
    show_default=True,
    metavar="NAME",
    help="A member's test set; `{}` stands for its name, a path leads from BANK.",
)
@click.option("--rows", type=click.IntRange(1), help="Of each test set at most.")
@options.settings
@click.option(
    "--method",
    type=click.Choice(("auto", "svd", "soup")),
    default="auto",
    show_default=True,
    help="How adapters are combined.",
)
@click.option("--rank", type=click.IntRange(1), help="Of the result of `svd`.  [default: 16]")
@click.option(
    "--normalize",
    type=click.Choice(options.NORMALIZATIONS),
    help="As `merge`.",
)
@options.bank
@options.most_tokens
@click.option(
    "--cache",
    type=options.PATH,
    metavar="DIR",
    help="Keep answers there, and take up a study that was broken off.",
)
@click.option("--plot", type=options.PATH, metavar="FILE", help="Draw it (extra `plot`).")
@options.threads
@options.as_json
@click.pass_context
def study(
    context: click.Context,
    /,
    bank: Path,
    base: Path,
    plot: Path | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Measure the adapters that a bank makes for its own tasks.

    Each member's test rows are answered by adapters that were made without it, by controls, and by
    the member itself.
    """
    from lorameta_rs.merge import Options
    from lorameta_rs.study import check_drawable, drawn, study

    arguments = options.as_paper(context, arguments)
    if plot is not None:
        check_drawable(plot)
    opened = options.bank_from(bank, arguments)
    fingerprinted(opened)
    with tempfile.TemporaryDirectory() as folder, console.progress("studying") as update:
        found = study(
            opened,
            base,
            Path(folder),
            settings=options.settings_from(arguments),
            options=Options(
                method=arguments["method"],
                rank=arguments["rank"],
                normalize=arguments["normalize"],
            ),
            **{
                name: arguments[name]
                for name in ("protocol", "test", "rows", "most_tokens", "cache", "threads")
            },
            progress=update,
        )
    for note in found.notes:
        console.say(note)
    if as_json:
        console.data(_described(found))
    else:
        console.table(HEADERS, _rows(found))
        for name in found.scores:
            console.say_lengths(name, found.by_length(name))
    if plot is not None:
        drawn(found, plot)


def _rows(found: Study) -> list[tuple[str, ...]]:
    from lorameta_rs.study import CONTROLS

    base, best = found.of("base").mean(), found.of("fine-tuned").mean()
    rows: list[tuple[str, ...]] = []
    for name in (control for control in CONTROLS if control in found.scores):
        mean = float(found.of(name).mean())
        against = ""
        if "paper" in found.scores and name != "paper":
            difference, error = found.against(name, "paper")
            against = f"{difference:+.3f}" + ("" if error is None else f" ± {error:.3f}")
        closes = "" if best == base else f"{100 * (mean - base) / (best - base):.0f} %"
        rows.append((name, f"{mean:.3f}", f"{found.of(name, 'exact').mean():.3f}", against, closes))
    return rows


def _described(found: Study) -> dict[str, Any]:
    from lorameta_rs.scores import MEASURES

    return {
        "tasks": found.tasks,
        "families": found.families,
        "notes": found.notes,
        "adapters": {
            name: {
                **{measure: found.of(name, measure).tolist() for measure in MEASURES},
                "by_length": found.by_length(name),
                "against_base": found.against(name, "base"),
            }
            for name in found.scores
        },
    }
