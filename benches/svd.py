"""`merge --method svd` beside what it must equal: the SVD of ΔW itself, by NumPy in float64.

    python benches/svd.py BANK                     as many members as it has, a sample of modules
    python benches/svd.py BANK --members 8 --dense also NumPy's SVD of the dense ΔW, and its time

The error is that of the products B A, relative to the best approximation of the same rank; the
optimum of many members is that of their stacked factors (QR, then the SVD of the core). For a bank
that `benches/bank.py` has written.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import deserialize

from lorameta_rs import Bank, _core
from lorameta_rs.merge import Job, Options, merge

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

PREFIX = "base_model.model."


def factors(folder: Path, module: str) -> tuple[Matrix, Matrix]:
    """A and B of a module, in float64."""
    path = folder / "adapter_model.safetensors"
    header = _core.open_adapters([path])[0]
    assert not isinstance(header, Exception), header
    (place,) = (one for one in header.layout.modules if one.name == module)
    tensors = dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]

    def numbers(factor: str, shape: list[int]) -> Matrix:
        data = bytes(tensors[f"{PREFIX}{module}.lora_{factor}.weight"]["data"])
        if place.dtypes[0] == "BF16":
            wide = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32).astype(np.float64).reshape(shape)
        kind = {"F16": "<f2", "F32": "<f4"}[place.dtypes[0]]
        return np.frombuffer(data, kind).astype(np.float64).reshape(shape)

    return numbers("A", place.a_shape), numbers("B", place.b_shape)


def stacked(bank: Bank, weights: Matrix, module: str) -> tuple[Matrix, Matrix]:
    """All members' factors, with coefficient and scaling in A: their product is ΔW."""
    rows, columns = [], []
    for member, weight in zip(bank.members, weights, strict=True):
        if weight:
            a, b = factors(member.folder, module)
            place = [one.name for one in member.modules].index(module)
            rows.append(weight * member.scalings[place] * a)
            columns.append(b)
    return np.concatenate(rows), np.concatenate(columns, axis=1)


def best(a: Matrix, b: Matrix, rank: int) -> tuple[Matrix, float, float]:
    """The best approximation of B A, its error, and ‖B A‖."""
    left, right = np.linalg.qr(b), np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(left.R @ right.R.T)
    kept = (left.Q @ (u[:, :rank] * s[:rank])) @ (vt[:rank] @ right.Q.T)
    return kept, float(np.linalg.norm(s[rank:])), float(np.linalg.norm(s))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--members", type=int, help="as many of the first; all by default")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--modules", type=int, default=3, help="how many are checked")
    parser.add_argument("--dense", action="store_true")
    arguments = parser.parse_args()
    bank = Bank(arguments.bank)
    weights = np.zeros(len(bank))
    weights[: arguments.members] = np.random.default_rng(0).dirichlet(
        np.ones(len(weights[: arguments.members]))
    )
    names = [module.name for module in bank.members[0].modules]
    sample = names[:: max(len(names) // arguments.modules, 1)][: arguments.modules]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        start = time.perf_counter()
        done = merge(bank, [Job(weights, out)], Options(method="svd", rank=arguments.rank))
        whole = time.perf_counter() - start
        kept = {name: (energy, exact) for name, energy, _, exact in done.outcomes[0].kept}
        for name in sample:
            a, b = stacked(bank, weights, name)
            wanted, optimum, norm = best(a, b, arguments.rank)
            made_a, made_b = factors(out, name)
            made = made_b @ made_a
            error = float(np.linalg.norm(b @ a - made))
            energy, exact = kept[name]
            assert abs(energy / norm**2 - 1) < (1e-6 if exact else 0.05), name
            print(
                f"{name}: ranks {len(a)}, ‖made − best‖ / ‖best‖ "
                f"{np.linalg.norm(made - wanted) / np.linalg.norm(wanted):.1e}, "
                f"error {error / optimum:.4f} of the least possible"
            )
    count = int(np.count_nonzero(weights))
    print(f"{count} members, {len(names)} modules: {whole:.2f} s, {whole / len(names):.4f} s each")
    print(f"{done.plan.bytes / 1e9:.2f} GB read, {done.plan.memory / 1e6:.1f} MB planned")
    if arguments.dense:
        sizes = {one.name: one.a_shape[1] * one.b_shape[0] for one in bank.members[0].modules}
        largest = max(sizes, key=sizes.__getitem__)
        a, b = stacked(bank, weights, largest)
        dense = (b @ a).astype(np.float32)
        start = time.perf_counter()
        u, s, vt = np.linalg.svd(dense, full_matrices=False)
        _ = (u[:, : arguments.rank] * s[: arguments.rank]) @ vt[: arguments.rank]
        taken = time.perf_counter() - start
        # One module's time where each has a thread of its own.
        ours = whole / len(names) * done.plan.threads
        print(f"NumPy's SVD of {largest}: {taken:.1f} s, {taken / ours:.0f} times ours")


if __name__ == "__main__":
    main()
