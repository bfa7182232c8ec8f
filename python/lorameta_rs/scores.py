"""How near an answer comes to its reference: Rouge as the paper has it, and whether they agree.

rouge_l      F-measure of the longest common subsequence of words, which are stemmed
rouge_lsum   the same, line by line
exact        1 where both are the same but for white space, also around punctuation
contains     1 where the reference stands in the answer, likewise
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs.errors import MissingExtra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorameta_rs._metrics import Floats

MEASURES = ("rouge_l", "rouge_lsum", "exact", "contains")

_PUNCTUATION = re.compile(r"\s*([^\w\s])\s*")


def scores(references: Sequence[str], answers: Sequence[str]) -> Floats:
    """Each of `MEASURES` of each answer.

    Args:
        references: The right answers.
        answers: Those to be judged, as many.

    Returns:
        float64 [answers, len(MEASURES)], from 0 to 1.

    Raises:
        MissingExtra: `rouge-score` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        what = "scores need rouge-score: pip install 'lorameta-rs[evaluate]'"
        raise MissingExtra(what) from error
    scorer = RougeScorer(["rougeL", "rougeLsum"], use_stemmer=True)
    found = np.zeros((len(references), len(MEASURES)))
    for row, reference, answer in zip(found, references, answers, strict=True):
        rouge = scorer.score(reference, answer)
        wanted, got = normal(reference), normal(answer)
        row[:] = (
            rouge["rougeL"].fmeasure,
            rouge["rougeLsum"].fmeasure,
            wanted == got,
            wanted in got,
        )
    return found


def normal(text: str) -> str:
    r"""A text with single blanks, and none around punctuation.

    >>> normal(" 3 . 5  is\nright !")
    '3.5 is right!'
    """
    return _PUNCTUATION.sub(r"\1", " ".join(text.split()))


def interval(values: Floats, *, seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """Between which two numbers the mean lies in 95 % of the draws of as many rows, with return.

    Args:
        values: One number a row [n].
        seed: Of the draws.
        draws: How many.
    """
    random = np.random.default_rng(seed)
    # Drawn one by one: all at once would take n numbers for each.
    means = [float(random.choice(values, len(values)).mean()) for _ in range(draws)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
