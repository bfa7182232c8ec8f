"""The members of a bank beside a new dataset: distances, coefficients, and what they are worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import coefficients, distance, learned
from lorameta_rs.errors import InvalidSetting
from lorameta_rs.index import nearest_distances
from lorameta_rs.relevance import Relevance, percentile, relevance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.fingerprint import Fingerprint


@dataclass(frozen=True)
class Settings:
    """How distances become coefficients; the defaults are what did best (docs/quality.md)."""

    metric: str = "relations,mmd"
    """A key of `distance.METRICS`, or several, separated by commas: their distances are added up
    in standard deviations, without those that have nothing to say of a dataset."""
    pipeline: str = "normalized"
    """A key of `coefficients.PIPELINES`, or one of `learned.PIPELINES`."""
    temperature: float = 1.0
    """τ of the pipeline `normalized`."""
    top_k: int | None = None
    """Keep this many of the largest coefficients."""
    mass: float | None = None
    """Keep the largest coefficients that together hold this share."""
    min_similarity: float | None = None
    """Keep members at least this similar, where the metric has a similarity."""
    scale: float = 1.0
    """What the coefficients are multiplied with at last."""
    compat: str | None = None
    """`paper` for the arithmetic of the paper's authors."""

    @classmethod
    def paper(cls) -> Settings:
        """The paper's best setting; beside it belongs `merge.Options.paper`."""
        return cls(metric="js")


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a bank says of one dataset; the arrays are in the order of `names`."""

    names: list[str]
    distances: Floats
    """By the metric; of several metrics what `coefficients.combined` makes."""
    similarity: Floats | None
    """Of several metrics that of `js`."""
    coefficients: Floats
    relevance: Relevance
    settings: Settings
    """With the metrics that had something to say."""
    note: str | None = None
    """Which metric had nothing to say, and of what; None if all had."""
    calibrated: bool = False
    """Whether the settings are those that the bank was calibrated to."""

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
        InvalidBank: A member has no fresh fingerprint, `target` has another vocabulary, none of the
            metrics has anything to say, or what was learned from the bank does not fit it.
        MissingFile: The pipeline is learned, and nothing was yet.
        InvalidSetting: A setting is out of range, or no member is similar enough.
    """
    settings = settings or Settings()
    bank_counts, compat = bank.fingerprints, settings.compat
    metrics = distance.applicable(settings.metric, bank_counts, target)
    asked = settings.metric
    settings = replace(settings, metric=distance.SEPARATOR.join(metrics))
    every = np.stack([distance.distances(name, bank_counts, target, compat) for name in metrics])
    found = every[0] if len(metrics) == 1 else every
    likened = metrics[0] if len(metrics) == 1 else "js"
    alike = distance.distances(likened, bank_counts, target, compat)
    similarity = distance.similarity(likened, alike)
    combined = coefficients.combined(every) if len(metrics) > 1 else found
    if settings.pipeline in learned.PIPELINES:
        chosen = _learned(bank, settings, combined, similarity)
    else:
        chosen = _selected(
            coefficients.from_distances(found, settings.pipeline, settings.temperature, compat),
            settings,
            similarity,
        )
    chosen = chosen * _checked_scale(settings.scale)
    own = [None if compat is not None else nearest_distances(bank, name) for name in metrics]
    about = relevance(bank.names, combined, chosen, percentile(every, own))
    note = _note(asked, metrics, bank, target)
    return Ranking(bank.names, combined, similarity, chosen, about, settings, note)


def _learned(
    bank: Bank, settings: Settings, distances: Floats, similarity: Floats | None
) -> Floats:
    """The coefficients of a pipeline that the bank has taught."""
    pipeline = settings.pipeline
    if settings.temperature != 1.0 or settings.compat is not None:
        raise InvalidSetting(f"pipeline `{pipeline}` has no temperature, and no `compat`")
    found = learned.Learned.of(bank).coefficients(pipeline, settings.metric, distances)
    if pipeline != "ridge":
        return _selected(found, settings, similarity)
    if (settings.top_k, settings.mass, settings.min_similarity) != (None, None, None):
        raise InvalidSetting(
            "pipeline `ridge`: none of its coefficients can be left out, which have any sign and "
            "sum; `simplex` has shares"
        )
    return found


def _selected(found: Floats, settings: Settings, similarity: Floats | None) -> Floats:
    return coefficients.select(
        found,
        top_k=settings.top_k,
        mass=settings.mass,
        similarity=similarity,
        min_similarity=settings.min_similarity,
    )


def _checked_scale(scale: float) -> float:
    if not (math.isfinite(scale) and scale > 0.0):
        raise InvalidSetting(f"scale {scale}: expected a finite number above 0")
    return scale


def _note(asked: str, metrics: Sequence[str], bank: Bank, target: Fingerprint) -> str | None:
    """What metrics cannot say of these datasets, and why."""
    names = [name.strip() for name in asked.split(distance.SEPARATOR)]
    idle = [f"`{name}`" for name in names if name not in metrics]
    without = bank.without_answers
    if not idle and not ("relations" in metrics and without):
        return None
    if target.relations is None:
        why = "the new dataset's rows do not tell answers from inputs"
    elif without:
        first, *others = without
        more = f" and {len(others)} others" if others else ""
        why = f"the rows of `{first}`{more} do not tell answers from inputs"
    else:
        why = "a dataset has no such part"
    what = f"{', '.join(idle)} {'is' if len(idle) == 1 else 'are'} left out"
    if not idle:
        what = "`relations` finds nothing in common with some members"
    return f"{what}: {why}"
