"""Gram matrices of a bank beside what limits them: reading the bank, and multiplying matrices.

    python benches/bank.py /tmp/bank --members 64
    python benches/gram.py /tmp/bank                    in both spaces
    python benches/gram.py /tmp/bank --members 16       of as many of the first

The files are dropped from the page cache and read first: those that were just written lie there in
smaller pieces, and are slower to read. A sample of entries is checked, against NumPy in float64.
Then NumPy's float32 multiplication of large matrices, a plain read of the same files and the job
take turns; medians are shown. The work is counted once for each pair, a multiplication and an
addition for each number.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from packed import empty_cache
from safetensors.numpy import load_file

from lorameta_rs import Bank
from lorameta_rs.gram import SPACES, gram_matrix

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

ROUNDS = 5
PIECE = 1 << 20


def inner_product(bank: Bank, i: int, j: int, space: str) -> float:
    """⟨X_i, X_j⟩ of two members of float32 or float16, in float64."""
    one, other = (load_file(bank.members[k].adapter.path) for k in (i, j))
    wide = {name: (one[name].astype(np.float64), other[name].astype(np.float64)) for name in one}
    if space == "parameters":
        return float(sum(np.vdot(x, y) for x, y in wide.values()))
    total = 0.0
    for place, module in enumerate(bank.members[i].modules):
        a, a_other = wide[f"base_model.model.{module.name}.lora_A.weight"]
        b, b_other = wide[f"base_model.model.{module.name}.lora_B.weight"]
        strengths = bank.members[i].scalings[place] * bank.members[j].scalings[place]
        total += strengths * float(np.vdot(b.T @ b_other, a @ a_other.T))
    return total


def work(bank: Bank, space: str) -> float:
    """Floating-point operations that the matrix takes, where all members have one layout."""
    n = len(bank)
    pairs = n * (n + 1)
    sides = sum(one.rank * (one.a_shape[1] + one.b_shape[0]) for one in bank.members[0].modules)
    rank = max(one.rank for one in bank.members[0].modules)
    return float(pairs * sides * (1 if space == "parameters" else rank))


def read_all(bank: Bank) -> None:
    """Read all files in pieces, with as many threads as the machine has cores."""

    def read(path: Path) -> None:
        buffer = bytearray(PIECE)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, [Path(member.adapter.path) for member in bank.members]))


def timed(job: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--members", type=int, help="as many of the first; all by default")
    parser.add_argument("--space", choices=SPACES, action="append")
    arguments = parser.parse_args()
    bank = Bank(arguments.bank)
    if arguments.members is not None:
        bank = Bank(arguments.bank, exclude=bank.names[arguments.members :])
    gigabytes = sum(Path(member.adapter.path).stat().st_size for member in bank.members) / 1e9
    side = np.random.default_rng(0).standard_normal((4096, 4096), dtype=np.float32)
    print(f"{len(bank)} members, {gigabytes:.2f} GB")
    empty_cache([Path(member.adapter.path) for member in bank.members])
    read_all(bank)
    for space in arguments.space or SPACES:
        found = gram_matrix(bank, space)
        norms = np.sqrt(np.diag(found))
        for i, j in {(0, 0), (0, len(bank) - 1), (len(bank) // 2, len(bank) // 3)}:
            error = abs(found[i, j] - inner_product(bank, i, j, space)) / norms[i] / norms[j]
            assert error < 1e-6, (space, i, j, error)
        jobs: list[float] = []
        reads: list[float] = []
        products: list[float] = []
        for _ in range(ROUNDS):
            products.append(timed(lambda: side @ side))
            # Before the job, too: the threads that multiplied go on spinning for a while.
            reads.append(timed(lambda: read_all(bank)))
            jobs.append(timed(lambda: gram_matrix(bank, space)))  # noqa: B023 - called at once
        job, read = statistics.median(jobs), statistics.median(reads)
        rate = 2 * len(side) ** 3 / statistics.median(products) / 1e9
        operations = work(bank, space) / 1e9
        limit = max(read, operations / rate)
        print(f"{space}: {job:.2f} s, checked against float64")
        print(f"  {operations / job:7.1f} GFLOP/s, of {rate:.1f} that NumPy multiplies by")
        print(f"  {gigabytes / job:7.2f} GB/s, of {gigabytes / read:.2f} that files are read by")
        print(f"  {limit / job:7.2f} of the speed of what limits it")


if __name__ == "__main__":
    main()
