"""Relations between the tokens of answers and inputs, against a plain count."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorameta_rs.relations import NAMES, Relations

tokens = st.lists(st.integers(0, 9), max_size=12)
rows = st.lists(st.tuples(tokens, tokens.filter(bool)), min_size=1, max_size=6)


def counted(*batches):
    relations = Relations()
    for batch in batches:
        relations.add([(before + answer, len(before)) for before, answer in batch])
    return relations


def named(relations):
    return {name: int(n) for name, n in zip(NAMES, relations.counts, strict=True) if n}


def plain(rows):
    """The same by looking through the whole input for each token."""
    inputs = [before for before, _ in rows]
    shared = 0
    while all(len(one) > shared and one[shared] == inputs[0][shared] for one in inputs):
        shared += 1
    counts = dict.fromkeys(NAMES, 0)
    for before, answer in rows:
        own, last = before[shared:], None
        for token in answer:
            places = [i for i, other in enumerate(own) if other == token]
            if not places:
                counts["definition" if token in before[:shared] else "new"] += 1
                continue
            if last is None:
                last = places[0]
                counts[f"q{1 + 4 * last // len(own)}"] += 1
                continue
            place = min(places, key=lambda i: (abs(i - last - 1), i))
            counts[
                "next"
                if place == last + 1
                else "same"
                if place == last
                else "ahead"
                if place > last
                else "back"
            ] += 1
            last = place
        power = 0
        while 2**power < len(answer):
            power += 1
        counts[f"length up to {2**power}"] += 1
    return {name: count for name, count in counts.items() if count}


@given(rows)
def test_the_counts_are_those_of_a_plain_search(rows):
    assert named(counted(rows)) == plain(rows)


@given(rows, st.permutations(range(10)))
def test_no_token_id_matters(rows, other):
    renamed = [([other[i] for i in a], [other[i] for i in b]) for a, b in rows]
    assert named(counted(renamed)) == named(counted(rows))


def test_what_a_task_does_can_be_told():
    definition = [90, 91, 92]
    words = [[10, 11, 12, 13], [20, 21, 22, 23]]
    rows = [definition + one for one in words]
    copy = counted([(row, one) for row, one in zip(rows, words, strict=True)])
    assert named(copy) == {"q1": 2, "next": 6, "length up to 4": 2}
    back = counted([(row, one[::-1]) for row, one in zip(rows, words, strict=True)])
    assert named(back) == {"q4": 2, "back": 6, "length up to 4": 2}
    label = counted([(row, [91]) for row in rows])
    assert named(label) == {"definition": 2, "length up to 1": 2}


def test_a_later_batch_may_share_less_of_the_definition():
    relations = counted([([1, 2, 3], [9]), ([1, 2, 4], [9])], [([1, 5], [2])])
    assert relations.definition == [1]
    assert named(relations) == {"new": 3, "length up to 1": 3}


def test_rows_without_answers_count_nothing():
    relations = counted([])
    relations.add([([1, 2], 2), ([], 0)])
    assert relations.definition is None
    assert not relations.counts.any()


def test_a_long_answer():
    relations = counted([([1] * 50, [1] * 70_000)])
    assert named(relations)["longer"] == 1
    assert relations.counts.dtype == np.uint64
