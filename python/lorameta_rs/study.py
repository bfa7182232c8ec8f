"""How good the adapters of a bank's own tasks are when each is made without its own member.

Leave one out: a task's adapter comes from all other members. Leave the family out: from the members
of other families, as for a task of which the bank has nothing alike. The controls are answered by
the same base on the same rows.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import distance, files
from lorameta_rs.coefficients import combined_rows
from lorameta_rs.errors import (
    InvalidBank,
    InvalidSetting,
    LayoutMismatch,
    MissingExtra,
    MissingFile,
)
from lorameta_rs.evaluate import Rows, by_length, evaluate
from lorameta_rs.merge import Job, Options, merge
from lorameta_rs.ranking import Settings, rank
from lorameta_rs.scores import MEASURES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.evaluate import Evaluation

PROTOCOLS = ("loo", "lofo")
CONTROLS = ("base", "random", "uniform", "nearest", "paper", "generated", "fine-tuned")
"""What is compared, the thing itself last but one: `generated` by the settings of the study."""
PICTURES = (".png", ".jpg", ".svg", ".pdf")
# With which a member is of one family, where nobody has named families.
_NEAREST = 2


@dataclass(eq=False)
class Study:
    """The scores of each task, by what answered it."""

    tasks: list[str] = field(default_factory=list)
    scores: dict[str, list[Floats]] = field(default_factory=dict)
    """By each of `CONTROLS`, of each task `scores.scores` [rows, measures]."""
    lengths: list[list[int]] = field(default_factory=list)
    """Of each task the prompts' lengths in tokens."""
    families: list[list[str]] = field(default_factory=list)
    """The members that were left out together, where the protocol is `lofo`."""
    notes: list[str] = field(default_factory=list)

    def add(self, task: str, found: Mapping[str, Evaluation]) -> None:
        """Take one task's evaluations."""
        self.tasks.append(task)
        for name, one in found.items():
            self.scores.setdefault(name, []).append(one.scores)
        self.lengths.append(next(iter(found.values())).lengths)

    def of(self, name: str, measure: str = "rouge_l") -> Floats:
        """A measure's mean for each task [tasks]."""
        place = MEASURES.index(measure)
        return np.array([one[:, place].mean() for one in self.scores[name]])

    def against(
        self, name: str, other: str, measure: str = "rouge_l"
    ) -> tuple[float, float | None]:
        """The mean difference over tasks, and its standard error; None for a single task."""
        differences = self.of(name, measure) - self.of(other, measure)
        if len(differences) < 2:
            return float(differences.mean()), None
        error = differences.std(ddof=1) / np.sqrt(len(differences))
        return float(differences.mean()), float(error)

    def by_length(self, name: str) -> dict[str, tuple[int, float]]:
        """Rows of all tasks and their Rouge-L, by the length of their prompts."""
        values = np.concatenate([one[:, MEASURES.index("rouge_l")] for one in self.scores[name]])
        return by_length(values, list(chain.from_iterable(self.lengths)))


def families(bank: Bank) -> dict[str, str]:
    """Each member's family: that of `bank.toml`, or else found by the datasets.

    Without names, each member is of one family with its two nearest, and these with theirs, and so
    on. By the one nearest a family falls into pairs, and siblings stay in the bank when one is left
    out; by two, families may be joined instead, and then too much is left out, not too little.
    """
    if bank.families:
        return {name: bank.families.get(name, name) for name in bank.names}
    matrices = [
        distance.pairwise(metric, bank.fingerprints)
        for metric in distance.applicable(Settings().metric, bank.fingerprints)
    ]
    total = combined_rows(np.stack(matrices))
    np.fill_diagonal(total, np.inf)
    parent = list(range(len(bank)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, row in enumerate(total):
        for near in np.argsort(row, kind="stable")[: min(_NEAREST, len(bank) - 1)]:
            parent[root(i)] = root(int(near))
    return {name: bank.names[root(i)] for i, name in enumerate(bank.names)}


def study(
    bank: Bank,
    base: Path,
    folder: Path,
    *,
    protocol: str = "loo",
    settings: Settings | None = None,
    options: Options | None = None,
    test: str = "test.jsonl",
    rows: int | None = None,
    most_tokens: int = 128,
    cache: Path | None = None,
    threads: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Study:
    """Answer each member's test rows by adapters that were made without it.

    Args:
        bank: Its members have fingerprints, and some a test set beside them.
        base: The base model, a GGUF file.
        folder: Where adapters are put meanwhile.
        protocol: One of `PROTOCOLS`.
        settings: Of the coefficients of `generated`.
        options: Of its merge.
        test: The name of a member's test set in its folder; `{}` in it stands for the member's
            name, and a path leads from the bank's folder.
        rows: Of each test set at most.
        most_tokens: The longest answer.
        cache: Where answers are kept, so that a study that was broken off is taken up.
        threads: Of the model.
        seed: Of the control `random`.
        progress: Told tasks done, and in all.

    Raises:
        InvalidSetting: No such protocol.
        InvalidBank: No member has a test set, or all are of one family.
        LoraMetaError: As `merge` and `evaluate`.
    """
    if protocol not in PROTOCOLS:
        raise InvalidSetting(f"protocol `{protocol}`: expected one of {', '.join(PROTOCOLS)}")
    settings, options = settings or Settings(), options or Options()
    tests = {
        member.name: path
        for member in bank.members
        if (path := _test_set(bank, member.folder, member.name, test)).is_file()
    }
    if not tests:
        raise InvalidBank(f"`{bank.folder}`: no member has a test set `{test}`")
    kin = families(bank) if protocol == "lofo" else {name: name for name in bank.names}
    found = Study()
    if protocol == "lofo":
        found.families = [[name for name in kin if kin[name] == one] for one in set(kin.values())]
        found.families.sort()
        found.notes.append(_of_families(bank, found.families))
    random = np.random.default_rng(seed)
    for number, (task, path) in enumerate(tests.items()):
        left_out = np.array([kin[name] == kin[task] for name in bank.names])
        if left_out.all():
            found.notes.append(f"`{task}`: all members are of its family")
            continue
        made = folder / task
        adapters = _adapters(bank, task, left_out, made, settings, options, random, found.notes)
        own = bank.members[bank.names.index(task)].folder
        asked = Rows.of(path, bank.tokenizer if bank.has_tokenizer else None, most=rows)
        answered = evaluate(
            base,
            [*adapters.values(), own],
            asked,
            folder=made,
            cache=cache,
            most_tokens=most_tokens,
            threads=threads,
        )
        found.add(task, dict(zip(["base", *adapters, "fine-tuned"], answered, strict=True)))
        if progress is not None:
            progress(number + 1, len(tests))
    if not found.tasks:
        raise InvalidBank("\n".join(found.notes))
    return found


def _of_families(bank: Bank, together: list[list[str]]) -> str:
    """What is left out together, and whose choice that is."""
    whose = "`bank.toml`"
    if not bank.families:
        whose = "the datasets that are nearest (name them in `bank.toml`, under `[families]`)"
    members = "; ".join(", ".join(f"`{name}`" for name in one) for one in together)
    return f"families, by {whose}: {members}"


def _test_set(bank: Bank, folder: Path, name: str, test: str) -> Path:
    filled = test.replace("{}", name)
    return bank.folder / filled if "/" in filled else folder / filled


def _adapters(
    bank: Bank,
    task: str,
    left_out: np.ndarray[tuple[int], np.dtype[np.bool_]],
    folder: Path,
    settings: Settings,
    options: Options,
    random: np.random.Generator,
    notes: list[str],
) -> dict[str, Path]:
    """The adapters that answer for a task, by the name of their control."""
    target = bank.fingerprint(bank.members[bank.names.index(task)])
    rest = bank.without([name for name, out in zip(bank.names, left_out, strict=True) if out])
    ranking = rank(rest, target, settings)
    nearest = np.zeros(len(rest))
    nearest[ranking.nearest_first()[0]] = 1.0
    weights = {
        "random": random.dirichlet(np.ones(len(rest))),
        "uniform": np.full(len(rest), 1.0 / len(rest)),
        "nearest": nearest,
        "generated": ranking.coefficients,
    }
    jobs = [Job(given, folder / name, ranking) for name, given in weights.items()]
    merge(rest, jobs, options)
    made = {name: folder / name for name in weights}
    paper = rank(rest, target, Settings.paper())
    try:
        merge(rest, [Job(paper.coefficients, folder / "paper", paper)], Options.paper())
        made["paper"] = folder / "paper"
    except LayoutMismatch:
        note = "paper: left out, because its operator takes no members of different ranks"
        notes += [note] if note not in notes else []
    return {name: made[name] for name in CONTROLS if name in made}


def check_drawable(path: Path) -> None:
    """See that a picture can be drawn there, before the work of a study.

    Raises:
        MissingExtra: matplotlib is not installed.
        InvalidSetting: It is no picture's name.
        MissingFile: Its folder is not there.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtra("pictures need matplotlib: pip install 'lorameta-rs[plot]'") from error
    if path.suffix.lower() not in PICTURES:
        raise InvalidSetting(f"`{path}`: expected a name that ends with {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise MissingFile(2, "there is no such folder for the picture", str(path.parent))


def drawn(found: Study, path: Path) -> None:
    """A picture of a study: each control's mean with the standard error over tasks.

    Errors as `check_drawable` and `files.write_whole`.
    """
    check_drawable(path)
    from matplotlib.figure import Figure

    names = [name for name in CONTROLS if name in found.scores]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    means = [float(found.of(name).mean()) for name in names]
    errors = [float(found.of(name).std() / np.sqrt(max(len(found.tasks) - 1, 1))) for name in names]
    bars = axes.barh(names[::-1], means[::-1], xerr=errors[::-1], color="#4c78a8")
    axes.bar_label(bars, fmt="%.3f", padding=6)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"Rouge-L, mean of {len(found.tasks)} tasks")
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower()[1:])
    files.write_whole(path, picture.getvalue())
