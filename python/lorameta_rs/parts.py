"""Histograms of parts of a dataset, beside that of all of it.

    definition   the tokens with which all inputs begin, once
    input        what comes behind that, of every row
    answer       the answers
    bigrams      pairs of neighbours in all rows, hashed into 4,096 buckets

The first three are of the rows whose answers are told apart, the first 4,096, and are missing where
a dataset has no such rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors

from lorameta_rs import files
from lorameta_rs.errors import InvalidBank

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

PARTS = ("definition", "input", "answer", "bigrams")
BUCKETS = 1 << 12

_MIX = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B)  # of Knuth's and Murmur's multiplicative hashes


class Histogram(NamedTuple):
    """Distinct ids, ascending, and how often each occurs."""

    ids: NDArray[np.uint32]
    counts: NDArray[np.uint64]

    @classmethod
    def of(cls, counts: Ids) -> Histogram:
        """That of counts by id."""
        ids = np.flatnonzero(counts)
        return cls(ids.astype(np.uint32), counts[ids].astype(np.uint64))

    def check(self, size: int) -> None:
        """See that ids and counts belong together, and ids are below `size`; else `ValueError`."""
        ids, counts = self
        if len(ids) != len(counts) or len(ids) == 0:
            raise ValueError(f"{len(ids)} ids with {len(counts)} counts")
        if ids[-1] >= size or not (ids[:-1] < ids[1:]).all():
            raise ValueError(f"its ids do not ascend, or reach past the vocabulary of {size}")
        # As floats, because a sum of hostile counts could wrap around to the right one.
        if not counts.all() or counts.sum(dtype=np.float64) >= 2**63:
            raise ValueError("its counts are not those of tokens")


class Parts:
    """The counts of a dataset, a batch of rows at a time."""

    def __init__(self, vocab_size: int) -> None:
        self.before, self.answers = np.zeros((2, vocab_size), np.int64)
        self.bigrams = np.zeros(BUCKETS, np.int64)
        self.rows = 0

    def add(self, rows: Sequence[tuple[list[int], int]], ids: Ids) -> None:
        """Count some rows: of each the token ids, and at which of them its answer begins.

        Args:
            rows: The rows.
            ids: All of their token ids, one row behind the other.
        """
        told = [(row, start) for row, start in rows if start < len(row)]
        if told:
            size = len(self.before)
            self.rows += len(told)
            self.before += _counted((row[:start] for row, start in told), size)
            self.answers += _counted((row[start:] for row, start in told), size)
        within = np.ones(max(len(ids) - 1, 0), dtype=bool)
        lasts = np.cumsum([len(row) for row, _ in rows]) - 1
        within[lasts[(lasts >= 0) & (lasts < len(within))]] = False
        self.bigrams += np.bincount(buckets(ids)[within], minlength=BUCKETS)

    def histograms(self, definition: Sequence[int] | None) -> dict[str, Histogram]:
        """Those that are not empty, of `PARTS`.

        Args:
            definition: The tokens with which all inputs begin; None where no answers are told.
        """
        once = np.bincount(np.array(definition or [], np.int64), minlength=len(self.before))
        counts = (once, self.before - self.rows * once, self.answers, self.bigrams)
        found = {name: Histogram.of(own) for name, own in zip(PARTS, counts, strict=True)}
        return {name: own for name, own in found.items() if len(own.ids)}


class StoredParts(Mapping[str, Histogram]):
    """The parts that a fingerprint's file has, read when they are asked for: few ever are."""

    def __init__(self, path: Path, names: tuple[str, ...], vocab_size: int) -> None:
        self.path = path
        self.names = names
        self.vocab_size = vocab_size

    def __getitem__(self, name: str) -> Histogram:
        """The histogram; `KeyError` where there is none.

        Raises:
            MissingFile, UnreadableFile: the file cannot be read any more.
            InvalidBank: it is broken.
        """
        if name not in self.names:
            raise KeyError(name)
        try:
            with files.reading(self.path), safetensors.safe_open(self.path, "numpy") as content:
                ids = vector(content, f"{name}.ids", "U32")
                counts = vector(content, f"{name}.counts", "U64")
            found = Histogram(ids, counts)
            found.check(BUCKETS if name == "bigrams" else self.vocab_size)
        except (safetensors.SafetensorError, ValueError) as error:
            raise InvalidBank(f"`{self.path}`: its `{name}` is broken: {error}") from error
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def vector(content: Any, name: str, dtype: str) -> NDArray[Any]:
    """The tensor `name`; its type is looked at first, as numpy lacks some that a file may have."""
    view = content.get_slice(name)
    if view.get_dtype() != dtype or len(view.get_shape()) != 1:
        raise ValueError(f"`{name}` is {view.get_dtype()} {view.get_shape()}, expected {dtype} [n]")
    vector: NDArray[Any] = content.get_tensor(name)
    return vector


def buckets(ids: Ids) -> Ids:
    """The bucket of each id with the one behind it: a hash of both, the same everywhere."""
    words = ids.astype(np.uint32)
    hashed = (words[:-1] * _MIX[0] + words[1:]) * _MIX[1]
    return (hashed >> np.uint32(20)).astype(np.int64)


def _counted(rows: Iterable[list[int]], size: int) -> Ids:
    return np.bincount(np.fromiter(chain.from_iterable(rows), np.int64), minlength=size)
