"""`lorameta-rs evaluate`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options

if TYPE_CHECKING:
    from lorameta_rs.evaluate import Evaluation

HEADERS = ("adapter", "Rouge-L", "95 %", "Rouge-Lsum", "exact", "contains")


@click.command()
@click.argument("base", metavar="BASE", type=options.PATH)
@click.argument("adapters", metavar="[ADAPTER]...", type=options.PATH, nargs=-1)
@click.option("--dataset", type=options.PATH, required=True, help="Questions with their answers.")
@options.columns("the dataset")
@options.tokenizer
@click.option("--rows", type=click.IntRange(1), help="Take only so many, from the beginning.")
@options.most_tokens
@click.option(
    "--cache",
    type=options.PATH,
    metavar="DIR",
    help="Keep answers there, and take up a run that was broken off.",
)
@options.threads
@options.as_json
def evaluate(
    base: Path,
    adapters: tuple[Path, ...],
    dataset: Path,
    tokenizer: Path | None,
    rows: int | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Score a base model's answers, alone and with adapters.

    BASE is a GGUF file, run by llama.cpp, or a Hugging Face folder (extra `hf`); ADAPTER is a PEFT
    folder or a GGUF file. Answers are compared with those of the dataset by Rouge, and for being,
    or containing, the same text.
    """
    from lorameta_rs.evaluate import Rows, doubts, evaluate
    from lorameta_rs.tokenizer import Tokenizer

    asked = Rows.of(
        dataset, None if tokenizer is None else Tokenizer(tokenizer), arguments["columns"], rows
    )
    with tempfile.TemporaryDirectory() as folder, console.progress("answering") as update:
        found = evaluate(
            base,
            adapters,
            asked,
            folder=Path(folder),
            cache=arguments["cache"],
            most_tokens=arguments["most_tokens"],
            threads=arguments["threads"],
            progress=update,
        )
    if doubt := doubts(base, asked, [one.answers for one in found], found[0].lengths):
        console.warn(doubt)
    if as_json:
        console.data([_described(one) for one in found])
        return
    console.table(HEADERS, [_row(one) for one in found])
    for one in found:
        console.say_lengths(one.name, one.by_length("rouge_l"))


def _row(one: Evaluation) -> tuple[str, ...]:
    low, high = one.interval("rouge_l")
    return (
        one.name,
        f"{one.mean('rouge_l'):.3f}",
        f"{low:.3f}–{high:.3f}",
        *(f"{one.mean(measure):.3f}" for measure in ("rouge_lsum", "exact", "contains")),
    )


def _described(one: Evaluation) -> dict[str, Any]:
    from lorameta_rs.scores import MEASURES

    return {
        "adapter": one.name,
        "rows": len(one.answers),
        **{measure: one.mean(measure) for measure in MEASURES},
        "rouge_l_interval": one.interval("rouge_l"),
        "rouge_l_by_length": one.by_length("rouge_l"),
        "answers": one.answers,
    }
