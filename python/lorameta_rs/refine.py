"""Coefficients made better by what the base model says: a few passes over rows of the new dataset.

The merge that a ranking asks for and the nearest members are the candidates. llama.cpp has them all
loaded, each request says how they are mixed, and `search` looks for the mixture under which the
dataset's own answers are likeliest. It is kept where it also is so on rows that were held out.
"""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import _core, files
from lorameta_rs.base_weights import weight_files
from lorameta_rs.cache import Cache
from lorameta_rs.dataset import Example, examples
from lorameta_rs.errors import InvalidDataset, InvalidSetting
from lorameta_rs.formats.base import Base
from lorameta_rs.formats.conversion import write_gguf
from lorameta_rs.formats.opening import open_adapters
from lorameta_rs.index import Index
from lorameta_rs.llama import Llama
from lorameta_rs.merge import Job, Options, merge, plan
from lorameta_rs.relevance import effective_number
from lorameta_rs.search import search
from lorameta_rs.shape import delta_norms
from lorameta_rs.sums import unit_coefficients

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.tokenizer import Tokenizer

MERGE = "(merge)"
"""What the merge that the ranking asks for is called among the candidates."""

_FEWEST = 4

Ids = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Refining:
    """How a job is refined."""

    base: Path
    """The base model, a GGUF file."""
    rows: int = 32
    """Of the dataset, to choose by; as many more are held out, as far as there are."""
    candidates: int = 8
    """The nearest members that take part, beside the merge itself."""
    budget: int = 70
    """Evaluations of all rows at most."""
    seed: int = 0
    """Of the choice of rows."""
    threads: int = 0
    """Of the model, as `Llama`."""
    cache: Path | None = None
    """Where evaluations are kept, so that a search that was broken off goes on there."""


@dataclass(frozen=True, eq=False)
class Refined:
    """What came of it; losses are means of −ln p over the tokens of the answers, in nats."""

    job: Job
    """The job with one coefficient for each module of each member, to be summed as they are, with
    normalize `none`: the mixture's if it is better on the rows held out, else the merge's. Its
    ranking has each member's own number in the mixture, and in that of the merge."""
    names: list[str]
    """The candidates: `(merge)`, then members."""
    weights: Floats
    """How the candidates are mixed."""
    before: float
    """On the rows held out, the loss of the merge as it was."""
    after: float
    """That of the mixture, merged to the rank that was asked for."""
    evaluations: int
    """Of the rows to choose by, as `Refining.budget` counts them."""

    @property
    def kept(self) -> bool:
        """Whether the mixture is better on the rows held out."""
        return self.after < self.before


def refine(
    bank: Bank,
    job: Job,
    options: Options,
    how: Refining,
    folder: Path,
    progress: Callable[[int, int], object] | None = None,
    estimate: Callable[[float], object] | None = None,
) -> Refined:
    """Look for better coefficients of a job than its ranking gave.

    Args:
        bank: Its members, and the tokenizer.
        job: One with a dataset and a ranking.
        options: How it is merged, with `unit` norms or without.
        how: The base model, and how long to look.
        folder: Where the candidates' files are put.
        progress: Told evaluations done, and how many there are at most.
        estimate: Told the seconds that all evaluations take at most, once the first has been timed.

    Returns:
        The job to be run, with one coefficient for each module of each member.

    Raises:
        InvalidDataset: The dataset has too few rows with answers.
        LoraMetaError: As `merge`, `write_gguf` and `Llama`.
    """
    if job.dataset is None or job.ranking is None:
        raise InvalidSetting("refine: only what a dataset chose can be refined by its answers")
    check_method(options)
    normalize = options.normalize or "unit"
    # What cannot be merged or written is refused before the work.
    plan(bank, [job], replace(options, method="svd", normalize=normalize))
    columns = None if job.fingerprint is None else job.fingerprint.columns
    chosen, held = chosen_rows(job.dataset, columns, how)
    shape = Base.load(how.base)
    end = end_of_answers(how.base)
    search_rows, held_rows = (answer_ids(bank.tokenizer, rows, end) for rows in (chosen, held))
    near = [int(i) for i in np.argsort(-job.coefficients, kind="stable")[: how.candidates]]
    plain = Options(
        method="svd",
        normalize=normalize,
        rank=options.rank,
        energy=options.energy,
        seed=options.seed,
        memory=options.memory,
        io=options.io,
    )
    merge(bank, [Job(job.coefficients, folder / "merge")], plain)
    members = [*open_adapters(folder / "merge"), *(bank.members[i] for i in near)]
    paths = []
    for number, member in enumerate(members):
        paths.append(folder / f"{number}.gguf")
        write_gguf(member, paths[-1], shape, "float32", Options())
    context = context_of(search_rows + held_rows)
    most = how.budget + 2
    kept = Cache(how.cache, "likelihoods", *_hashes(how, paths))
    with Llama(how.base, paths, context=context, threads=how.threads) as llama:
        done = timed = 0

        def look(weights: Floats, rows: Sequence[Ids] = search_rows) -> Floats:
            nonlocal done, timed
            found = kept.load(len(rows), rows, weights.tolist())
            if found is None:
                start = time.monotonic()
                found = llama.log_likelihoods(rows, weights.tolist())
                kept.keep(found, rows, weights.tolist())
                timed += 1
                if timed == 1 and estimate is not None:
                    estimate((time.monotonic() - start) * (most - done))
            done += 1
            if progress is not None:
                progress(min(done, most), most)
            return np.concatenate(found)

        mixture = search(look, len(members), how.budget)
        alone = np.eye(len(members))[0]
        before = -float(look(alone, held_rows).mean())
    # A mixture is cut to the rank that is written: that is what has to be better.
    coefficients, modules = _as_coefficients(bank, job, normalize, mixture.weights, near)
    cut = Job(coefficients, folder / "mixture", modules=modules)
    merge(bank, [cut], replace(plain, normalize="none"))
    after = _loss(cut.out, shape, how, context, held_rows)
    if progress is not None:
        progress(most, most)
    names = [MERGE, *(bank.names[i] for i in near)]
    weights = mixture.weights if after < before else alone
    if weights is alone:
        coefficients, modules = _as_coefficients(bank, job, normalize, alone, near)
    shares = weights[0] * job.coefficients
    shares[near] += weights[1:]
    record = {
        "rows": len(search_rows),
        "seed": how.seed,
        "budget": how.budget,
        "weights": dict(zip(names, weights.tolist(), strict=True)),
        "coefficients": dict(zip(bank.names, shares.tolist(), strict=True)),
        "before": before,
        "after": min(before, after),
    }
    about = replace(job.ranking.relevance, effective_number=effective_number(shares))
    refined = replace(
        job,
        coefficients=coefficients,
        modules=modules,
        refined=record,
        ranking=replace(job.ranking, coefficients=shares, relevance=about),
    )
    return Refined(refined, names, weights, before, after, mixture.evaluations)


def check_method(options: Options) -> None:
    """See that what is found can be written as the options want it.

    Raises:
        InvalidSetting: It cannot.
    """
    if options.method not in ("auto", "svd"):
        raise InvalidSetting(
            f"refine: the method is `{options.method}`, but what is found is a sum of ΔW that "
            "`svd` brings to one rank\nleave --method out, or give svd"
        )


def _loss(adapter: Path, shape: Base, how: Refining, context: int, rows: Sequence[Ids]) -> float:
    """The loss of answers with one adapter, which is in a folder, as it is."""
    (member,) = open_adapters(adapter)
    path = adapter / "one.gguf"
    write_gguf(member, path, shape, "float32", Options())
    kept = Cache(how.cache, "likelihoods", *_hashes(how, [path]))
    found = kept.load(len(rows), rows, [1.0])
    if found is None:
        with Llama(how.base, [path], context=context, threads=how.threads) as llama:
            found = llama.log_likelihoods(rows, [1.0])
        kept.keep(found, rows, [1.0])
    return -float(np.concatenate(found).mean())


def chosen_rows(
    dataset: Path, columns: Sequence[str] | None, how: Refining
) -> tuple[list[Example], list[Example]]:
    """Rows to choose by, and others held out; drawn with the seed, whatever the dataset's size.

    Raises:
        InvalidDataset: There are fewer than eight rows with answers.
    """
    draw = random.Random(how.seed)
    kept: list[Example] = []
    told = (row for row in examples(dataset, columns=columns) if isinstance(row, Example))
    for number, row in enumerate(row for row in told if row.answer):
        # Reservoir sampling: every row has the same chance, and only some are held.
        if len(kept) < 2 * how.rows:
            kept.append(row)
        elif (place := draw.randrange(number + 1)) < len(kept):
            kept[place] = row
    if len(kept) < 2 * _FEWEST:
        raise InvalidDataset(
            f"`{dataset}`: {len(kept)} rows tell an answer from its question; refining needs "
            f"{2 * _FEWEST} at least, half of them held out"
        )
    draw.shuffle(kept)
    chosen = min(how.rows, len(kept) // 2)
    return kept[:chosen], kept[chosen:]


def answer_ids(tokenizer: Tokenizer, rows: Sequence[Example], end: int | None) -> list[Ids]:
    """The token ids of each row before its answer, and of its answer with the end."""
    found = [pair for batch in tokenizer.token_ids(rows) for pair in batch]
    closing = [] if end is None else [end]
    parted = []
    for ids, start in found:
        answer = ids[start:] if ids[-1:] == closing else ids[start:] + closing
        parted.append((ids[:start], answer))
    return parted


def end_of_answers(base: Path) -> int | None:
    """The token id with which a model ends an answer, if its file says so."""
    end = _core.gguf_metadata(str(base)).get("tokenizer.ggml.eos_token_id")
    return end if isinstance(end, int) else None


def context_of(rows: Sequence[Ids]) -> int:
    """The tokens that a model has to hold at once."""
    longest = max(len(before) + len(answer) for before, answer in rows)
    return -(-(longest + 8) // 256) * 256


def _hashes(how: Refining, paths: Sequence[Path]) -> list[str]:
    """Of the base and of the candidates, where something is kept by them."""
    return [] if how.cache is None else [files.sha256(path) for path in (how.base, *paths)]


def _as_coefficients(
    bank: Bank, job: Job, normalize: str, weights: Floats, near: Sequence[int]
) -> tuple[Floats, tuple[str, ...]]:
    """A mixture as one coefficient for each module of each member, and the modules' patterns."""
    names = sorted({module.name for member in bank.members for module in member.modules})
    names.sort(key=len, reverse=True)  # a name also means those that end with it
    place = {name: i for i, name in enumerate(names)}
    used = [i for i in range(len(bank)) if job.coefficients[i] != 0 or i in near]
    members = [bank.members[i] for i in used]
    plain = [[float(job.coefficients[i])] * len(bank.members[i].modules) for i in used]
    if normalize == "none":
        merged = plain
    else:
        weights_of_base = weight_files(bank.base_weights)
        norms = delta_norms(members, Index.of(bank), base_weights=weights_of_base)
        (merged,) = unit_coefficients([plain], norms)
    table = np.zeros((len(bank), len(names)))
    for i, member, row in zip(used, members, merged, strict=True):
        for module, coefficient in zip(member.modules, row, strict=True):
            table[i, place[module.name]] = weights[0] * coefficient
    for weight, i in zip(weights[1:], near, strict=True):
        for module in bank.members[i].modules:
            table[i, place[module.name]] += weight
    return table, tuple(re.escape(name) for name in names)
