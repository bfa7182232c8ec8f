"""From distances to coefficients: how much each member of the bank has in the new adapter.

A pipeline takes the new dataset's distances from the n members and gives n coefficients that are
not negative and sum to one (arXiv 2507.01806; `paper` has its authors' own arithmetic).
`select` leaves only some of them; `explicit` takes a user's own weights instead. Pipelines that are
learned from a bank are those of `learned`.
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import paper
from lorameta_rs.errors import InvalidBank, InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from lorameta_rs._metrics import Floats


def attentional(distances: Floats) -> Floats:
    """softmin(d): exp(−d_i) / Σ exp(−d_j), the paper's base version.

    Args:
        distances: The members' distances [n], finite.

    Returns:
        float64 [n], sums to one.

    Raises:
        InvalidBank: There are no distances, or one of them is not finite.

    >>> attentional(np.array([0.0, np.log(3.0)]))
    array([0.75, 0.25])
    """
    return _softmin(_checked(distances))


def normalized(distances: Floats, temperature: float = 1.0) -> Floats:
    """softmin(z / τ) of the standardised distances z = (d − mean) / std.

    Mean and population standard deviation are taken over the n distances and the dataset's own
    zero, as in the authors' rows; a deviation of 0 counts as 1. Of several metrics the z are added
    up: what is far by one of them is far.

    Args:
        distances: The members' distances [n], finite; or those by several metrics [metrics, n].
        temperature: τ > 0: small for the nearest alone, large for all alike; 1 is the paper.

    Returns:
        float64 [n], sums to one.

    Raises:
        InvalidBank: There are no distances, or one of them is not finite.
        InvalidSetting: `temperature` is not a positive, finite number.

    >>> normalized(np.array([1.0, 2.0, 3.0])).round(3)
    array([0.635, 0.259, 0.106])
    """
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise InvalidSetting(f"temperature {temperature}: expected a finite number above 0")
    # The mean shifts all z alike, and softmin does not see it.
    return _softmin(combined(np.atleast_2d(distances)), temperature)


def combined(distances: Floats) -> Floats:
    """Distances by several metrics as one: their sum, each in its own standard deviations.

    Args:
        distances: [metrics, n], finite. The deviations are as in `normalized`.

    Returns:
        float64 [n].

    Raises:
        InvalidBank: There are no distances, or one of them is not finite.

    >>> combined(np.array([[1.0, 2.0, 3.0], [30.0, 20.0, 10.0]])).round(3)
    array([3.578, 3.578, 3.578])
    """
    rows = np.array([np.append(_checked(row), 0.0) for row in distances])
    deviations = rows.std(axis=1, keepdims=True)
    sums: Floats = (rows[:, :-1] / np.where(deviations > 0.0, deviations, 1.0)).sum(axis=0)
    return sums


def combined_rows(matrices: Floats) -> Floats:
    """The bank as each of its members sees it from outside: distances that `combined` makes one.

    Args:
        matrices: `distance.pairwise` of the bank by each metric [metrics, n, n].

    Returns:
        float64 [n, n], row i without regard to member i's distance from itself, which is 0; of a
        single metric its distances as they are.

    Raises:
        InvalidBank: A distance is not finite.
    """
    if len(matrices) == 1:
        return np.asarray(matrices[0])
    n = matrices.shape[-1]
    rows = np.zeros((n, n))
    for i in range(n if n > 1 else 0):
        others = np.arange(n) != i
        rows[i, others] = combined(matrices[:, i, others])
    return rows


def nearest(distances: Floats) -> Floats:
    """All to the nearest member; to the first of them where several are.

    Returns:
        float64 [n], sums to one. Arguments and errors are those of `attentional`.
    """
    only = np.zeros(len(_checked(distances)))
    only[np.argmin(distances)] = 1.0
    return only


def uniform(distances: Floats) -> Floats:
    """The same to every member, whatever its distance: a control.

    Returns:
        float64 [n], sums to one. Arguments and errors are those of `attentional`.
    """
    n = len(_checked(distances))
    return np.full(n, 1.0 / n)


PIPELINES: dict[str, Callable[[Floats], Floats]] = {
    "attentional": attentional,
    "normalized": normalized,
    "nearest": nearest,
    "uniform": uniform,
}


def from_distances(
    distances: Floats,
    pipeline: str = "normalized",
    temperature: float = 1.0,
    compat: str | None = None,
) -> Floats:
    """Coefficients of `distances`, by the pipeline's name.

    Args:
        distances: The members' distances [n], finite; or those by several metrics [metrics, n], of
            which all pipelines but `normalized` take what `combined` makes.
        pipeline: A key of `PIPELINES`.
        temperature: τ of `normalized`; the others have none.
        compat: "paper" for the numbers of the authors' code (`paper`), which has no temperature.

    Returns:
        float64 [n], sums to one.

    Raises:
        InvalidBank: There are no distances, or one of them is not finite.
        InvalidSetting: No such pipeline, or the settings do not go together.
    """
    chosen = paper.choose("pipeline", pipeline, compat, PIPELINES, paper.PIPELINES)
    if chosen is normalized:
        return normalized(distances, temperature)
    if temperature != 1.0:
        of_paper = "" if compat is None else " of the paper"
        raise InvalidSetting(f"pipeline `{pipeline}`{of_paper} has no temperature")
    return chosen(_checked(combined(distances) if distances.ndim == 2 else distances))


def select(
    coefficients: Floats,
    top_k: int | None = None,
    mass: float | None = None,
    similarity: Floats | None = None,
    min_similarity: float | None = None,
) -> Floats:
    """Leave only some coefficients: the others become zero, and the sum one again.

    `min_similarity` says which members may take part, `top_k` how many of these, and `mass` how
    much of what is then left; of equal coefficients the first stay.

    Args:
        coefficients: [n], not negative, as a pipeline gives them.
        top_k: Keep this many of the largest; 1 or more.
        mass: Keep the largest that together hold this share; above 0, 1 at most.
        similarity: The members' similarities [n], None where the metric has none.
        min_similarity: Keep members at least this similar; from 0 to 1.

    Returns:
        float64 [n], sums to one.

    Raises:
        InvalidSetting: A setting is out of range, the metric has no similarity, or no member is
            similar enough.

    >>> select(np.array([0.1, 0.4, 0.3, 0.2]), mass=0.6).round(3)
    array([0.   , 0.571, 0.429, 0.   ])
    """
    kept = coefficients
    if min_similarity is not None:
        kept = np.where(_similar(similarity, min_similarity), kept, 0.0)
    if top_k is not None:
        if top_k < 1:
            raise InvalidSetting(f"top-k {top_k}: expected 1 or more")
        kept = _largest(kept, top_k)
    if mass is not None:
        if not 0.0 < mass <= 1.0:
            raise InvalidSetting(f"mass {mass}: expected a share above 0, 1 at most")
        running = np.cumsum(np.sort(kept)[::-1])
        kept = _largest(kept, int(np.searchsorted(running, mass * running[-1])) + 1)
    total = float(kept.sum())
    if not total > 0.0:
        raise InvalidSetting("the members that are similar enough have no coefficient above 0")
    return kept / total


def explicit(names: Sequence[str], weights: Mapping[str, float], all_zero: bool = False) -> Floats:
    """A user's own weights, in the order of the bank; 0 for members without one.

    Args:
        names: The members' names [n].
        weights: Finite numbers by name, taken as they are: of any sign, and of any sum, and
            within the range of float32, in which adapters are added up.
        all_zero: Let all be zero, as they may be in one module of several.

    Returns:
        float64 [n].

    Raises:
        InvalidSetting: A name is not in the bank, a weight is not finite or out of range, or all
            are zero.

    >>> explicit(["cats", "dogs"], {"dogs": -0.5})
    array([ 0. , -0.5])
    """
    for name, weight in weights.items():
        if name not in names:
            close = difflib.get_close_matches(name, names)
            hint = (
                f"\ndid you mean {' or '.join(f'`{match}`' for match in close)}?" if close else ""
            )
            raise InvalidSetting(f"weight of `{name}`: the bank has no such member{hint}")
        if not math.isfinite(weight):
            raise InvalidSetting(f"weight of `{name}`: {weight} is not a finite number")
        with np.errstate(over="ignore"):
            stored = np.float32(weight)
        if not np.isfinite(stored) or (stored == 0.0) != (weight == 0.0):
            raise InvalidSetting(
                f"weight of `{name}`: {weight} is out of the range of float32, in which adapters "
                "are added up; expected 0, or a size from 1.4e-45 to 3.4e+38"
            )
    if not any(weights.values()) and not all_zero:
        raise InvalidSetting("weights: expected at least one that is not 0")
    return np.array([weights.get(name, 0.0) for name in names], dtype=np.float64)


def _checked(distances: Floats) -> Floats:
    if len(distances) == 0:
        raise InvalidBank("the bank has no members to choose from")
    wrong = np.flatnonzero(~np.isfinite(distances))
    if len(wrong) > 0:
        raise InvalidBank(f"the distance of member {wrong[0]} is {distances[wrong[0]]}")
    return distances


def _softmin(values: Floats, temperature: float = 1.0) -> Floats:
    above = values - values.min()  # 0 for the nearest, so the sum of exponentials is 1 or more
    with np.errstate(over="ignore"):  # beyond the largest float is infinitely far: exp(−∞) is 0
        exponential: Floats = np.exp(-above / temperature)
    return exponential / float(exponential.sum())


def _similar(similarity: Floats | None, least: float) -> NDArray[np.bool_]:
    """Which members are at least that similar."""
    if similarity is None:
        raise InvalidSetting(
            "min-similarity: only the metrics js, relations, cosine and vectors have a similarity"
        )
    if not 0.0 <= least <= 1.0:
        raise InvalidSetting(f"min-similarity {least}: expected a number from 0 to 1")
    enough: NDArray[np.bool_] = similarity >= least
    if not enough.any():
        best = similarity.max()
        raise InvalidSetting(f"min-similarity {least}: the most similar member has {best:.4f}")
    return enough


def _largest(values: Floats, count: int) -> Floats:
    """`values` with all but the `count` largest set to zero; of equal ones the first stay."""
    kept = np.zeros_like(values)
    chosen = np.argsort(-values, kind="stable")[:count]
    kept[chosen] = values[chosen]
    return kept
