"""How good a match a ranking found: the figures that every answer carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs.coefficients import combined_rows

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
    """Its distance, in the metric's unit."""
    percentile: float | None
    """Share of the bank's own datasets, in percent, whose nearest other is nearer than this one is
    to the new dataset; None where the bank's own distances are not known."""
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
    bank_nearest: Floats | None = None,
) -> Relevance:
    """The figures of one ranking.

    Args:
        names: The members' names [n].
        distances: Of the new dataset from the members [n].
        coefficients: What was made of them [n]; negative ones count by their size.
        bank_nearest: `leave_one_out_nearest` of the bank by the same metric, where known.

    >>> found = relevance(["a", "b"], np.array([0.6, 0.5]), np.array([0.5, 0.5]), np.array([0.2]))
    >>> found.nearest, found.percentile, round(found.effective_number, 6)
    ('b', 100.0, 2.0)
    """
    i = int(np.argmin(distances))
    percentile = None
    if bank_nearest is not None and len(bank_nearest) > 0:
        percentile = 100.0 * float(np.mean(bank_nearest < distances[i]))
    return Relevance(names[i], float(distances[i]), percentile, effective_number(coefficients))


def effective_number(coefficients: Floats) -> float:
    """How many members, in equal parts, would be as spread out: exp(H(|c|/Σ|c|))."""
    shares = np.abs(coefficients[coefficients != 0.0])
    shares /= shares.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def leave_one_out_nearest(matrix: Floats) -> Floats:
    """Each dataset's distance to the nearest other of its bank.

    Args:
        matrix: `distance.pairwise` of the bank [n, n]; or by several metrics [metrics, n, n].

    Returns:
        float64 [n]; empty for a bank of one, which has no other.
    """
    n = matrix.shape[-1]
    if n < 2:
        return np.empty(0)
    rows = combined_rows(matrix) if matrix.ndim == 3 else matrix
    others = np.where(np.eye(n, dtype=bool), np.inf, rows)
    return np.asarray(others.min(axis=1))
