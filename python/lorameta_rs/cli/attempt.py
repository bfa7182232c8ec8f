"""`lorameta-rs try`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from lorameta_rs.cli import console, options


@click.command("try")
@click.argument("base", metavar="BASE", type=options.PATH)
@click.argument("adapters", metavar="ADAPTER...", type=options.PATH, nargs=-1, required=True)
@click.option("--prompt", multiple=True, help="What to ask; may be repeated.")
@click.option("--dataset", type=options.PATH, help="Or take the questions of a dataset.")
@options.columns("the dataset")
@click.option(
    "--rows", type=click.IntRange(1), default=5, show_default=True, help="How many of them."
)
@options.tokenizer
@options.most_tokens
@options.threads
@options.as_json
@click.pass_context
def attempt(
    context: click.Context,
    /,
    base: Path,
    adapters: tuple[Path, ...],
    prompt: tuple[str, ...],
    dataset: Path | None,
    tokenizer: Path | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Show a base model's answers, with and without adapters.

    BASE is a GGUF file, run by llama.cpp, or a Hugging Face folder (extra `hf`). The answers stand
    side by side; of a dataset's questions the right one too.
    """
    from lorameta_rs.evaluate import Rows, answers, doubts
    from lorameta_rs.tokenizer import Tokenizer

    if bool(prompt) == (dataset is not None):
        raise click.UsageError("give one of: --prompt, --dataset")
    own = None if tokenizer is None else Tokenizer(tokenizer)
    if dataset is None:
        options.refuse(context, ("columns", "rows"), "--prompt")
        asked = Rows(list(prompt), [], own)
    else:
        asked = Rows.of(dataset, own, arguments["columns"], arguments["rows"])
    with tempfile.TemporaryDirectory() as folder:
        said, lengths = answers(
            base,
            adapters,
            asked,
            folder=Path(folder),
            most_tokens=arguments["most_tokens"],
            threads=arguments["threads"],
        )
    if doubt := doubts(base, asked, said, lengths):
        console.warn(doubt)
    names = [str(base), *map(str, adapters)]
    references: list[str | None] = [*asked.references] or [None] * len(asked.texts)
    answered = [dict(zip(names, row, strict=True)) for row in zip(*said, strict=True)]
    rows = list(zip(asked.texts, answered, references, strict=True))
    if as_json:
        console.data(
            [dict(zip(("prompt", "answers", "reference"), row, strict=True)) for row in rows]
        )
        return
    for text, row, reference in rows:
        console.side_by_side(text, row, reference)
