"""`lorameta-rs demo`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorameta_rs.cli import console, options

if TYPE_CHECKING:
    from lorameta_rs.ranking import Ranking


@click.command()
@click.argument("folder", type=options.PATH, default=Path("lorameta-demo"))
@options.as_json
def demo(folder: Path, as_json: bool) -> None:
    """Show the whole flow on a small bank that comes along.

    Copies the bank to FOLDER, `lorameta-demo` unless given, and makes an adapter there.
    """
    from lorameta_rs.bank import Bank
    from lorameta_rs.cli.rank import described
    from lorameta_rs.demo import copy_out
    from lorameta_rs.distance import SEPARATOR
    from lorameta_rs.flow import generate
    from lorameta_rs.index import hash_adapters, make_fingerprints, nearest_distances
    from lorameta_rs.ranking import Settings

    data = copy_out(folder)
    bank = Bank(data.bank)
    make_fingerprints(bank)
    hash_adapters(bank)
    for name in Settings().metric.split(SEPARATOR):
        nearest_distances(bank, name, patient=True)
    out = folder / "adapter"
    ranking = generate(bank, data.dataset, out)
    if as_json:
        paths = {"bank": str(data.bank), "dataset": str(data.dataset), "out": str(out)}
        console.data(paths | described(ranking))
    else:
        _explain(data.bank, data.dataset, out, ranking)


def _explain(bank: Path, dataset: Path, out: Path, ranking: Ranking) -> None:
    from lorameta_rs.cli.rank import HEADERS, rows, say_relevance

    count = len(ranking.names)
    console.say(f"1. {bank} is a bank: {count} LoRA adapters of one tiny base model,")
    console.say("   each with the dataset it was trained on, whose tokens were counted.")
    console.say(f"2. {dataset} is a dataset that is not in it. Its nearest:\n")
    console.table(HEADERS, rows(ranking, 6))
    console.say("")
    say_relevance(ranking)
    console.say(f"3. {out} is the sum of all {count}, each times its coefficient:")
    console.say("   an adapter for the new dataset, made without training. PEFT loads it.")
    console.say("\nThe same by hand, as with a bank of your own:\n")
    command = ("lorameta-rs", "merge", str(bank), str(dataset), "-o", str(out.with_name("mine")))
    console.say(f"   {shlex.join(command)}")
