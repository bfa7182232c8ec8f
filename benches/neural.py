"""`neural` at the paper's width beside the authors' own runs of it, of three seeds: then timed.

    python benches/neural.py [--golden tests/golden/paper] [--width 4000] [--seeds 2]

Their initial weights are not recorded, so nothing can be equal: what is told is how far runs of
ours are from each of theirs, and theirs from each other. At full width it is checked that the last
loss is among theirs, and that one of theirs has about these coefficients.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from lorameta_rs import neural

# Runs of theirs that are alike differ by 2 % of the loss, and in a coefficient by 0.07 at most.
NEAR_LOSS, NEAR_COEFFICIENTS = 0.05, 0.2

Matrix = NDArray[np.float64]
Run = tuple[list[float], Matrix]
"""The losses of the epochs, and the coefficients [n, n]."""


def recorded(golden: Path) -> dict[str, Run]:
    """The authors' runs, by their seeds."""
    found = json.loads((golden / "mlp4000_reference.json").read_text())
    return {
        name.removeprefix("JS/"): (one["loss"], np.array(one["coefficients"]))
        for name, one in found.items()
    }


def trained(golden: Path, width: int, seed: int) -> Run:
    """The same members, distances and epochs, from initial weights of our own."""
    distances = load_file(golden / "distances.safetensors")["JS"].astype(np.float64)
    flat = load_file(golden / "all_adapters_matrix.safetensors")["all_adapters"].astype(np.float64)
    start = neural.initial_weights(width, seed, dtype=np.float32)
    members = neural.paper_members(len(flat))
    done = neural.train(distances, flat @ flat.T, flat.shape[1], start, members=members)
    return list(done.losses), neural.leave_one_out(done.weights, distances)


def apart(one: Run, other: Run) -> float:
    """The largest difference of their coefficients."""
    return float(np.abs(one[1] - other[1]).max())


def check(run: Run, theirs: dict[str, Run]) -> None:
    last = [losses[-1] for losses, _ in theirs.values()]
    least, most = min(last) * (1 - NEAR_LOSS), max(last) * (1 + NEAR_LOSS)
    assert least < run[0][-1] < most, "another loss than theirs"
    nearest = min(apart(run, other) for other in theirs.values())
    assert nearest < NEAR_COEFFICIENTS, f"{nearest} from the nearest of theirs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--golden", type=Path, default=Path("tests/golden/paper"))
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    theirs = recorded(arguments.golden)
    print("run           loss: first     last   coefficients from", *theirs)
    for name, run in theirs.items():
        print_run(f"theirs, {name}", run, theirs)
    for seed in range(arguments.seeds):
        start = time.perf_counter()
        run = trained(arguments.golden, arguments.width, seed)
        seconds = time.perf_counter() - start
        print_run(f"ours, seed{seed}", run, theirs)
        print(f"  {seconds:.1f} s")
        if arguments.width == 4000:
            check(run, theirs)


def print_run(name: str, run: Run, theirs: dict[str, Run]) -> None:
    far = "  ".join(f"{apart(run, other):5.3f}" for other in theirs.values())
    print(f"{name:14}     {run[0][0]:.6f} {run[0][-1]:.6f}                    {far}", flush=True)


if __name__ == "__main__":
    main()
