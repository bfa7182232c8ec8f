"""How good a match a ranking found: the figures that every answer carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorameta_rs._metrics import Floats

FAR = 99.0


@dataclass(frozen=True)
class Relevance:
    """How near the bank comes to a dataset, and how many of its adapters the answer draws on."""

    nearest: str
    """Name of the nearest member."""
    distance: float
    """Its distance, as `Ranking.distances`."""
    percentile: float | None
    """Share of the bank's own datasets, in percent, that are nearer to their nearest other than the
    new dataset is to its own; None where the bank's own distances are not known."""
    effective_number: float
    """exp(H(|c|/Σ|c|)): 1 for one adapter alone, n for n in equal parts."""

    @property
    def warning(self) -> str | None:
        """What to tell the user where no member is close: past the 99th percentile."""
        if self.percentile is None or self.percentile <= FAR:
            return None
        return (
            f"no member of the bank is close: `{self.nearest}` is nearest at {self.distance:.4g}, "
            f"farther than {self.percentile:.0f} % of the bank's datasets are from their nearest"
        )


def relevance(
    names: Sequence[str],
    distances: Floats,
    coefficients: Floats,
    percentile: float | None = None,
) -> Relevance:
    """The figures of one ranking.

    Args:
        names: The members' names [n].
        distances: Of the new dataset from the members [n].
        coefficients: What was made of them [n]; negative ones count by their size.
        percentile: As `percentile` has it.

    >>> found = relevance(["a", "b"], np.array([0.6, 0.5]), np.array([0.5, 0.5]))
    >>> found.nearest, round(found.effective_number, 6)
    ('b', 2.0)
    """
    i = int(np.argmin(distances))
    return Relevance(names[i], float(distances[i]), percentile, effective_number(coefficients))


def percentile(distances: Floats, bank_nearest: Sequence[Floats | None]) -> float | None:
    """How far a dataset is from its bank, beside the bank's own datasets, in percent.

    Args:
        distances: Of the new dataset from the members, by each metric [metrics, n].
        bank_nearest: `leave_one_out_nearest` of the bank by each metric.

    Returns:
        The share of the bank's datasets that are nearer to their nearest other than the new one is
        to its own; the mean over metrics, each in its own unit. None where that is not known.

    >>> percentile(np.array([[0.6, 0.5]]), [np.array([0.2, 0.55])])
    50.0
    """
    known = [own for own in bank_nearest if own is not None and len(own) > 0]
    if len(known) < len(bank_nearest):
        return None
    nearer = [float(np.mean(own < d.min())) for d, own in zip(distances, known, strict=True)]
    return 100.0 * float(np.mean(nearer))


def effective_number(coefficients: Floats) -> float:
    """How many members, in equal parts, would be as spread out: exp(H(|c|/Σ|c|))."""
    sizes = np.abs(coefficients[coefficients != 0.0])
    shares = sizes / sizes.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def leave_one_out_nearest(matrix: Floats) -> Floats:
    """Each dataset's distance to the nearest other of its bank.

    Args:
        matrix: `distance.pairwise` of the bank [n, n].

    Returns:
        float64 [n]; empty for a bank of one, which has no other.
    """
    if len(matrix) < 2:
        return np.empty(0)
    others = np.where(np.eye(len(matrix), dtype=bool), np.inf, matrix)
    return np.asarray(others.min(axis=1))
