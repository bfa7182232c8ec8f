"""How good generated adapters are as the bank and the rank of the result grow, leave one out.

    python benches/scaling_quality.py BANK BASE.gguf                        a table
    python benches/scaling_quality.py BANK BASE.gguf --plot docs/scaling.png    and a picture

Each member with a `test.jsonl` is a task. Its adapter is made from so many other members, drawn
with a seed (a larger draw holds the smaller ones), or from all of them and cut to so many ranks.
llama.cpp answers the test rows; what it answered is kept in `--cache`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import Bank
from lorameta_rs.evaluate import Rows, evaluate
from lorameta_rs.index import make_fingerprints
from lorameta_rs.merge import Job, Options, merge
from lorameta_rs.ranking import Settings, rank

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEMBERS = (1, 2, 4, 8, 16, 32)
RANKS = (1, 2, 4, 8, 16, 32, 64)
SEED = 0


def adapters(bank: Bank, task: str, folder: Path) -> dict[str, Path]:
    """A task's adapters, by what is different about them."""
    target = bank.fingerprint(bank.members[bank.names.index(task)])
    others = [name for name in bank.names if name != task]
    drawn = np.random.default_rng([SEED, bank.names.index(task)]).permutation(others).tolist()
    made = {}
    for count in MEMBERS:
        part = bank.without([task, *drawn[count:]])
        ranking = rank(part, target, Settings())
        made[f"{count} members"] = folder / f"members{count}"
        merge(part, [Job(ranking.coefficients, made[f"{count} members"], ranking)], Options())
    rest = bank.without([task])
    ranking = rank(rest, target, Settings())
    for size in RANKS:
        made[f"rank {size}"] = folder / f"rank{size}"
        job = Job(ranking.coefficients, made[f"rank {size}"], ranking)
        merge(rest, [job], Options(method="svd", rank=size))
    return made


def measure(
    bank: Bank, base: Path, cache: Path | None, most_tokens: int
) -> dict[str, NDArray[np.float64]]:
    """Rouge-L for each task, by adapter; also of the base and of the tasks' own."""
    found: dict[str, list[float]] = {}
    for member in bank.members:
        if not (test := member.folder / "test.jsonl").is_file():
            continue
        with tempfile.TemporaryDirectory() as temporary:
            made = adapters(bank, member.name, Path(temporary))
            answered = evaluate(
                base,
                [*made.values(), member.folder],
                Rows.of(test, bank.tokenizer),
                folder=Path(temporary),
                cache=cache,
                most_tokens=most_tokens,
            )
        for name, one in zip(["base", *made, "fine-tuned"], answered, strict=True):
            found.setdefault(name, []).append(one.mean("rouge_l"))
    return {name: np.array(values) for name, values in found.items()}


def draw(found: dict[str, NDArray[np.float64]], path: Path) -> None:
    """Two panels, the base and the fine-tuned as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    studies = [("{} members", MEMBERS, "members"), ("rank {}", RANKS, "rank of the result")]
    for axes, (name, sizes, label) in zip(panels, studies, strict=True):
        values = [found[name.format(size)] for size in sizes]
        errors = [one.std(ddof=1) / len(one) ** 0.5 for one in values]
        axes.errorbar(sizes, [one.mean() for one in values], errors, marker="o", capsize=3)
        for control in ("base", "fine-tuned"):
            axes.axhline(found[control].mean(), color="grey", lw=1, ls="--")
            place = sizes[-1], found[control].mean() + 0.01
            axes.text(*place, control, fontsize=8, color="grey", ha="right")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("Rouge-L")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bank", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--most-tokens", type=int, default=24)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    bank = Bank(arguments.bank)
    make_fingerprints(bank)
    found = measure(bank, arguments.base, arguments.cache, arguments.most_tokens)
    for name, values in found.items():
        error = values.std(ddof=1) / len(values) ** 0.5
        print(f"{name:12} {values.mean():.3f} ± {error:.3f}")
    if arguments.plot is not None:
        draw(found, arguments.plot)


if __name__ == "__main__":
    main()
