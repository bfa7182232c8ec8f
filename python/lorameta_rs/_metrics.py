"""The five metrics, each in three steps: what the target needs, what a member needs, the distance.

A ranking computes the target's step once, a matrix of all pairs each step once for many targets.
p is a member's distribution, q the target's; `distance` has the functions to call.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorameta_rs.errors import InvalidBank, InvalidDataset

if TYPE_CHECKING:
    from lorameta_rs.fingerprint import Fingerprint, Fingerprints

Floats = NDArray[np.float64]
Target = TypeVar("Target")
Member = TypeVar("Member")

LN2 = math.log(2.0)
KL_SMOOTHING = 1e-10
MMD_WIDTHS = (0.2, 0.5, 0.9, 1.3)


class Row(NamedTuple):
    """One fingerprint: distinct ids, their counts, and the counts' total (exact below 2⁶⁴)."""

    ids: NDArray[np.uint32]
    counts: NDArray[np.uint64]
    total: int

    @property
    def probabilities(self) -> Floats:
        """The counts over their total, float64, one for each of `ids`."""
        return self.counts / self.total

    def dense(self, values: Floats, size: int) -> Floats:
        """`values`, one for each of `ids`, laid out over `size` ids: zero elsewhere."""
        laid_out = np.zeros(size)
        laid_out[self.ids] = values
        return laid_out


def bank_rows(fingerprints: Fingerprints) -> list[Row]:
    """The rows of a bank's fingerprints, as views.

    Raises:
        InvalidBank: A row has no tokens.
    """
    rows = []
    for i, (start, stop) in enumerate(pairwise(fingerprints.indptr.tolist())):
        if start == stop:
            raise InvalidBank(f"fingerprint {i} of the bank has no tokens")
        counts = fingerprints.counts[start:stop]
        rows.append(Row(fingerprints.ids[start:stop], counts, int(counts.sum())))
    return rows


def target_row(target: Fingerprint, fingerprints: Fingerprints) -> Row:
    """The new dataset's row, which fits the bank's.

    Raises:
        InvalidBank: The vocabularies differ.
        InvalidDataset: `target` has no tokens.
    """
    if target.vocab_size != fingerprints.vocab_size:
        raise InvalidBank(
            f"the bank's fingerprints are over {fingerprints.vocab_size} tokens, the dataset's "
            f"over {target.vocab_size}: they come from different tokenizers"
        )
    if len(target.ids) == 0:
        raise InvalidDataset("the dataset's fingerprint has no tokens")
    return Row(target.ids, target.counts, int(target.counts.sum()))


class Metric(ABC, Generic[Target, Member]):
    """A distance between the rows of one bank, and from a target to them."""

    symmetric: ClassVar[bool] = True
    #: Targets that a matrix of all pairs holds at a time, computing a member's step once for all:
    #: few enough for the processor's cache, enough to spare most of the dear steps.
    block: ClassVar[int] = 16

    def __init__(self, bank: Fingerprints) -> None:
        self.vocab_size = bank.vocab_size

    @abstractmethod
    def target(self, row: Row) -> Target:
        """What the distance needs of a target."""

    @abstractmethod
    def member(self, row: Row) -> Member:
        """What the distance needs of a member."""

    @abstractmethod
    def distance(self, target: Target, member: Member) -> float:
        """The distance, exactly 0 for equal distributions."""


def from_target(
    metric: type[Metric[Any, Any]], fingerprints: Fingerprints, target: Fingerprint
) -> Floats:
    """Distances of `target` from each row of `fingerprints`, float64 [n].

    Raises:
        InvalidBank: A row has no tokens, or the vocabularies differ.
        InvalidDataset: `target` has no tokens.
    """
    row, members = target_row(target, fingerprints), bank_rows(fingerprints)
    form = metric(fingerprints)
    seen = form.target(row)
    return np.array([form.distance(seen, form.member(member)) for member in members], np.float64)


class JensenShannon(Metric[tuple[NDArray[np.uint64], int], Row]):
    """½ Σ p ln(2p/(p+q)) + ½ Σ q ln(2q/(p+q)): only the shared ids need a logarithm.

    An id that one of the two lacks adds half its probability times ln 2. The probability that a
    row has outside the shared ids is a quotient of integers, so nothing is lost to cancellation.
    On a shared id, with the larger probability b and the smaller tb, the two terms are
    b (t ln t − (1+t) ln((1+t)/2)) / 2: finite for every t above zero, zero at t = 1, and right
    to many digits just below it, where the logarithms of 2p/(p+q) and 2q/(p+q) would cancel.
    """

    def target(self, row: Row) -> tuple[NDArray[np.uint64], int]:
        counts = np.zeros(self.vocab_size, np.uint64)
        counts[row.ids] = row.counts
        return counts, row.total

    def member(self, row: Row) -> Row:
        return row

    def distance(self, target: tuple[NDArray[np.uint64], int], member: Row) -> float:
        target_counts, target_total = target
        found = target_counts.take(member.ids)
        shared = np.flatnonzero(found != 0)
        a, b = member.counts.take(shared), found.take(shared)
        alone = (member.total - int(a.sum())) / member.total
        alone += (target_total - int(b.sum())) / target_total
        p, q = a / member.total, b / target_total
        larger = np.maximum(p, q)
        t = np.minimum(p, q) / larger
        together = larger * (t * np.log(t) - (1.0 + t) * np.log1p((t - 1.0) / 2.0))
        # The last digit's rounding is all that could leave the range.
        return min(max((LN2 * alone + float(together.sum())) / 2.0, 0.0), LN2)


class KullbackLeibler(Metric[tuple[Floats, float], tuple[NDArray[np.uint32], Floats]]):
    """Σ q ln(q/p) of smoothed distributions (q+ε)/(1+Vε), (p+ε)/(1+Vε): zero where both have none.

    ln((q+ε)/(p+ε)) = ln(1+q/ε) − ln(1+p/ε), so the sum over the vocabulary is one over the
    target's own ids, the same for all members, less one over the member's ids.
    """

    symmetric = False

    def target(self, row: Row) -> tuple[Floats, float]:
        smoothed = row.dense(row.probabilities, self.vocab_size) + KL_SMOOTHING
        return smoothed, self._cross(smoothed, self.member(row))

    def member(self, row: Row) -> tuple[NDArray[np.uint32], Floats]:
        return row.ids, np.log1p(row.probabilities / KL_SMOOTHING)

    def distance(
        self, target: tuple[Floats, float], member: tuple[NDArray[np.uint32], Floats]
    ) -> float:
        smoothed, own = target
        difference = own - self._cross(smoothed, member)
        # A divergence is not negative; a difference of rounded sums can be.
        return max(difference, 0.0) / (1.0 + self.vocab_size * KL_SMOOTHING)

    @staticmethod
    def _cross(smoothed: Floats, member: tuple[NDArray[np.uint32], Floats]) -> float:
        ids, logarithms = member
        return float((smoothed.take(ids) * logarithms).sum())


class Wasserstein(Metric[Floats, Floats]):
    """Σ |CDF_p − CDF_q| over the ids: the area between two step functions."""

    def target(self, row: Row) -> Floats:
        levels = np.concatenate([[0.0], np.cumsum(row.counts) / row.total])
        edges = np.concatenate([[0], row.ids.astype(np.int64), [self.vocab_size]])
        return np.repeat(levels, np.diff(edges))

    def member(self, row: Row) -> Floats:
        return self.target(row)

    def distance(self, target: Floats, member: Floats) -> float:
        difference = target - member
        return float(np.abs(difference, out=difference).sum())


class MaximumMeanDiscrepancy(Metric[Floats, Floats]):
    """(p−q)ᵀ K (p−q), K[x, y] = Σ_a a²/(a² + (x−y)²): K is Toeplitz, so a Fourier series has it.

    K is the corner of a circulant matrix of at least twice its size, whose eigenvalues λ are the
    transform of one row; by Parseval the form is Σ λ |p̂ − q̂|² / size, the squared length of a
    difference of two vectors, which cannot be negative.
    """

    block = 32

    def __init__(self, bank: Fingerprints) -> None:
        super().__init__(bank)
        self.size = 1 << (2 * self.vocab_size - 2).bit_length()
        around = np.arange(self.size)
        # The kernel falls off so fast that λ is above 1.9 whatever the size: its root is real.
        eigenvalues = np.fft.rfft(mmd_kernel(np.minimum(around, self.size - around))).real
        frequencies = np.arange(len(eigenvalues))
        twice = (frequencies > 0) & (frequencies < self.size - frequencies)  # and its conjugate
        self.weights = np.sqrt(np.where(twice, 2.0, 1.0) * eigenvalues / self.size)
        self.difference = np.empty(2 * len(eigenvalues))  # reused: a new one a pair is slow

    def target(self, row: Row) -> Floats:
        probabilities = row.dense(row.probabilities, self.vocab_size)
        spectrum = np.fft.rfft(probabilities, self.size) * self.weights
        return spectrum.view(np.float64)

    def member(self, row: Row) -> Floats:
        return self.target(row)

    def distance(self, target: Floats, member: Floats) -> float:
        np.subtract(target, member, out=self.difference)
        return float(np.square(self.difference, out=self.difference).sum())


def mmd_kernel(lag: NDArray[np.int64]) -> Floats:
    """The paper's kernel of two token ids that are `lag` apart: 4 at 0, about 2.99/lag² far out."""
    squared = np.square(lag.astype(np.float64))
    return sum((a * a / (a * a + squared) for a in MMD_WIDTHS), start=np.zeros(lag.shape))


class Weighted(NamedTuple):
    """TF-IDF weights, of each id (or of all, dense, in a target), and their squared length."""

    weights: Floats
    ids: NDArray[np.uint32]
    square: float


class Cosine(Metric[Weighted, Weighted]):
    """1 − ⟨u, v⟩/‖u‖‖v‖, u = counts · idf, idf = ln((1+n)/(1+df)) + 1 over the bank's n rows."""

    def __init__(self, bank: Fingerprints) -> None:
        super().__init__(bank)
        frequency = np.zeros(self.vocab_size)
        for row in bank_rows(bank):
            frequency[row.ids] += 1
        self.idf = np.log((1 + len(bank)) / (1 + frequency)) + 1.0

    def target(self, row: Row) -> Weighted:
        member = self.member(row)
        return member._replace(weights=row.dense(member.weights, self.vocab_size))

    def member(self, row: Row) -> Weighted:
        weights = row.probabilities * self.idf.take(row.ids)
        return Weighted(weights, row.ids, float(np.square(weights).sum()))

    def distance(self, target: Weighted, member: Weighted) -> float:
        product = float((target.weights.take(member.ids) * member.weights).sum())
        # One root of both squares: for equal rows it is their product again, and the cosine 1.
        # Rounding can make a cosine larger than 1 by its last digit.
        return max(1.0 - product / math.sqrt(target.square * member.square), 0.0)


METRICS: dict[str, type[Metric[Any, Any]]] = {
    "js": JensenShannon,
    "kl": KullbackLeibler,
    "wasserstein": Wasserstein,
    "mmd": MaximumMeanDiscrepancy,
    "cosine": Cosine,
}
