"""Peak resident memory of `lorameta-rs merge`, above that of Python with numpy and the tokenizer.

    python benches/memory.py BANK DATASET                        with the usual settings
    python benches/memory.py BANK DATASET --memory 32 --io read  with these options of `merge`

`--cgroup DIR` runs the merge in a control group that you have made and limited. This process stays
small on purpose: what a system calls the peak of a child begins with what its parent held.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = [
    [*memory, *io]
    for memory in ([], ["--memory", "32"])
    for io in (["--io", "mmap"], ["--io", "read"])
]
BASE = "import sys, numpy, tokenizers; tokenizers.Tokenizer.from_file(sys.argv[1])"


def peak(command: list[str], cgroup: Path | None = None) -> float:
    """The most memory that a process had resident, in MB."""

    def join() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text("0")

    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=join
    )
    assert process.stderr is not None
    words = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{words}{command[1:4]}: status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit / 1e6


def above(
    bank: Path, dataset: Path, options: list[str], cgroup: Path | None = None
) -> tuple[float, float]:
    """What Python, numpy and the tokenizer take, and how much more a merge takes, in MB."""
    base = peak([sys.executable, "-c", BASE, str(bank / "tokenizer.json")])
    merge = [sys.executable, "-m", "lorameta_rs", "merge", str(bank), str(dataset)]
    with tempfile.TemporaryDirectory() as folder:
        found = peak([*merge, "-o", f"{folder}/out", *options], cgroup)
    return base, found - base


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bank", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--cgroup", type=Path)
    arguments, options = parser.parse_known_args()
    for chosen in [options] if options else SETTINGS:
        base, more = above(arguments.bank, arguments.dataset, chosen, arguments.cgroup)
        print(f"{more:6.1f} MB above {base:.1f} MB: merge {' '.join(chosen)}", flush=True)


if __name__ == "__main__":
    main()
