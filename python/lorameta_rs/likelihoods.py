"""What a base model says to settings: how likely it finds each member's own answers.

A member's adapter is made of the others, by each of the settings, and the base model tells with it
how likely the answers of the member's dataset are. That is finer and takes less than to have it
answer and to score that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs.errors import InvalidBank, InvalidDataset
from lorameta_rs.evaluate import as_gguf
from lorameta_rs.llama import Llama
from lorameta_rs.merge import Job, Options, merge
from lorameta_rs.ranking import rank
from lorameta_rs.refine import Refining, answer_ids, chosen_rows, context_of, end_of_answers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.member import Member
    from lorameta_rs.ranking import Settings


def losses(
    bank: Bank,
    candidates: Sequence[tuple[Settings, str]],
    members: Sequence[str],
    how: Refining,
    folder: Path,
    progress: Callable[[int, int], object] | None = None,
) -> Floats:
    """The mean of −ln p over the tokens of each member's answers, in nats.

    Args:
        bank: Its members have fingerprints; those that are asked about have datasets.
        candidates: Settings, and what is done with norms.
        members: Those that are asked about, each made of all others.
        how: The base model, and how many rows of each dataset.
        folder: Where adapters are put.
        progress: Told candidates done, over all members, and how many there are.

    Returns:
        float64 [candidates, members].

    Raises:
        InvalidDataset: A dataset has too few rows with answers.
        LoraMetaError: As `rank`, `merge` and `Llama`.
    """
    found = np.zeros((len(candidates), len(members)))
    end = end_of_answers(how.base)
    by_name = {member.name: member for member in bank.members}
    for column, name in enumerate(members):
        data, columns = bank.dataset(by_name[name]), bank.columns_of(by_name[name])
        assert data is not None, "only members with datasets are asked about"
        rows = answer_ids(bank.tokenizer, chosen_rows(data, columns, how)[0], end)
        made = _adapters(bank, by_name[name], candidates, folder / name)
        paths = as_gguf([*made.values()], how.base, folder / name)
        with Llama(how.base, paths, context=context_of(rows), threads=how.threads) as llama:
            for row, (settings, normalize) in enumerate(candidates):
                acting = (replace(settings, scale=1.0), normalize)
                scales = [settings.scale * (one == acting) for one in made]
                said = llama.log_likelihoods(rows, scales)
                found[row, column] = -np.concatenate(said).mean()
                if progress is not None:
                    progress(column * len(candidates) + row + 1, found.size)
    return found


def sample(bank: Bank, count: int, how: Refining) -> list[str]:
    """Members to be asked about, drawn with the seed, of those whose datasets tell answers.

    Raises:
        InvalidBank: There are fewer than two.
    """
    draw = np.random.default_rng(how.seed)
    told = []
    for name in draw.permutation(bank.names).tolist():
        member = bank.members[bank.names.index(name)]
        data = bank.dataset(member)
        if data is None or name in bank.without_answers:
            continue
        try:
            chosen_rows(data, bank.columns_of(member), how)
        except InvalidDataset:
            continue
        told.append(name)
        if len(told) == count:
            break
    if len(told) < 2:
        raise InvalidBank(
            f"`{bank.folder}`: {len(told)} members have datasets with answers to be asked about; "
            "expected two or more"
        )
    return sorted(told)


def _adapters(
    bank: Bank, member: Member, candidates: Sequence[tuple[Settings, str]], folder: Path
) -> dict[tuple[Settings, str], Path]:
    """An adapter for each candidate, but for the scale: which llama.cpp multiplies it with."""
    rest = bank.without([member.name])
    target = bank.fingerprint(member)
    plain = dict.fromkeys((replace(settings, scale=1.0), norms) for settings, norms in candidates)
    made = {}
    for number, (settings, normalize) in enumerate(plain):
        ranking = rank(rest, target, settings)
        made[settings, normalize] = folder / f"candidate{number}"
        job = Job(ranking.coefficients, made[settings, normalize], ranking)
        merge(rest, [job], Options(normalize=normalize))
    return made
