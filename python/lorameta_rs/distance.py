"""How far a new dataset lies from each dataset of a bank, by their token distributions.

p is the distribution of a member of the bank, q that of the new dataset (the target): counts over
the vocabulary, divided by their total. Of the metrics the first four are those of
arXiv 2507.01806 (`paper` has its authors' own arithmetic):

| name          | distance                                         | work per member               |
|---------------|--------------------------------------------------|-------------------------------|
| `js`          | ½ Σ p ln(2p/(p+q)) + ½ Σ q ln(2q/(p+q))          | its distinct ids              |
| `kl`          | Σ q ln(q/p), both smoothed                       | its distinct ids              |
| `wasserstein` | Σ |CDF_p − CDF_q|                                | the vocabulary                |
| `mmd`         | (p−q)ᵀ K (p−q), K[x, y] = Σ_a a²/(a² + (x−y)²)   | a transform of the vocabulary |
| `cosine`      | 1 − ⟨u, v⟩/‖u‖‖v‖ of TF-IDF weighted counts      | its distinct ids              |
| `relations`   | `js` of the counts of `relations` instead        | a few numbers                 |

A colon takes one of the first five of a part of the datasets alone (`parts`), as in `js:answer`.
`vectors` is the cosine distance of vectors that the user has of each dataset.

Members are taken one row of the sparse matrix at a time, so that a ranking needs a few vectors of
the vocabulary's length besides the bank itself. Equal distributions are at distance 0 exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import _metrics, paper
from lorameta_rs._metrics import LN2, Floats
from lorameta_rs.errors import InvalidBank, InvalidDataset, InvalidSetting
from lorameta_rs.parts import PARTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorameta_rs.fingerprint import Fingerprint, Fingerprints


def jensen_shannon(fingerprints: Fingerprints, target: Fingerprint) -> Floats:
    """Jensen-Shannon divergence of `target` from each row of `fingerprints`.

    ½ Σ p ln(2p/(p+q)) + ½ Σ q ln(2q/(p+q)), with 0 ln 0 = 0: symmetric, the divergence itself and
    not its square root.

    Args:
        fingerprints: The bank's n fingerprints.
        target: The new dataset's, over the same vocabulary.

    Returns:
        float64 [n], in nats: 0 for equal distributions, ln 2 for those that share no token.

    Raises:
        InvalidBank: A row has no tokens, or the vocabularies differ.
        InvalidDataset: `target` has no tokens.

    >>> from lorameta_rs.fingerprint import Fingerprint, Fingerprints
    >>> ids, ones = np.array([0, 1, 1], np.uint32), np.array([2, 2, 6], np.uint64)
    >>> bank = Fingerprints(np.array([0, 2, 3]), ids, ones, vocab_size=3)
    >>> jensen_shannon(bank, Fingerprint(ids[:1], ones[:1], vocab_size=3))
    array([0.21576155, 0.69314718])
    """
    return _metrics.from_target(_metrics.JensenShannon, fingerprints, target)


def kullback_leibler(fingerprints: Fingerprints, target: Fingerprint) -> Floats:
    """Kullback-Leibler divergence Σ q ln(q/p) of `target` (q) from each row (p) of `fingerprints`.

    1e-10 is added to every token's probability, as the paper does, and the row is normalised
    again, as the paper does not. Not symmetric: what it measures is how badly a member's
    distribution explains the new dataset's tokens.

    Returns:
        float64 [n], in nats: 0 for equal distributions, about 23 for those that share no token.
        Arguments and errors are those of `jensen_shannon`.
    """
    return _metrics.from_target(_metrics.KullbackLeibler, fingerprints, target)


def wasserstein(fingerprints: Fingerprints, target: Fingerprint) -> Floats:
    """1-Wasserstein distance of `target` from each row of `fingerprints`, on the token ids.

    The area between the two cumulative distributions. It takes ids for places on a line, as the
    paper does, although neighbouring ids mean nothing to each other.

    Returns:
        float64 [n], in ids: 0 for equal distributions, `vocab_size` − 1 at most. Arguments and
        errors are those of `jensen_shannon`.
    """
    return _metrics.from_target(_metrics.Wasserstein, fingerprints, target)


def maximum_mean_discrepancy(fingerprints: Fingerprints, target: Fingerprint) -> Floats:
    """Squared maximum mean discrepancy of `target` from each row of `fingerprints`.

    (p−q)ᵀ K (p−q) with the paper's kernel on token ids, Σ_a a²/(a² + (x−y)²) for a of 0.2, 0.5,
    0.9 and 1.3. The paper estimates it from samples; this is what they estimate.

    Returns:
        float64 [n]: 0 for equal distributions, 8 at most. Arguments and errors are those of
        `jensen_shannon`.
    """
    return _metrics.from_target(_metrics.MaximumMeanDiscrepancy, fingerprints, target)


def cosine(fingerprints: Fingerprints, target: Fingerprint) -> Floats:
    """Cosine distance of `target` from each row of `fingerprints`, by TF-IDF weighted counts.

    A token's weight is its count times ln((1+n)/(1+df)) + 1, where df of the bank's n datasets
    have it: a token of the target that no member knows weighs the most.

    Returns:
        float64 [n]: 0 for equal distributions, 1 for those that share no token. Arguments and
        errors are those of `jensen_shannon`.
    """
    return _metrics.from_target(_metrics.Cosine, fingerprints, target)


def relational(fingerprints: Fingerprints, target: Fingerprint) -> Floats:
    """Jensen-Shannon divergence of how answers come from inputs (`relations`): what is done.

    Returns:
        float64 [n], in nats: 0 for equal distributions, ln 2 at most, and for a dataset that has no
        answers apart from its inputs.

    Raises:
        InvalidBank: No dataset of the bank has answers.
        InvalidDataset: The new dataset has none.
    """
    return jensen_shannon(_of_relations(fingerprints), _target_relations(target))


def of_vectors(fingerprints: Fingerprints, target: Fingerprint) -> Floats:
    """Cosine distance 1 − ⟨u, v⟩/‖u‖‖v‖ of the vectors that the user gave (`vectors`).

    Returns:
        float64 [n], from 0 to 2.

    Raises:
        InvalidBank: A dataset has no vector.
    """
    found = [row.vector for row in (*fingerprints.rows, target) if row.vector is not None]
    if len(found) <= len(fingerprints):
        raise InvalidBank(NO_VECTORS)
    units = np.array(found) / np.linalg.norm(found, axis=1, keepdims=True)
    return np.asarray(np.maximum(1.0 - units[:-1] @ units[-1], 0.0))


METRICS: dict[str, Callable[[Fingerprints, Fingerprint], Floats]] = {
    "js": jensen_shannon,
    "kl": kullback_leibler,
    "wasserstein": wasserstein,
    "mmd": maximum_mean_discrepancy,
    "cosine": cosine,
    "relations": relational,
    "vectors": of_vectors,
}

SEPARATOR = ","
OF_PART = ":"
NO_VECTORS = (
    "metric `vectors`: a dataset has no vector; `rank` and `merge` take them by --vectors FILE"
)


def applicable(
    metrics: str, fingerprints: Fingerprints, target: Fingerprint | None = None
) -> tuple[str, ...]:
    """Of metrics separated by commas, those that have something to say of these datasets.

    All have, but for parts of datasets that have no answers, and `relations` where the new one or
    all of the bank have none.

    Raises:
        InvalidSetting: There is no such metric, or one is named twice.
        InvalidBank: None of them applies.
    """
    names = [name.strip() for name in metrics.split(SEPARATOR)]
    for name in names:
        _parted(name)
        if names.count(name) > 1:
            raise InvalidSetting(f"metric `{name}` is named twice")
    left = tuple(name for name in names if _says_something(name, fingerprints, target))
    if not left:
        answers = _says_something("relations", fingerprints, target)
        what = "such part" if answers else "answers apart from its inputs"
        raise InvalidBank(f"metric `{metrics}`: a dataset has no {what}\nchoose another --metric")
    return left


def _says_something(metric: str, fingerprints: Fingerprints, target: Fingerprint | None) -> bool:
    name, part = _parted(metric)
    if part is not None:
        return all(part in row.parts for row in (*fingerprints.rows, target) if row is not None)
    without = fingerprints.relations is None or (target is not None and target.relations is None)
    return name != "relations" or not without


def _parted(metric: str) -> tuple[str, str | None]:
    """A metric's name, and the part of the datasets that it is of, if of one.

    Raises:
        InvalidSetting: There is no such metric, or none of parts.
    """
    name, colon, part = metric.partition(OF_PART)
    if name not in METRICS:
        raise InvalidSetting(f"metric `{name}`: expected one of {', '.join(METRICS)}")
    if not colon:
        return name, None
    if name not in _metrics.METRICS or part not in PARTS:
        raise InvalidSetting(
            f"metric `{metric}`: expected one of {', '.join(_metrics.METRICS)}, of one of the "
            f"parts {', '.join(PARTS)}"
        )
    return name, part


def part_of(metric: str) -> str | None:
    """The part of the datasets that a metric compares; None where it is all of them.

    Raises:
        InvalidSetting: There is no such metric, or none of parts.
    """
    return _parted(metric)[1]


def distances(
    metric: str, fingerprints: Fingerprints, target: Fingerprint, compat: str | None = None
) -> Floats:
    """Distances of `target` from each row of `fingerprints`, by the metric's name.

    Args:
        metric: A key of `METRICS`, or one of a part.
        fingerprints: The bank's n fingerprints.
        target: The new dataset's, over the same vocabulary.
        compat: "paper" for the numbers of the authors' code (`paper`).

    Returns:
        float64 [n].

    Raises:
        InvalidSetting: No such metric, or `compat` does not have it.
        InvalidBank: A row has no tokens or no such part, or the vocabularies differ.
        InvalidDataset: `target` has no tokens.
    """
    name, part = _parted(metric)
    if part is not None:
        if not _says_something(metric, fingerprints, target):
            raise InvalidBank(f"metric `{metric}`: a dataset has no part `{part}`")
        fingerprints, target = fingerprints.part(part), target.part(part)
    return paper.choose("metric", name, compat, METRICS, paper.METRICS)(fingerprints, target)


def similarity(metric: str, distances: Floats) -> Floats | None:
    """Distances as similarities: 1 for equal distributions, 0 for those that share no token.

    Returns:
        float64, of the shape of `distances`: 1 − JS/ln 2 for `js` and `relations`, 1 − d for
        `cosine` and `vectors`. None for the other metrics, whose distances have no bound that means
        "nothing in common".
    """
    name = metric.partition(OF_PART)[0]
    if name in ("js", "relations"):
        return 1.0 - distances / LN2
    if name in ("cosine", "vectors"):
        return 1.0 - distances
    return None


def pairwise(
    metric: str, fingerprints: Fingerprints, progress: Callable[[int], object] | None = None
) -> Floats:
    """Distances between all rows of `fingerprints`, exact: the bank seen by each of its members.

    Args:
        metric: A key of `METRICS`, or one of a part.
        fingerprints: The bank's n fingerprints.
        progress: Called with the number of rows that are done, every 16 or 32 and at the end.

    Returns:
        float64 [n, n]: row i holds the distances of dataset i, as the target, from the others.

    Raises:
        InvalidSetting: No such metric.
        InvalidBank: A row has no tokens, or none has relations where the metric is of them.
    """
    name, part = _parted(metric)
    if name == "vectors":
        return np.array([of_vectors(fingerprints, row) for row in fingerprints.rows])
    if name == "relations":
        name, fingerprints = "js", _of_relations(fingerprints)
    if part is not None:
        fingerprints = fingerprints.part(part)
    form = _metrics.METRICS[name](fingerprints)
    rows = _metrics.bank_rows(fingerprints)
    matrix = np.zeros((len(rows), len(rows)))
    for start in range(0, len(rows), form.block):
        targets = [form.target(row) for row in rows[start : start + form.block]]
        for j in range(start if form.symmetric else 0, len(rows)):
            member = form.member(rows[j])
            for i, target in enumerate(targets, start):
                if i < j or (i > j and not form.symmetric):
                    matrix[i, j] = form.distance(target, member)
        if progress is not None:
            progress(start + len(targets))
    return matrix + matrix.T if form.symmetric else matrix


def _of_relations(fingerprints: Fingerprints) -> Fingerprints:
    """The relations of a bank as fingerprints of their own."""
    counts = fingerprints.relations
    if counts is None:
        raise InvalidBank("metric `relations`: no dataset of the bank has answers")
    # Without answers, a dataset has a column of its own: so it is like none that has some.
    counts = np.column_stack([counts, ~counts.any(axis=1)])
    rows, ids = np.nonzero(counts)
    return replace(
        fingerprints,
        indptr=np.searchsorted(rows, np.arange(len(counts) + 1)),
        ids=ids.astype(np.uint32),
        counts=counts[rows, ids],
        vocab_size=counts.shape[1],
    )


def _target_relations(target: Fingerprint) -> Fingerprint:
    """The relations of a dataset as a fingerprint of its own."""
    if target.relations is None:
        raise InvalidDataset("metric `relations`: the dataset has no answers apart from its inputs")
    ids = np.flatnonzero(target.relations)
    return replace(
        target,
        ids=ids.astype(np.uint32),
        counts=target.relations[ids],
        vocab_size=len(target.relations) + 1,
    )
