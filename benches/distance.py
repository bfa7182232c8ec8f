"""The distances on a bank of the paper's size: checked against dense formulas, then timed.

    python benches/distance.py [--members 502] [--distinct 5000] [--vocab 32000] [--skip-pairwise]

Times are the best of several rounds; memory is what NumPy held at most besides the fingerprints.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorameta_rs import distance
from lorameta_rs.fingerprint import Fingerprint, Fingerprints

if TYPE_CHECKING:
    from collections.abc import Callable

Vector = NDArray[np.float64]


def zipf_bank(members: int, distinct: int, vocab: int, seed: int = 0) -> Fingerprints:
    """Fingerprints whose counts fall as 1/rank, each over its own sample of the vocabulary.

    Frequent tokens are frequent in all of them, as in text: a token's place in the sample is
    drawn by a weight that all members share.
    """
    generator = np.random.default_rng(seed)
    weight = 1.0 / np.arange(1, vocab + 1) ** 0.7
    token = generator.permutation(vocab)
    ids, counts = [], []
    for _ in range(members):
        # Exponential races: the `distinct` smallest arrival times are a weighted sample.
        order = np.argsort(generator.exponential(size=vocab) / weight)[:distinct]
        frequency = np.ceil(10.0 * distinct / np.arange(1, distinct + 1)).astype(np.uint64)
        chosen = token[order]
        ascending = np.argsort(chosen)
        ids.append(chosen[ascending].astype(np.uint32))
        counts.append(frequency[ascending])
    indptr = np.arange(members + 1, dtype=np.int64) * distinct
    return Fingerprints(indptr, np.concatenate(ids), np.concatenate(counts), vocab_size=vocab)


def row(bank: Fingerprints, i: int) -> Fingerprint:
    start, stop = bank.indptr[i], bank.indptr[i + 1]
    return Fingerprint(bank.ids[start:stop], bank.counts[start:stop], vocab_size=bank.vocab_size)


def dense(bank: Fingerprints, i: int) -> Vector:
    one = row(bank, i)
    probabilities = np.zeros(bank.vocab_size)
    probabilities[one.ids] = one.counts / one.counts.sum()
    return probabilities


def relative_entropy(p: Vector, q: Vector) -> float:
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))


def direct(metric: str, p: Vector, q: Vector) -> float:
    """The distance of q from p as `docs/method.md` writes it, dense, on the ids of either."""
    if metric == "js":
        return (relative_entropy(p, (p + q) / 2) + relative_entropy(q, (p + q) / 2)) / 2
    if metric == "kl":
        smooth = 1.0 + len(p) * 1e-10
        return relative_entropy((q + 1e-10) / smooth, (p + 1e-10) / smooth)
    if metric == "wasserstein":
        return float(np.abs(np.cumsum(p - q)).sum())
    difference = p - q
    ids = np.flatnonzero(difference)
    kernel = np.zeros(len(p))
    for a in (0.2, 0.5, 0.9, 1.3):
        kernel += a * a / (a * a + np.arange(len(p)) ** 2.0)
    return float(sum(difference[i] * (kernel[abs(ids - i)] @ difference[ids]) for i in ids))


def best(action: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of `rounds` calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def peak(action: Callable[[], object]) -> float:
    """Megabytes that `action` held at most."""
    tracemalloc.start()
    action()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--members", type=int, default=502)
    parser.add_argument("--distinct", type=int, default=5000)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-pairwise", action="store_true")
    options = parser.parse_args()

    datasets = zipf_bank(options.members + 1, options.distinct, options.vocab)
    target, q = row(datasets, options.members), dense(datasets, options.members)
    end = datasets.indptr[-2]
    bank = Fingerprints(
        datasets.indptr[:-1], datasets.ids[:end], datasets.counts[:end], datasets.vocab_size
    )

    shared = np.isin(bank.ids, target.ids).mean()
    print(
        f"{len(bank)} members of {options.distinct} ids over {options.vocab}, {shared:.0%} shared"
    )
    paper_metrics = ("js", "kl", "wasserstein", "mmd")
    for metric in paper_metrics:
        got = distance.METRICS[metric](bank, target)[:3]
        want = [direct(metric, dense(bank, i), q) for i in range(3)]
        np.testing.assert_allclose(got, want, rtol=1e-9, err_msg=metric)

    print("one target against the bank")
    for metric in (*paper_metrics, "cosine"):
        ranking = partial(distance.METRICS[metric], bank, target)
        seconds, memory = best(ranking, options.rounds), peak(ranking)
        print(f"  {metric:12} {1e3 * seconds:7.1f} ms  {memory:5.1f} MB")
    if options.skip_pairwise:
        return

    print("all pairs")
    total = 0.0
    for metric in paper_metrics:
        seconds = best(partial(distance.pairwise, metric, bank), 1)
        total += seconds
        print(f"  {metric:12} {seconds:7.1f} s")
    print(f"  {'together':12} {total:7.1f} s")


if __name__ == "__main__":
    main()
