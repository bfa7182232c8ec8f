"""Calibration: the settings that suit a bank, and `calibration.json`, where they are kept.

By ΔW (`trials`) the setting is chosen whose sums have the largest cosine with the members' own ΔW;
by a base model's answers (`likelihoods`) the one that makes the members' own answers likeliest.
Either way the defaults stay unless another is better by two standard errors. By ΔW neither `ridge`
is chosen nor the factor on the sum that would make the error least: both are told, and cost answers
(docs/quality.md).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lorameta_rs import _core, distance, files
from lorameta_rs.closed_forms import unit_gram
from lorameta_rs.errors import InvalidBank, LoraMetaError
from lorameta_rs.gram import gram_of_modules
from lorameta_rs.learned import Learned, check, hint, stamps
from lorameta_rs.merge import NORMALIZATIONS
from lorameta_rs.ranking import Settings, rank
from lorameta_rs.trials import METRICS, WIDTH, applicable, chosen, standard_error, trials

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.fingerprint import Fingerprint
    from lorameta_rs.merge import Options
    from lorameta_rs.ranking import Ranking

FILE_NAME = "calibration.json"
FORMAT = 1
MEASURES = ("delta", "answers")
"""What settings were compared by: ΔW, or what a base model says."""
# Its sums are near in ΔW, and answer worse: by 0.02 to 0.12 of Rouge-L on the lab.
_NOT_BY_DELTA = ("ridge",)
_TEXTS = ("metric", "pipeline", "compat")
SCALES = (0.8, 1.25)
"""Of the sum, which the default is tried with by answers."""


@dataclass(frozen=True)
class Calibration:
    """The choice, and how it came about."""

    settings: Settings
    normalize: str
    """One of `merge.NORMALIZATIONS`."""
    measure: str
    """One of `MEASURES`."""
    stamps: dict[str, str]
    """The members that it was made of (`learned.stamps`)."""
    tried: list[dict[str, Any]]
    """The settings that were tried, each with its means over members: the default first, then the
    best. `against` is the difference from the default, and its standard error."""

    @classmethod
    def of(cls, bank: Bank) -> Calibration | None:
        """What was chosen for the bank; None if nothing was. Members may be missing since.

        Raises:
            UnreadableFile: It cannot be read.
            InvalidBank: It is broken, or made of other members.
        """
        path = path_of(bank)
        if not path.exists():
            return None
        with files.reading(path) as file:
            text = file.read()
        try:
            found = _checked(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidBank(f"`{path}`: no calibration: {error}\n{hint(bank)}") from error
        check(bank, found.stamps, path)
        return found

    @property
    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "format": FORMAT,
            "version": _core.version(),
            "measure": self.measure,
            "choice": asdict(self.settings) | {"normalize": self.normalize},
            "tried": self.tried,
            "members": self.stamps,
        }

    def save(self, bank: Bank) -> None:
        """Keep it beside the bank's index; errors as `files.write_whole`."""
        path = path_of(bank)
        with files.refusals(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, (json.dumps(self.content, indent=1) + "\n").encode())

    def __str__(self) -> str:
        usual, words = Settings(), [f"metric {self.settings.metric}", self.settings.pipeline]
        for name in ("temperature", "top_k", "scale"):
            value = getattr(self.settings, name)
            if value != getattr(usual, name):
                words.append(f"{name.replace('_', '-')} {value:g}")
        return ", ".join([*words, f"normalize {self.normalize}"])


def calibrated(
    bank: Bank,
    metrics: Sequence[str] = (),
    width: int = WIDTH,
    *,
    options: Options | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Calibration, Learned]:
    """Choose by ΔW, from one pass over the bank.

    Args:
        bank: Its members have fingerprints, and hashes in its index.
        metrics: To be tried beside the default, as far as they say something of the bank's
            datasets, each with what is learned; without them several.
        width: Of the networks.
        options: `threads`, `memory`, `io` and `allow_nan` count.
        progress: Told bytes read and bytes in all.

    Returns:
        The choice, and what was learned, now and before.

    Raises:
        InvalidBank: There are fewer than four members, or no metric says anything.
        LoraMetaError: As `gram.gram_of_modules`.
    """
    asked = applicable(metrics or METRICS, bank.fingerprints)
    if not asked:
        raise InvalidBank(f"`{bank.folder}`: no metric says anything of its datasets")
    default = applicable([Settings().metric], bank.fingerprints)
    tested = [*dict.fromkeys([*default, *asked])]
    modules = [*gram_of_modules(bank, options=options, progress=progress).values()]
    singles = dict.fromkeys(part for one in tested for part in one.split(distance.SEPARATOR))
    distances = {name: distance.pairwise(name, bank.fingerprints) for name in singles}
    tried, networks = trials(modules, distances, tested, width, asked if metrics else ())
    learned = Learned(stamps(bank), unit_gram(modules), distances, networks).beside_earlier(bank)
    offered = [
        one for one in tried if not one.of_modules and one.settings.pipeline not in _NOT_BY_DELTA
    ]
    best = offered[chosen(np.stack([one.cosine for one in offered]))]
    rows = [
        asdict(one.settings)
        | {"normalize": one.normalize, "of_modules": one.of_modules}
        | {"cosine": float(one.cosine.mean()), "against": _against(one.cosine, tried[0].cosine)}
        | {"error": float(one.error.mean()), "scale_of_least_error": one.scale}
        for one in tried
    ]
    rows[1:] = sorted(rows[1:], key=lambda row: -row["cosine"])
    return Calibration(best.settings, best.normalize, MEASURES[0], stamps(bank), rows), learned


def shortlist(calibration: Calibration, count: int) -> list[tuple[Settings, str]]:
    """The default, at three scales, and then the best of each metric and pipeline: `count` in all.

    Args:
        calibration: By ΔW.
        count: 1 or more.
    """
    names = [field.name for field in fields(Settings)]
    found: dict[tuple[str, str], tuple[Settings, str]] = {}
    for row in calibration.tried:
        if not row["of_modules"]:
            settings = Settings(**{name: row[name] for name in names})
            place = (settings.metric, settings.pipeline)
            found.setdefault(place, (settings, row["normalize"]))
    first, *others = found.values()
    scaled = [(replace(first[0], scale=scale), first[1]) for scale in SCALES]
    return [first, *scaled, *others][:count]


def by_answers(
    calibration: Calibration, candidates: Sequence[tuple[Settings, str]], losses: Floats
) -> Calibration:
    """The same bank's calibration by what a base model says.

    Args:
        calibration: That by ΔW.
        candidates: Settings and norms; the first are the default.
        losses: `likelihoods.losses` of each [candidates, members].
    """
    settings, normalize = candidates[chosen(-losses)]
    rows = [
        asdict(settings)
        | {"normalize": normalize, "loss": float(own.mean()), "against": _against(own, losses[0])}
        for (settings, normalize), own in zip(candidates, losses, strict=True)
    ]
    rows[1:] = sorted(rows[1:], key=lambda row: row["loss"])
    return replace(
        calibration, settings=settings, normalize=normalize, measure=MEASURES[1], tried=rows
    )


def kept(bank: Bank) -> Calibration | None:
    """The bank's calibration; None if there is none, or it is out of date, as a note says then.

    Raises:
        UnreadableFile: It cannot be read.
    """
    try:
        return Calibration.of(bank)
    except InvalidBank as error:
        bank.note(str(error))
        return None


def ranked(bank: Bank, target: Fingerprint, how: Settings | Calibration) -> Ranking:
    """`rank` by settings, or as the bank was calibrated; errors as there.

    A calibration may not apply to a dataset: one without answers, where answers are compared. Then
    the defaults are used, and a note of the bank says so.
    """
    if isinstance(how, Settings):
        return rank(bank, target, how)
    try:
        return replace(rank(bank, target, how.settings), calibrated=True)
    except LoraMetaError as error:
        found = rank(bank, target)
        reason = str(error).partition("\n")[0]
        bank.note(f"the calibration does not apply, and the defaults are used: {reason}")
        return found


def path_of(bank: Bank) -> Path:
    """Where it is kept."""
    return bank.index_path.with_name(FILE_NAME)


def _against(values: Floats, default: Floats) -> list[float]:
    """The mean of paired differences, and its standard error."""
    return [float((values - default).mean()), standard_error(values - default)]


def _checked(content: Any) -> Calibration:
    """What the file holds; `ValueError` or `TypeError` if any of it cannot be."""
    match content:
        case {
            "format": int(number),
            "measure": str(measure),
            "choice": {"metric": str(), "pipeline": str(), "normalize": str(normalize)},
            "tried": [*tried],
            "members": dict(members),
        } if number == FORMAT and measure in MEASURES and normalize in NORMALIZATIONS:
            choice = {name: one for name, one in content["choice"].items() if name != "normalize"}
            numbers = [one for name, one in choice.items() if name not in _TEXTS]
            if all(one is None or type(one) in (int, float) for one in numbers):
                return Calibration(Settings(**choice), normalize, measure, members, tried)
    raise ValueError(f"it is not of format {FORMAT}")
