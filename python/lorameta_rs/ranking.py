"""The members of a bank beside a new dataset: distances, coefficients, and what they are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import coefficients, distance
from lorameta_rs.index import nearest_distances
from lorameta_rs.relevance import Relevance, relevance

if TYPE_CHECKING:
    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.fingerprint import Fingerprint


@dataclass(frozen=True)
class Settings:
    """How distances become coefficients; the defaults are the paper's best."""

    metric: str = "js"
    """A key of `distance.METRICS`."""
    pipeline: str = "normalized"
    """A key of `coefficients.PIPELINES`."""
    temperature: float = 1.0
    """τ of the pipeline `normalized`."""
    top_k: int | None = None
    """Keep this many of the largest coefficients."""
    mass: float | None = None
    """Keep the largest coefficients that together hold this share."""
    min_similarity: float | None = None
    """Keep members at least this similar, where the metric has a similarity."""
    compat: str | None = None
    """`paper` for the arithmetic of the paper's authors."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a bank says of one dataset; the arrays are in the order of `names`."""

    names: list[str]
    distances: Floats
    similarity: Floats | None
    coefficients: Floats
    relevance: Relevance
    settings: Settings

    def nearest_first(self) -> list[int]:
        """The members' places in `names`, by distance; of equal ones the first comes first."""
        return [int(i) for i in np.argsort(self.distances, kind="stable")]


def rank(bank: Bank, target: Fingerprint, settings: Settings | None = None) -> Ranking:
    """Compare a dataset with the datasets of a bank.

    Args:
        bank: Its members all have fingerprints.
        target: The new dataset's fingerprint, by the bank's tokenizer.
        settings: The metric, and how its distances become coefficients.

    Raises:
        InvalidBank: A member has no fresh fingerprint, or `target` has another vocabulary.
        InvalidSetting: A setting is out of range, or no member is similar enough.
    """
    settings = settings or Settings()
    found = distance.distances(settings.metric, bank.fingerprints, target, settings.compat)
    similarity = distance.similarity(settings.metric, found)
    chosen = coefficients.select(
        coefficients.from_distances(
            found, settings.pipeline, settings.temperature, settings.compat
        ),
        top_k=settings.top_k,
        mass=settings.mass,
        similarity=similarity,
        min_similarity=settings.min_similarity,
    )
    own = nearest_distances(bank, settings.metric) if settings.compat is None else None
    about = relevance(bank.names, found, chosen, own)
    return Ranking(bank.names, found, similarity, chosen, about, settings)
