"""`compat="paper"`: the distances and coefficients that the authors' own code computes.

Its arithmetic (of arXiv 2507.01806, their repository at commit 855cba30) is not that of the
formulas in places that change the numbers; here each place is kept, and named. Distances and
coefficients are stored as float32 there, and are rounded to it here. `distance` and `coefficients`
have the formulas, and say what is taken, returned and refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from lorameta_rs._metrics import (
    MMD_WIDTHS,
    Floats,
    Row,
    Wasserstein,
    bank_rows,
    from_target,
    target_row,
)
from lorameta_rs.errors import InvalidBank, InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from lorameta_rs.fingerprint import Fingerprint, Fingerprints

Named = TypeVar("Named")

EPSILON = 1e-10
SAMPLES = 1000


def choose(
    kind: str,
    name: str,
    compat: str | None,
    ours: Mapping[str, Named],
    papers: Mapping[str, Named],
) -> Named:
    """The entry of `name` in `ours`, or in `papers` where `compat` is "paper".

    Raises:
        InvalidSetting: There is no such entry, or `compat` is neither None nor "paper".
    """
    if compat not in (None, "paper"):
        raise InvalidSetting(f'compat `{compat}`: expected "paper" or nothing')
    table = ours if compat is None else papers
    if name not in table:
        where = "" if compat is None else " of the paper"
        raise InvalidSetting(f"{kind} `{name}`: expected one{where} of {', '.join(table)}")
    return table[name]


def histogram(row: Row, vocab_size: int) -> Floats:
    """Token probabilities plus 1e-10, as `np.histogram(ids, bins=arange(0, V), density=True)`.

    V edges make V − 1 bins and the last is closed: ids V − 2 and V − 1 share it. The sum is
    1 + 1e-10 (V − 1), for nothing is normalised after the 1e-10 is added.

    Returns:
        float64 [vocab_size − 1].
    """
    if vocab_size < 2:
        raise InvalidBank("the paper's histogram needs a vocabulary of two tokens or more")
    bins = np.minimum(row.ids, vocab_size - 2)
    counts = np.bincount(bins, weights=row.counts, minlength=vocab_size - 1)
    return counts / row.total + EPSILON


def jensen_shannon(fingerprints: Fingerprints, target: Fingerprint) -> Floats:
    """Jensen-Shannon divergence between histograms that sum to a little more than one."""
    return _between_histograms(
        lambda q, p: (_relative_entropy(q, (p + q) / 2) + _relative_entropy(p, (p + q) / 2)) / 2,
        fingerprints,
        target,
    )


def kullback_leibler(fingerprints: Fingerprints, target: Fingerprint) -> Floats:
    """Kullback-Leibler divergence Σ q ln(q/p) between such histograms."""
    return _between_histograms(_relative_entropy, fingerprints, target)


def wasserstein(fingerprints: Fingerprints, target: Fingerprint) -> Floats:
    """1-Wasserstein distance on the ids as they are, all V of them."""
    return _stored(from_target(Wasserstein, fingerprints, target))


def maximum_mean_discrepancy(
    fingerprints: Fingerprints,
    target: Fingerprint,
    generator: np.random.Generator | None = None,
) -> Floats:
    """Squared MMD of 1000 ids of each side, drawn anew, with replacement, for every member.

    The authors draw from numpy's global generator, unseeded; here `generator` is one of seed 0
    unless given, so that a result can be had again.
    """
    generator = np.random.default_rng(0) if generator is None else generator
    seen = target_row(target, fingerprints)
    rows = bank_rows(fingerprints)
    pairs = ((_sample(seen, generator), _sample(row, generator)) for row in rows)
    return _stored([mmd_of_samples(x, y) for x, y in pairs])


def mmd_of_samples(x: NDArray[np.integer], y: NDArray[np.integer]) -> float:
    """Biased squared MMD of two samples of ids, with the authors' float32 arithmetic.

    Its x² + y² − 2xy are integers that float32 rounds above 2²⁴: from ids of about 2900 on they
    are off, by up to 8 % of the distance. The roundings of the kernel and of its sums show in the
    sixth digit. Only the final mean is taken in float64.

    Args:
        x: Ids [n], of any integer type.
        y: Ids [n], as many.
    """
    ids, place = np.unique(np.concatenate([x, y]), return_inverse=True)
    kernel = _float32_kernel(ids.astype(np.int64))
    of_x, of_y = place[: len(x)], place[len(x) :]
    form = kernel[np.ix_(of_x, of_x)] + kernel[np.ix_(of_y, of_y)]
    form -= np.float32(2.0) * kernel[np.ix_(of_x, of_y)]
    return float(form.mean(dtype=np.float64))


def attentional(distances: Floats) -> Floats:
    """softmin(d), the paper's base version."""
    return _softmin(distances.astype(np.float32))


def normalized(distances: Floats, own: float = 0.0) -> Floats:
    """softmin(z), z the distances standardised with the dataset's own: 0, or `own` for MMD.

    The own distance of a sampled MMD is that of two different samples, and not 0.
    """
    row = np.append(distances, own).astype(np.float32)
    deviation = row.std(dtype=np.float64)
    z = (row - row.mean(dtype=np.float64)) / (deviation if deviation > 0.0 else 1.0)
    return _softmin(z[:-1].astype(np.float32))


METRICS: dict[str, Callable[[Fingerprints, Fingerprint], Floats]] = {
    "js": jensen_shannon,
    "kl": kullback_leibler,
    "wasserstein": wasserstein,
    "mmd": maximum_mean_discrepancy,
}
PIPELINES: dict[str, Callable[[Floats], Floats]] = {
    "attentional": attentional,
    "normalized": normalized,
}


def _between_histograms(
    distance: Callable[[Floats, Floats], float], fingerprints: Fingerprints, target: Fingerprint
) -> Floats:
    size = fingerprints.vocab_size
    seen = histogram(target_row(target, fingerprints), size)
    return _stored([distance(seen, histogram(row, size)) for row in bank_rows(fingerprints)])


def _relative_entropy(p: Floats, q: Floats) -> float:
    return float(np.sum(p * np.log(p / q)))


def _float32_kernel(ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """The kernel between all of `ids`, rounded where the authors' is."""
    own = ids * ids
    squares = (own[:, None] + own).astype(np.float32)
    squares -= np.float32(2.0) * (ids[:, None] * ids).astype(np.float32)
    kernel = np.zeros_like(squares)
    for a in MMD_WIDTHS:
        square = np.float32(a * a)
        kernel += square * (np.float32(1.0) / (square + squares))
    return kernel


def _sample(row: Row, generator: np.random.Generator) -> NDArray[np.uint32]:
    return generator.choice(row.ids, SAMPLES, p=row.probabilities)


def _softmin(values: NDArray[np.float32]) -> Floats:
    exponential = np.exp(values.min() - values)
    return _stored(exponential / exponential.sum())


def _stored(values: list[float] | NDArray[np.floating]) -> Floats:
    """Rounded to float32, as the authors store them."""
    return np.asarray(values, dtype=np.float32).astype(np.float64)
