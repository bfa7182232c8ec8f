"""The method in NumPy, dense and in float64, one line per formula: what the library must equal.

p and q are distributions over the whole vocabulary, d the distances from the members of a bank,
c the coefficients made of them; a member is a dict of its tensors.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import safetensors


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


def to_bits(numbers, dtype):
    """Numbers as a safetensors file stores them; NumPy has no bfloat16."""
    if dtype != "BF16":
        return np.asarray(numbers).astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
    bits = np.asarray(numbers, "<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def from_bits(data, dtype):
    """The numbers of a tensor's bytes, in float64."""
    if dtype != "BF16":
        kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
        return np.frombuffer(data, kind).astype(np.float64)
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)


def stored(numbers, dtype):
    """The numbers that are left of these when they are stored."""
    return from_bits(to_bits(numbers, dtype).tobytes(), dtype).reshape(np.shape(numbers))


def read(path):
    """The tensors of a safetensors file, in float64, and the set of their types."""
    tensors = safetensors.deserialize(Path(path).read_bytes())
    numbers = {
        name: from_bits(bytes(one["data"]), one["dtype"]).reshape(one["shape"])
        for name, one in tensors
    }
    return numbers, {one["dtype"] for _, one in tensors}


def scaling(config, module):
    """The factor s of ΔW = s·B·A, as PEFT has it."""
    alpha = next(
        (
            value
            for key, value in config.get("alpha_pattern", {}).items()
            if re.match(rf"(.*\.)?({key})$", module)
        ),
        config["lora_alpha"],
    )
    return alpha / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def soup(members, coefficients, strength=lambda i, tensor: 1.0):
    """Σ c_i A_i and Σ c_i s_i B_i; a tensor that a member lacks counts as zero."""
    total = {}
    for i, (tensors, c) in enumerate(zip(members, coefficients, strict=True)):
        for name, numbers in tensors.items():
            total[name] = total.get(name, 0.0) + c * strength(i, name) * numbers
    return total
