"""How a dataset's answers come from their inputs: counts of a few relations between tokens.

Token counts say what a dataset speaks of, not what it does: tasks that reverse, filter or classify
the same words have much the same histogram. What tells them apart is where an answer's tokens come
from. Each token of an answer is one of

    q1 … q4      the answer's first token out of the input: in which quarter of it that stands
    next, same   of a later one: behind the place of the one before, or that place again
    ahead, back  or farther on in the input, or farther back (the nearest to `next` counts)
    definition   in no input, but in what all inputs begin with
    new          in neither

and each answer has a length, in powers of two. No token id is among them, so what is learned of
animals holds for tools.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

_QUARTERS = 4
_LONGEST = 15

NAMES = (
    *(f"q{quarter}" for quarter in range(1, _QUARTERS + 1)),
    *("next", "same", "ahead", "back", "definition", "new"),
    *(f"length up to {1 << power}" for power in range(_LONGEST)),
    "longer",
)
"""What is counted, in the order of the counts."""

_INDEX = {name: index for index, name in enumerate(NAMES)}
_LENGTHS = _INDEX["length up to 1"]


class Relations:
    """The counts of a dataset, a batch of rows at a time.

    Attributes:
        counts: One number for each of `NAMES`; all zero while no row had an answer.
        definition: The tokens with which all inputs so far begin; None while there were none. It
            may still shrink with the next batch, whose rows alone then are counted by the shorter.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.uint64] = np.zeros(len(NAMES), np.uint64)
        self.definition: list[int] | None = None

    def add(self, rows: Iterable[tuple[list[int], int]]) -> None:
        """Count some rows: of each the token ids, and at which of them its answer begins.

        >>> one, relations = [0, 7, 8, 9, 9, 8, 7], Relations()
        >>> relations.add([(one, 4), ([0, 5, 6, 6], 3)])
        >>> {name: int(n) for name, n in zip(NAMES, relations.counts, strict=True) if n}
        {'q3': 2, 'back': 2, 'length up to 1': 1, 'length up to 4': 1}
        """
        parted = [(ids[:start], ids[start:]) for ids, start in rows if start < len(ids)]
        if not parted:
            return
        definition = parted[0][0] if self.definition is None else self.definition
        for before, _ in parted:
            definition = _shared(definition, before)
        self.definition = definition
        words = set(definition)
        found: list[int] = []
        for before, answer in parted:
            found += _relations(words, before[len(definition) :], answer)
            found.append(_LENGTHS + min((len(answer) - 1).bit_length(), _LONGEST))
        self.counts += np.bincount(found, minlength=len(NAMES)).astype(np.uint64)


def _shared(one: list[int], other: Sequence[int]) -> list[int]:
    """The tokens with which both begin."""
    differ = (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return one[: next(differ, min(len(one), len(other)))]


def _relations(definition: set[int], before: Sequence[int], answer: Sequence[int]) -> list[int]:
    """One index into `NAMES` for each token of an answer."""
    places: dict[int, list[int]] = {}
    for place, token in enumerate(before):
        places.setdefault(token, []).append(place)
    found = []
    last = None
    for token in answer:
        if token not in places:
            found.append(_INDEX["definition" if token in definition else "new"])
            continue
        if last is None:
            last = places[token][0]
            found.append(_QUARTERS * last // len(before))
            continue
        place = _nearest(places[token], last + 1)
        step = {last + 1: "next", last: "same"}.get(place, "ahead" if place > last else "back")
        found.append(_INDEX[step])
        last = place
    return found


def _nearest(places: Sequence[int], wanted: int) -> int:
    """The one of ascending places that is nearest to the one wanted; of two the first."""
    i = bisect_left(places, wanted)
    around = places[max(i - 1, 0) : i + 1]
    return min(around, key=lambda place: abs(place - wanted))
