"""Answers of a base model with adapters and without, scored against those of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import files
from lorameta_rs.cache import Cache
from lorameta_rs.dataset import Example, examples
from lorameta_rs.errors import InvalidDataset
from lorameta_rs.formats.base import Base
from lorameta_rs.formats.conversion import write, write_gguf
from lorameta_rs.formats.opening import open_adapters
from lorameta_rs.llama import Llama
from lorameta_rs.member import WEIGHTS
from lorameta_rs.merge import Options
from lorameta_rs.scores import MEASURES, interval, scores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lorameta_rs._metrics import Floats
    from lorameta_rs.hf import HuggingFace
    from lorameta_rs.member import Member
    from lorameta_rs.tokenizer import Tokenizer

BASE = "(base)"
"""What the base model alone is called."""

BUCKETS = (64, 256, 1024, 4096)
"""The lengths of prompts, in tokens, up to which rows are reported apart; the rest are one more."""

_CHUNK = 32  # answers that are kept at a time: what is lost at most when a run is broken off


@dataclass(frozen=True, eq=False)
class Rows:
    """Questions, and the answers to them where they are known."""

    texts: list[str]
    references: list[str]
    tokenizer: Tokenizer | None = None
    """The base model's; None for that of its own file."""

    @cached_property
    def prompts(self) -> list[str] | list[list[int]]:
        """What the model is asked: texts, or token ids where there is a tokenizer."""
        return self.texts if self.tokenizer is None else self.tokenizer.prompts(self.texts)

    @classmethod
    def of(
        cls,
        dataset: Path,
        tokenizer: Tokenizer | None = None,
        columns: Sequence[str] | None = None,
        most: int | None = None,
    ) -> Rows:
        """The first rows of a dataset; `dataset.examples` says which formats it may have.

        Raises:
            InvalidDataset: It does not tell answers from questions, or cannot be read.
        """
        told: list[Example] = []
        for row in islice(examples(dataset, columns=columns), most):
            if not (isinstance(row, Example) and row.answer):
                raise InvalidDataset(
                    f"`{dataset}`: row {len(told) + 1} has no answer apart from its question\n"
                    "expected fields such as `input` and `output`; --columns names others"
                )
            told.append(row)
        return cls([row.before for row in told], [row.answer for row in told], tokenizer)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one adapter, or the base alone, answers."""

    name: str
    answers: list[str]
    scores: Floats
    """`scores.scores` [rows, measures]."""
    lengths: list[int]
    """Of each prompt, in tokens."""

    def mean(self, measure: str) -> float:
        """The mean of a measure over all rows."""
        return float(self.scores[:, MEASURES.index(measure)].mean())

    def interval(self, measure: str) -> tuple[float, float]:
        """The bootstrap interval of that mean, as `scores.interval`."""
        return interval(self.scores[:, MEASURES.index(measure)])

    def by_length(self, measure: str) -> dict[str, tuple[int, float]]:
        """As `by_length`, of a measure."""
        return by_length(self.scores[:, MEASURES.index(measure)], self.lengths)


def by_length(values: Floats, lengths: Sequence[int]) -> dict[str, tuple[int, float]]:
    """Rows and their mean by the length of their prompts, for each of `BUCKETS` that has any.

    Args:
        values: One number a row.
        lengths: Of their prompts, in tokens.
    """
    places = np.searchsorted(BUCKETS, lengths)
    names = [f"up to {most}" for most in BUCKETS] + ["longer"]
    return {
        names[place]: (int((places == place).sum()), float(values[places == place].mean()))
        for place in sorted(set(places.tolist()))
    }


def evaluate(
    base: Path,
    adapters: Sequence[Path],
    rows: Rows,
    *,
    folder: Path,
    cache: Path | None = None,
    most_tokens: int = 128,
    threads: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> list[Evaluation]:
    """Score a base model and each of some adapters on the same rows.

    Args:
        base: The model, a GGUF file, or a folder of Hugging Face's.
        adapters: PEFT folders, GGUF files, or others that `open_adapters` knows.
        rows: The questions and their answers.
        folder: Where adapters are put that have to be converted.
        cache: Where answers are kept, by what they depend on; None to keep none.
        most_tokens: The longest answer.
        threads: Of the model; 0 as `Llama`.
        progress: Told how many answers there are, of how many.

    Returns:
        That of the base first, then of the adapters in their order.

    Raises:
        LoraMetaError: As `Llama`, `HuggingFace`, `open_adapters` and `scores.scores`.
    """
    said, lengths = answers(
        base,
        adapters,
        rows,
        folder=folder,
        cache=cache,
        most_tokens=most_tokens,
        threads=threads,
        progress=progress,
    )
    names = [BASE, *(str(path) for path in adapters)]
    return [
        Evaluation(name, own, scores(rows.references, own), lengths)
        for name, own in zip(names, said, strict=True)
    ]


def answers(
    base: Path,
    adapters: Sequence[Path],
    rows: Rows,
    *,
    folder: Path,
    cache: Path | None = None,
    most_tokens: int = 128,
    threads: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[list[list[str]], list[int]]:
    """What a base model, and each of some adapters, says to the same questions.

    Returns:
        The answers of the base, then those of each adapter; and the prompts' lengths in tokens.
        Arguments and errors are those of `evaluate`.
    """
    as_loaded = as_peft if base.is_dir() else as_gguf
    paths = as_loaded(adapters, base, folder)
    hashes = ["", *(_sha256(path) for path in paths)]
    kept = Cache(cache, "answers", "" if cache is None else _sha256(base), most_tokens)
    count = len(rows.prompts)
    found: list[list[str]] = []
    with _model(base, paths, adapters, _context(rows, most_tokens), threads) as model:
        lengths = [
            len(prompt if isinstance(prompt, list) else model.tokens(prompt))
            for prompt in rows.prompts
        ]
        _fit(base, lengths, model.limit)
        for number, sha256 in enumerate(hashes):
            scales = [float(i == number - 1) for i in range(len(adapters))]
            own: list[str] = []
            for start in range(0, count, _CHUNK):
                prompts = rows.prompts[start : start + _CHUNK]
                said = kept.load(len(prompts), sha256, prompts)
                if said is None:
                    said = _answers(model, prompts, scales, most_tokens, rows.tokenizer)
                    kept.keep(said, sha256, prompts)
                own += said
                if progress is not None:
                    progress(number * count + len(own), len(hashes) * count)
            found.append(own)
    return found, lengths


def doubts(base: Path, rows: Rows, said: Sequence[Sequence[str]], lengths: Sequence[int]) -> str:
    """What speaks against the tokenizer of a base's own file; empty where nothing does.

    Args:
        base: The model.
        rows: What it was asked.
        said: The answers that `answers` returns.
        lengths: Those of the prompts, as it does.
    """
    if rows.tokenizer is not None:
        return ""
    tokens, words = sum(lengths), sum(len(text.split()) for text in rows.texts)
    if 2 * tokens < words:  # a tokenizer that knows a text has about one for each word, or more
        found = f"the prompts' {words} words are {tokens} tokens"
    elif not any(answer for own in said for answer in own):
        found = "every answer is empty"
    else:
        return ""
    return (
        f"{found}: the tokenizer in `{base}` may not be the model's; give its tokenizer.json with "
        "--tokenizer"
    )


def as_gguf(adapters: Sequence[Path], base: Path, folder: Path) -> list[Path]:
    """The files that llama.cpp loads for some adapters, in `folder` if they have to be made.

    Raises:
        LoraMetaError: As `open_adapters` and `write_gguf`.
    """
    shape = Base.load(base)
    made = []
    for number, path in enumerate(adapters):
        if path.is_file() and path.suffix == ".gguf":
            made.append(path)
            continue
        made.append(folder / f"{number}.gguf")
        write_gguf(_only(path, shape), made[-1], shape, "float32", Options())
    return made


def as_peft(adapters: Sequence[Path], base: Path, folder: Path) -> list[Path]:
    """The folders that PEFT loads for some adapters, in `folder` if they have to be made.

    Raises:
        LoraMetaError: As `open_adapters` and `write`.
    """
    made = []
    for number, path in enumerate(adapters):
        if (path / WEIGHTS).is_file():
            made.append(path)
            continue
        member = _only(path, None if path.is_dir() else Base.load(base))
        made.append(folder / str(number))
        made[-1].mkdir()
        write(member, made[-1], "peft", "float32", None, Options())
    return made


def _only(path: Path, base: Base | None) -> Member:
    (member, *others) = open_adapters(path, base)
    if others:
        raise InvalidDataset(f"`{path}` holds adapters of several models: convert it first")
    return member


def _model(
    base: Path, adapters: Sequence[Path], names: Sequence[Path], context: int, threads: int
) -> Llama | HuggingFace:
    """What runs a base of this kind; `names` are what the user calls the adapters."""
    if not base.is_dir():
        return Llama(base, adapters, context=context, threads=threads, names=names)
    from lorameta_rs.hf import HuggingFace

    return HuggingFace(base, adapters, threads=threads)


def _sha256(path: Path) -> str:
    """That of a file, or those of a folder's settings and tensors."""
    if not path.is_dir():
        return files.sha256(path)
    parts = [one for one in sorted(path.iterdir()) if one.suffix in (".json", ".safetensors")]
    return " ".join(files.sha256(one) for one in parts)


def _answers(
    model: Llama | HuggingFace,
    prompts: Sequence[str] | Sequence[list[int]],
    scales: Sequence[float],
    most_tokens: int,
    tokenizer: Tokenizer | None,
) -> list[str]:
    said = model.answers(list(prompts), scales, most_tokens)
    if tokenizer is None:
        return [text for text, _ in said]
    return tokenizer.decode([ids for _, ids in said])


def _fit(base: Path, lengths: Sequence[int], limit: int | None) -> None:
    """See that each prompt leaves room for an answer.

    Raises:
        InvalidDataset: One does not.
    """
    longest = max(lengths)
    if limit is not None and longest >= limit:
        raise InvalidDataset(
            f"`{base}`: row {lengths.index(longest) + 1} asks with {longest} tokens, and the "
            f"model's context is {limit}\n"
            f"leave out the rows of {limit} tokens or more: here {sum(n >= limit for n in lengths)}"
        )


def _context(rows: Rows, most_tokens: int) -> int:
    """Tokens of the longest row with its answer; of texts at most one a byte."""
    longest = max(
        len(prompt) if isinstance(prompt, list) else len(prompt.encode()) + 2
        for prompt in rows.prompts
    )
    return -(-(longest + most_tokens + 1) // 256) * 256
