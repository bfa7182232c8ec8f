"""Rouge, matches, and the interval of a mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorameta_rs.scores import MEASURES, interval, normal, scores

pytest.importorskip("rouge_score", reason="rouge-score is not installed")


def lcs(a, b):
    """The length of the longest common subsequence, by the plain recursion."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
            )
    return table[-1, -1]


@given(*[st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta"]), min_size=1)] * 2)
def test_rouge_l_is_that_of_the_longest_common_subsequence(reference, answer):
    common = lcs(reference, answer)
    wanted = 2 * common / (len(reference) + len(answer))
    ((got, *_),) = scores([" ".join(reference)], [" ".join(answer)])
    assert got == pytest.approx(wanted)


def test_matches():
    found = scores(["3.5 is it", "horse cat", "a b"], ["3 . 5  is it", "my horse cat !", "b a"])
    exact, contains = (found[:, MEASURES.index(name)] for name in ("exact", "contains"))
    assert exact.tolist() == [1, 0, 0]
    assert contains.tolist() == [1, 1, 0]
    assert normal("a , b\n c") == "a,b c"


def test_stems_count_as_words():
    assert scores(["running horses"], ["run horse"])[0, 0] == pytest.approx(1)


def test_the_interval_is_seeded_and_around_the_mean():
    values = np.random.default_rng(1).random(200)
    low, high = interval(values)
    assert (low, high) == interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(200), rel=0.15)
    assert interval(np.ones(3)) == (1, 1)
