"""`lorameta-rs demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorameta_rs.cli import console, options

if TYPE_CHECKING:
    from lorameta_rs.ranking import Ranking


@click.command()
@click.argument("folder", type=options.PATH, default=Path("lorameta-demo"))
def demo(folder: Path) -> None:
    """Show the whole flow on the small bank that comes with the package, in FOLDER."""
    from lorameta_rs.bank import Bank
    from lorameta_rs.demo import copy_out
    from lorameta_rs.flow import generate
    from lorameta_rs.index import hash_adapters, make_fingerprints, nearest_distances

    data = copy_out(folder)
    bank = Bank(data.bank)
    made = make_fingerprints(bank)
    hash_adapters(bank)
    nearest_distances(bank, "js", patient=True)
    out = folder / "adapter"
    ranking = generate(bank, data.dataset, out)
    _explain(folder, data.bank, data.dataset, out, len(made), ranking)


def _explain(
    folder: Path, bank: Path, dataset: Path, out: Path, counted: int, ranking: Ranking
) -> None:
    from lorameta_rs.cli.rank import HEADERS, rows, say_relevance

    console.say(f"1. {bank} is a bank: {len(ranking.names)} LoRA adapters of one tiny base model,")
    console.say(
        f"   each with the dataset it was trained on. Counted the tokens of {counted} of them."
    )
    console.say(f"2. {dataset} is a dataset that is not in it. Its nearest:\n")
    console.table(HEADERS, rows(ranking, 6))
    console.say("")
    say_relevance(ranking)
    console.say(f"3. {out} is the sum of all {len(ranking.names)}, each times its coefficient:")
    console.say("   an adapter for the new dataset, made without training. PEFT loads it.")
    console.say("\nThe same with your own bank:\n")
    console.say(f"   lorameta-rs merge {bank} {dataset} -o {folder / 'mine'}")
