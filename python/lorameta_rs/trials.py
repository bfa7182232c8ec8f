"""Which settings suit a bank: each member's ΔW made of the others, by many settings, and compared.

What a sum of the others is like beside the member's own ΔW follows from the Gram matrices alone:
with W the coefficients times norms, ‖Σ W_i X_i − X_j‖² = WᵀGW − 2 (GW)_j + G_jj. So one pass over
the bank tells the error and the cosine of every setting. What is learned from the bank (`learned`)
is learned without a quarter of the members, four times over, and asked about that quarter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import closed_forms, coefficients, distance, neural
from lorameta_rs.errors import InvalidBank
from lorameta_rs.ranking import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from lorameta_rs._metrics import Floats
    from lorameta_rs.fingerprint import Fingerprints

    Places = NDArray[np.integer]

# Without `relations,js:answer`, whose sums are as near and answer worse (docs/quality.md).
METRICS = (
    *("relations,mmd", "relations,js", "relations,cosine"),
    *("relations,mmd:answer", "relations,js:bigrams"),
    *("relations", "js", "mmd", "cosine"),
)
"""What is tried, as far as it says anything of the bank's datasets: the default first."""
TEMPERATURES = (1.0, 0.5, 0.7, 1.5, 2.0)
TOP_K = (3, 8)
WIDTH = 64
"""Of the network, unless another is asked for."""

_FOLDS = 4
_FEWEST = 4
# For so many members coefficients of each module, which are there to be compared, take minutes.
_FEW = 100
# A function of one number needs no more; the pairs among them are what training takes time for.
_TEACHERS = 64
# A difference of means that chance makes in one of twenty cases.
_ERRORS = 2.0


@dataclass(frozen=True, eq=False)
class Tried:
    """One way to make coefficients, and how near it came to each member's own ΔW."""

    settings: Settings
    normalize: str
    """One of `merge.NORMALIZATIONS`."""
    cosine: Floats
    """Between the sum and the ΔW of each member that has one; 0 where the sum is nothing."""
    error: Floats
    """‖sum − ΔW‖ / ‖ΔW‖ of these members."""
    scale: float
    """With which the mean of the squared errors would be least."""
    of_modules: bool = False
    """Whether each module had coefficients of its own: `rank` and `merge` do not offer that."""


def trials(
    modules: Sequence[Floats],
    distances: Mapping[str, Floats],
    metrics: Sequence[str],
    width: int = WIDTH,
    taught: Sequence[str] = (),
) -> tuple[list[Tried], dict[str, neural.Weights]]:
    """Try all settings on a bank.

    Args:
        modules: The Gram matrix of each module [n, n], n of four or more.
        distances: The members' from each other, by each single metric [n, n].
        metrics: Those to be tried, each with its parts separated by commas. What is learned is
            tried with the first, and with that which did best without.
        width: Of the networks.
        taught: Of the metrics those with which it is tried too.

    Returns:
        What came of each, first of the first metric as the defaults have it; and the networks by
        their metrics, taught by all members.

    Raises:
        InvalidBank: There are fewer than four members, or fewer whose ΔW is not zero.
    """
    n = len(modules[0])
    if n < _FEWEST:
        raise InvalidBank(f"{n} members: calibrating needs {_FEWEST} at least, each left out once")
    able = int(np.count_nonzero(_squared_norms(modules)))
    if able < _FEWEST:
        raise InvalidBank(
            f"ΔW is zero in {n - able} of {n} members, with which no sum can be compared: "
            f"calibrating needs {_FEWEST} others at least"
        )
    modules = [gram for gram in modules if np.trace(gram) > 0.0]  # the others have no inverse
    found = []
    for settings, rows in _plain(distances, metrics, n):
        found += [_scored(modules, [rows], settings, norms) for norms in ("unit", "none")]
    networks: dict[str, neural.Weights] = {}
    unit = closed_forms.unit_gram(modules)
    of_modules = [
        closed_forms.unit_gram([gram]) for gram in modules if len(modules) > 1 and n < _FEW
    ]
    best = max(found, key=lambda one: float(one.cosine.mean())).settings.metric
    for metric in dict.fromkeys([metrics[0], *taught, best]):
        parts = metric.split(distance.SEPARATOR)
        seen = coefficients.combined_rows(np.stack([distances[part] for part in parts]))
        networks[metric] = _network(seen, unit, np.arange(n), width)
        learned = [(Settings(metric=metric, pipeline="neural"), [_by_networks(seen, unit, width)])]
        for name, form in (("ridge", closed_forms.ridge), ("simplex", closed_forms.simplex)):
            settings = Settings(metric=metric, pipeline=name)
            learned += [
                (
                    settings,
                    [form(gram, _by_others(seen, gram), leave_one_out=True) for gram in grams],
                )
                for grams in ([unit], *([of_modules] if of_modules else []))
            ]
        found += [_scored(modules, rows, settings, "unit") for settings, rows in learned]
    return found, networks


def chosen(scores: Floats) -> int:
    """The best of several, if it is better than the first beyond doubt; else the first.

    Args:
        scores: Of each one for each member [candidates, n]; more is better. Beyond doubt is by two
            standard errors of the paired differences.
    """
    gains = scores - scores[0]
    best = int(np.argmax(gains.mean(axis=1)))
    return best if gains[best].mean() > _ERRORS * standard_error(gains[best]) else 0


def standard_error(values: Floats) -> float:
    """Of the mean of some values."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def applicable(metrics: Sequence[str], fingerprints: Fingerprints) -> list[str]:
    """The metrics with what says something of these datasets; each once."""
    found = []
    for metric in metrics:
        try:
            found.append(distance.SEPARATOR.join(distance.applicable(metric, fingerprints)))
        except InvalidBank:
            continue
    return list(dict.fromkeys(found))


def _plain(
    distances: Mapping[str, Floats], metrics: Sequence[str], n: int
) -> Iterator[tuple[Settings, Floats]]:
    """The settings that need nothing learned, each with a row of coefficients for each member."""
    for metric in metrics:
        several = np.stack([distances[part] for part in metric.split(distance.SEPARATOR)])
        ways = [Settings(metric=metric, temperature=tau) for tau in TEMPERATURES]
        ways += [Settings(metric=metric, top_k=k) for k in TOP_K if k < n - 1]
        ways += [Settings(metric=metric, pipeline="nearest")]
        if len(several) == 1:
            ways.append(Settings(metric=metric, pipeline="attentional"))
        for settings in ways:
            yield settings, _rows(several, settings)
    yield Settings(metric=metrics[0], pipeline="uniform"), (1 - np.eye(n)) / (n - 1)


def _rows(several: Floats, settings: Settings) -> Floats:
    """Each member's coefficients of the others, itself at 0."""
    n = several.shape[-1]
    rows = np.zeros((n, n))
    for i in range(n):
        others = np.arange(n) != i
        found = several[:, i, others]
        c = coefficients.from_distances(
            found[0] if len(found) == 1 else found, settings.pipeline, settings.temperature
        )
        rows[i, others] = coefficients.select(c, top_k=settings.top_k)
    return rows


def _scored(
    modules: Sequence[Floats], rows: Sequence[Floats], settings: Settings, normalize: str
) -> Tried:
    """How near sums come: of the same coefficients in all modules, or of each module's own."""
    n = len(modules[0])
    square, product = np.zeros((2, n))
    for gram, c in zip(modules, rows if len(rows) > 1 else list(rows) * len(modules), strict=True):
        weights = _of_unit_norm(c, gram) if normalize == "unit" else c
        beside = weights @ gram
        square += np.sum(beside * weights, axis=1)
        product += np.diag(beside)
    norm = _squared_norms(modules)
    some = norm > 0.0
    square, product, norm = square[some], product[some], norm[some]
    both = np.sqrt(np.maximum(square * norm, 0.0))
    cosine = np.divide(product, both, out=np.zeros_like(both), where=both > 0.0)
    error = np.sqrt(np.maximum(square - 2.0 * product + norm, 0.0) / norm)
    total = float(np.sum(square / norm))
    scale = float(np.sum(product / norm)) / total if total > 0.0 else 1.0
    return Tried(settings, normalize, cosine, error, scale, len(rows) > 1)


def _squared_norms(modules: Sequence[Floats]) -> Floats:
    """‖ΔW‖² of each member, over all modules [n]."""
    squares: Floats = np.sum([np.maximum(np.diag(gram), 0.0) for gram in modules], axis=0)
    return squares


def _of_unit_norm(rows: Floats, gram: Floats) -> Floats:
    """Coefficients in one module as `sums.unit_coefficients` makes them, for many sums."""
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0.0)
    size = np.abs(rows)
    total = size @ (norms > 0.0)
    mean = np.divide(size @ norms, total, out=np.zeros_like(total), where=total > 0.0)
    weights: Floats = rows * inverse * mean[:, None]
    return weights


def _network(seen: Floats, gram: Floats, members: Places, width: int) -> neural.Weights:
    """A network that some members taught."""
    if len(members) > _TEACHERS:
        members = np.sort(np.random.default_rng(0).choice(members, _TEACHERS, replace=False))
    start = neural.initial_weights(width, dtype=np.float32)
    return neural.train(seen, gram, 1, start, members=members.tolist()).weights


def _folds(n: int) -> Iterator[tuple[Places, Places]]:
    """Members that are asked about, and the others, which teach."""
    places = np.arange(n)
    for fold in range(_FOLDS):
        yield np.flatnonzero(places % _FOLDS == fold), np.flatnonzero(places % _FOLDS != fold)


def _by_networks(seen: Floats, gram: Floats, width: int) -> Floats:
    n = len(gram)
    rows = np.zeros((n, n))
    for asked, teachers in _folds(n):
        weights = _network(seen, gram, teachers, width)
        for i in asked:
            others = np.arange(n) != i
            rows[i, others] = neural.coefficients(weights, seen[i, others])
    return rows


def _by_others(seen: Floats, gram: Floats) -> Floats:
    """The inner products that each member can be expected to have with the others."""
    products = np.zeros_like(gram)
    for asked, teachers in _folds(len(gram)):
        known = np.ix_(teachers, teachers)
        products[asked] = closed_forms.expected_products(seen[known], gram[known], seen[asked])
    return products
