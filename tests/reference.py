"""The method in NumPy, dense and in float64, one line per formula: what the library must equal.

p and q are distributions over the whole vocabulary, d the distances from the members of a bank.
"""

from __future__ import annotations

import numpy as np


def dense(ids, counts, vocab_size):
    row = np.zeros(vocab_size)
    row[ids] = np.asarray(counts, float) / sum(map(int, counts))
    return row


def relative_entropy(p, q):
    some = p > 0
    return np.sum(p[some] * np.log(p[some] / q[some]))


def jensen_shannon(p, q):
    middle = p / 2 + q / 2
    return relative_entropy(p, middle) / 2 + relative_entropy(q, middle) / 2


def kullback_leibler(p, q, epsilon=1e-10):
    p, q = (p + epsilon) / np.sum(p + epsilon), (q + epsilon) / np.sum(q + epsilon)
    return relative_entropy(q, p)


def wasserstein(p, q):
    return np.sum(np.abs(np.cumsum(p) - np.cumsum(q)))


def maximum_mean_discrepancy(p, q, widths=(0.2, 0.5, 0.9, 1.3)):
    lag = np.subtract.outer(np.arange(len(p)), np.arange(len(p)))
    kernel = sum(a**2 / (a**2 + lag**2) for a in widths)
    return (p - q) @ kernel @ (p - q)


def cosine(p, q, bank):
    idf = np.log((1 + len(bank)) / (1 + np.sum(bank > 0, axis=0))) + 1
    u, v = p * idf, q * idf
    return 1 - u @ v / (np.linalg.norm(u) * np.linalg.norm(v))


METRICS = {
    "js": jensen_shannon,
    "kl": kullback_leibler,
    "wasserstein": wasserstein,
    "mmd": maximum_mean_discrepancy,
}


def softmin(x):
    return np.exp(-x) / np.sum(np.exp(-x))


def normalized(d, temperature=1.0):
    row = np.append(d, 0.0)
    z = (d - np.mean(row)) / (np.std(row) or 1.0)
    return softmin(z / temperature)
