"""A bank packed as Q8_0 beside the float32 bank that it was made of: time, size, and error of ΔW.

    python benches/bank.py /tmp/bank --members 64
    python benches/packed.py /tmp/bank --base-config CONFIG     a Mistral's config.json, or its GGUF

The bank is packed by `lorameta-rs convert --to gguf --dtype q8_0` first, and what that costs of ΔW
is computed in float64, of single members and of a merge. Then merges of both banks take turns, with
nothing of them in the page cache and with all of it; the fastest of each is shown, and their ratio,
beside that of plain reads of the same files, one after another.

How much a smaller bank gains depends on the disk: one that gives 1.7 GB/s, and that only to four
files that are read in a row, has 2.2 to 2.7. To hold a disk (its numbers: `lsblk`) to 0.5 GB/s:

    mount -t cgroup -o blkio none /mnt && mkdir /mnt/slow && echo $$ > /mnt/slow/tasks
    echo "254:0 500000000" > /mnt/slow/blkio.throttle.read_bps_device
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

from lorameta_rs import Bank
from lorameta_rs.merge import Job, Options, merge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

ROUNDS = {"cold": 5, "warm": 9}
LARGEST_ERROR = 0.01


def packed(bank: Path, out: Path, base_config: Path) -> None:
    """Pack a bank as a user does."""
    words = [sys.executable, "-m", "lorameta_rs", "convert", str(bank), "-o", str(out)]
    words += ["--to", "gguf", "--dtype", "q8_0", "--base-config", str(base_config)]
    subprocess.run(words, check=True)


def product_norm(a: Matrix, b: Matrix) -> float:
    """‖B A‖², of small matrices."""
    return float(np.vdot(b.T @ b, a @ a.T))


def error(found: Path, wanted: Path) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW'‖ over all modules of two adapter folders of one scaling."""
    one, other = (load_file(path / "adapter_model.safetensors") for path in (found, wanted))
    apart = whole = 0.0
    for name in (name for name in other if name.endswith(".lora_A.weight")):
        counterpart = name.replace(".lora_A.", ".lora_B.")
        a, a_wanted = (file[name].astype(np.float64) for file in (one, other))
        b, b_wanted = (file[counterpart].astype(np.float64) for file in (one, other))
        apart += product_norm(np.concatenate([a, a_wanted]), np.concatenate([b, -b_wanted], 1))
        whole += product_norm(a_wanted, b_wanted)
    return float(np.sqrt(apart / whole))


def check(bank: Bank, small: Bank, weights: Matrix, options: Options) -> None:
    """Say the error of a merge and of three members alone, and see that it is below 1 %."""
    n = len(bank)
    alone = np.eye(n)[[0, n // 2, n - 1]]
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{kind}{i}" for kind in ("packed", "whole") for i in range(4)]
        for one, places in ((small, outs[:4]), (bank, outs[4:])):
            rows = zip([weights, *alone], places, strict=True)
            merge(one, [Job(row, out) for row, out in rows], options)
        merged, *members = map(error, outs[:4], outs[4:])
    assert max(merged, *members) < LARGEST_ERROR, (merged, members)
    print(
        f"relative error of ΔW: {100 * np.mean(members):.2f} % of members, "
        f"{100 * merged:.2f} % of a merge"
    )


def timed(bank: Bank, weights: Matrix, options: Options, cold: bool) -> float:
    """Seconds of a merge."""
    if cold:
        empty_cache([Path(member.adapter.path) for member in bank.members])
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        merge(bank, [Job(weights, Path(folder) / "out")], options)
        return time.perf_counter() - start


def timed_read(bank: Bank, cold: bool) -> float:
    """Seconds that all files take to read, in pieces of 64 KiB, with two threads for each core."""
    paths = [Path(member.adapter.path) for member in bank.members]

    def read(path: Path) -> None:
        buffer = bytearray(1 << 16)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    if cold:
        empty_cache(paths)
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        start = time.perf_counter()
        list(pool.map(read, paths))
        return time.perf_counter() - start


def empty_cache(paths: Sequence[Path]) -> None:
    """Have nothing of these files in the page cache, and leave there what is others'."""
    os.sync()  # what is still to be written cannot be dropped
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--base-config", type=Path, required=True)
    parser.add_argument("--method", default="soup", help="as `merge` has it; soup by default")
    parser.add_argument("--io", default="read")
    arguments = parser.parse_args()
    options = Options(method=arguments.method, io=arguments.io)
    with tempfile.TemporaryDirectory(dir=arguments.bank.absolute().parent) as folder:
        small_folder = Path(folder) / "packed"
        packed(arguments.bank, small_folder, arguments.base_config)
        bank, small = Bank(arguments.bank), Bank(small_folder)
        assert bank.names == small.names
        weights = np.random.default_rng(0).dirichlet(np.ones(len(bank)))
        check(bank, small, weights, options)
        size, small_size = (sum(m.adapter.size for m in one.members) for one in (bank, small))
        print(f"size: {small_size / 1e9:.3f} GB, of {size / 1e9:.3f}: {small_size / size:.3f}")
        for state, rounds in ROUNDS.items():
            cold = state == "cold"
            run = partial(timed, weights=weights, options=options, cold=cold)
            for what, seconds in (("merge", run), ("read", partial(timed_read, cold=cold))):
                pairs = [(seconds(bank), seconds(small)) for _ in range(rounds)]
                whole, less = map(min, zip(*pairs, strict=True))
                ratio = f"{whole / less:.2f} times as fast"
                print(f"{state} {what}: {whole:.3f} s, packed {less:.3f} s: {ratio}")


if __name__ == "__main__":
    main()
