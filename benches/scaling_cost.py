"""What a merge costs as the bank, the ranks and the base grow: time and peak memory.

    python benches/scaling_cost.py /tmp                          a table
    python benches/scaling_cost.py /tmp --plot docs/cost.png     and a picture (extra `plot`)

Banks of Gaussian adapters are written below the folder given, 5 GB at most at a time, merged by the
real command with uniform coefficients to rank 16, and removed. Times are the least of
three, with the files in the page cache, and stand beside those of a plain read of the same files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bank import write_bank
from memory import peak

ROUNDS = 3
READ = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
def read(path):
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
with ThreadPoolExecutor(2) as pool:
    list(pool.map(read, Path(sys.argv[1]).glob("*/adapter_model.safetensors")))
"""


@dataclass(frozen=True)
class Case:
    """A bank to be merged."""

    members: int = 16
    rank: int = 16
    shape: str = "mistral-7b"


STUDIES = {
    "members": [Case(members=count) for count in (2, 8, 32, 128)],
    "rank": [Case(rank=rank) for rank in (4, 8, 16, 32, 64)],
    "shape": [Case(shape=shape) for shape in ("llama-1b", "mistral-7b", "llama-70b")],
}


@dataclass(frozen=True)
class Cost:
    """What one merge took."""

    seconds: float
    read: float
    """Seconds of a plain read of the same files by two threads."""
    size: float
    """Of all adapters, in MB."""
    memory: float
    """The peak that was resident, in MB."""


def cost(folder: Path, case: Case) -> Cost:
    """Write a bank, merge it as a user would, and remove it."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        bank = Path(temporary) / "bank"
        write_bank(bank, case.members, case.shape, case.rank, "float32")
        weights = Path(temporary) / "weights.json"
        names = sorted(member.name for member in bank.iterdir())
        weights.write_text(json.dumps(dict.fromkeys(names, 1 / len(names))))
        program = [sys.executable, "-m", "lorameta_rs"]
        merge = [*program, "merge", str(bank), "--weights", str(weights), "--rank", "16", "--force"]
        merge += ["--method", "svd", "-o", f"{temporary}/out"]
        seconds, read, memory = [], [], []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            memory.append(peak(merge))
            between = time.perf_counter()
            subprocess.run([sys.executable, "-c", READ, str(bank)], check=True)
            seconds.append(between - start)
            read.append(time.perf_counter() - between)
        size = sum(path.stat().st_size for path in bank.glob("*/adapter_model.safetensors")) / 1e6
        return Cost(min(seconds), min(read), size, max(memory))


def draw(found: dict[str, dict[str, Cost]], path: Path) -> None:
    """One panel for each study: seconds as bars, MB as their labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, (study, costs) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        bars = axes.bar(list(costs), [one.seconds for one in costs.values()], color="#4c78a8")
        axes.bar_label(bars, [f"{one.memory:.0f} MB" for one in costs.values()], fontsize=8)
        axes.plot(list(costs), [one.read for one in costs.values()], "_", color="black", ms=24)
        axes.set_title(study, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    figure.supylabel("seconds (line: plain read)", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    found: dict[str, dict[str, Cost]] = {}
    print("members  rank  shape        MB      merge   plain read  peak MB")
    for study, cases in STUDIES.items():
        for case in cases:
            one = found.setdefault(study, {})[str(getattr(case, study))] = cost(
                arguments.folder, case
            )
            print(
                f"{case.members:7} {case.rank:5}  {case.shape:10} {one.size:6.0f} "
                f"{one.seconds:8.2f} s {one.read:9.2f} s {one.memory:8.0f}",
                flush=True,
            )
    if arguments.plot is not None:
        draw(found, arguments.plot)


if __name__ == "__main__":
    main()
