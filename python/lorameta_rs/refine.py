"""Coefficients made better by what the base model says: a few passes over rows of the new dataset.

The merge that a ranking asks for, a few like it and the nearest members are the candidates.
llama.cpp has them all loaded, each request says how they are mixed, and `search` looks for the
mixture under which the dataset's own answers are likeliest. It is kept where it also is so on rows
that were held out.
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
POWERS = {"(sharper)": 2.0, "(flatter)": 0.5, "(uniform)": 0.0}
"""The other merges, and to which power each has the ranking's coefficients: of a softmin the second
halves the temperature, and the root doubles it."""

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
    """The nearest members that take part, beside the merges."""
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
    """The candidates: `(merge)`, others of `POWERS`, then members."""
    weights: Floats
    """How the candidates are mixed: of the merges but `(merge)` and the best alone."""
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
    near = job.ranking.nearest_first()[: how.candidates]
    merges = merges_of(job.coefficients)
    names = [*merges, *(bank.names[i] for i in near)]
    if how.budget < len(names) + 1:
        raise InvalidSetting(
            f"budget {how.budget}: {len(merges)} merges and {len(near)} members need "
            f"{len(names) + 1} evaluations at least, of each alone and of none\n"
            "give a larger budget, or fewer candidates"
        )
    plain = Options(
        method="svd",
        normalize=normalize,
        rank=options.rank,
        energy=options.energy,
        seed=options.seed,
        memory=options.memory,
        io=options.io,
    )
    jobs = [Job(own, folder / name) for name, own in merges.items()]
    merge(bank, jobs, plain)
    members = [open_adapters(one.out)[0] for one in jobs] + [bank.members[i] for i in near]
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

        mixture = search(look, len(members), how.budget, len(merges))
        alone = np.eye(len(members))[0]
        before = -float(look(alone, held_rows).mean())
    # A mixture is cut to the rank that is written: that is what has to be better.
    merged = np.stack([*merges.values()])
    coefficients, modules = _as_coefficients(bank, merged, normalize, mixture.weights, near)
    cut = Job(coefficients, folder / "mixture", modules=modules)
    merge(bank, [cut], replace(plain, normalize="none"))
    after = _loss(cut.out, shape, how, context, held_rows)
    if progress is not None:
        progress(most, most)
    weights = mixture.weights if after < before else alone
    if weights is alone:
        coefficients, modules = _as_coefficients(bank, merged, normalize, alone, near)
    shares = weights[: len(merges)] @ merged
    shares[near] += weights[len(merges) :]
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


def merges_of(coefficients: Floats) -> dict[str, Floats]:
    """The merges among the candidates, by name: of the coefficients as they are, and of `POWERS`.

    All are of the same members, with the same signs and sum of sizes; one that is as an earlier one
    is left out.

    >>> for name, found in merges_of(np.array([0.8, 0.2, 0.0])).items():
    ...     print(name, found.round(3))
    (merge) [0.8 0.2 0. ]
    (sharper) [0.941 0.059 0.   ]
    (flatter) [0.667 0.333 0.   ]
    (uniform) [0.5 0.5 0. ]
    """
    found = {MERGE: coefficients}
    sizes = np.abs(coefficients) / np.abs(coefficients).max()
    for name, power in POWERS.items():
        raised = np.where(sizes > 0.0, sizes**power, 0.0)
        own = np.copysign(raised, coefficients) * (np.abs(coefficients).sum() / raised.sum())
        alike = 1e-3 * np.abs(coefficients).max()
        if not any(np.allclose(own, other, rtol=0.0, atol=alike) for other in found.values()):
            found[name] = own
    return found


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
    bank: Bank, merges: Floats, normalize: str, weights: Floats, near: Sequence[int]
) -> tuple[Floats, tuple[str, ...]]:
    """A mixture as one coefficient for each module of each member, and the modules' patterns.

    Args:
        bank: Its members.
        merges: The coefficients of the merges that are mixed [merges, members].
        normalize: What each of them does with norms.
        weights: Of the merges, then of the members `near`.
        near: Places of members in the bank.
    """
    names = sorted({module.name for member in bank.members for module in member.modules})
    names.sort(key=len, reverse=True)  # a name also means those that end with it
    place = {name: i for i, name in enumerate(names)}
    used = np.flatnonzero(merges.any(axis=0)).tolist()
    members = [bank.members[i] for i in used]
    summed = [[[float(row[i])] * len(bank.members[i].modules) for i in used] for row in merges]
    if normalize != "none":
        weights_of_base = weight_files(bank.base_weights)
        norms = delta_norms(members, bank.index, base_weights=weights_of_base)
        summed = unit_coefficients(summed, norms)
    table = np.zeros((len(bank), len(names)))
    for weight, rows in zip(weights[: len(merges)], summed, strict=True):
        for i, member, row in zip(used, members, rows, strict=True):
            for module, coefficient in zip(member.modules, row, strict=True):
                table[i, place[module.name]] += weight * coefficient
    for weight, i in zip(weights[len(merges) :], near, strict=True):
        for module in bank.members[i].modules:
            table[i, place[module.name]] += weight
    return table, tuple(re.escape(name) for name in names)
