"""`lorameta.json`: what an adapter was made of, enough to make it again bit for bit."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np

from lorameta_rs import _core, files
from lorameta_rs.errors import InvalidSetting
from lorameta_rs.relevance import effective_number

if TYPE_CHECKING:
    import os

    from lorameta_rs.bank import Bank
    from lorameta_rs.merge import Job, Options

FILE_NAME = "lorameta.json"
FORMAT = 1

_KINDS: dict[str, tuple[type, ...]] = {
    "dtype": (str,),
    "allow_nan": (bool,),
    "rank": (int, NoneType),
    "energy": (int, float, NoneType),
    "normalize": (str, NoneType),
    "density": (int, float, NoneType),
    "majority_sign": (str,),
    "seed": (int,),
    "memory": (int,),
}
OF_RESULT = tuple(_KINDS)
"""The options beside the method that a result depends on."""

_LARGEST = 64 << 20


@dataclass(frozen=True)
class Provenance:
    """The contents of `lorameta.json`.

    Attributes:
        version: Of this package.
        settings: `bank`, `base_model` and what the result depends on beside the members.
        target: The new dataset's `path` and `sha256`; None if the coefficients were given.
        method: How the members were combined.
        relevance: How good a match the bank was; None if the coefficients were given.
        members: `name`, `path`, `sha256`, `config_sha256`, `distance`, `similarity` and
            `coefficient` of each member that was used, in the order of the bank; what is not known
            is None.
    """

    version: str
    settings: dict[str, Any]
    target: dict[str, Any] | None
    method: str
    relevance: dict[str, Any] | None
    members: list[dict[str, Any]]

    def as_json(self) -> str:
        """The file's text; numbers in full precision."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @property
    def coefficients(self) -> dict[str, float | list[float]]:
        """Each member's coefficient, by name; or one for each of `modules`."""
        return {member["name"]: member["coefficient"] for member in self.members}

    @property
    def modules(self) -> tuple[str, ...]:
        """The patterns of modules that have coefficients of their own."""
        return tuple(self.settings.get("modules", ()))

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that were written; earlier versions did not record others than PEFT's."""
        return tuple(self.settings.get("formats", ("peft",)))

    @property
    def effective_number(self) -> float:
        """How many members, in equal parts, would be as spread out."""
        return effective_number(np.array(list(self.sizes.values())))

    @property
    def refined(self) -> dict[str, Any] | None:
        """How `refine` came to the coefficients; None if they are as the ranking or a user has."""
        found: dict[str, Any] | None = self.settings.get("refined")
        return found

    @property
    def sizes(self) -> dict[str, float]:
        """Each member's coefficient as one number: its own in a mixture that was refined."""
        found = (self.refined or {}).get("coefficients", {})
        return {name: found.get(name, size(c)) for name, c in self.coefficients.items()}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Provenance:
        """Read a `lorameta.json`.

        Raises:
            MissingFile, UnreadableFile: It cannot be read.
            InvalidSetting: It is something else, or of a newer format.
        """
        path = Path(path)
        with files.reading(path) as file:
            text = file.read(_LARGEST)
        try:
            found = json.loads(text)
            if not isinstance(found, dict):
                raise ValueError("expected an object")
            fields = ("format", *cls.__dataclass_fields__)
            if lacking := [name for name in fields if name not in found]:
                raise ValueError(f"it has no `{lacking[0]}`")
            if found["format"] != FORMAT:
                raise InvalidSetting(f"format {found['format']!r}, this version reads {FORMAT}")
            record = cls(**{name: found[name] for name in cls.__dataclass_fields__})
            _check(record)
        except InvalidSetting as error:
            raise InvalidSetting(f"`{path}`: {error}") from None
        except (ValueError, RecursionError) as error:
            raise InvalidSetting(f"`{path}`: not a {FILE_NAME}: {error}") from error
        return record


def size(coefficient: float | list[float]) -> float:
    """A coefficient as one number: itself, or the mean size of those of several modules."""
    if isinstance(coefficient, float):
        return coefficient
    return sum(map(abs, coefficient)) / len(coefficient)


def _check(record: Provenance) -> None:
    """See that a record has what is needed to repeat it; `ValueError` if not."""
    from lorameta_rs.merge import Options

    _check_settings(record.settings)
    if not isinstance(record.method, str):
        raise ValueError("its method is no text")
    given = {name: record.settings[name] for name in OF_RESULT if name in record.settings}
    Options(method=record.method, formats=record.formats, **given)
    match record.target, record.settings:
        case None, _:
            pass
        case {"path": str(), "sha256": str() | None}, {"metric": str(), "pipeline": str()}:
            pass
        case _:
            raise ValueError("its target lacks path or sha256, or its settings metric or pipeline")
    match record.relevance:
        case None:
            pass
        case {"nearest": str(), "distance": near, "percentile": share, "effective_number": number}:
            for value in (near, 0.0 if share is None else share, number):
                _number("relevance", value)
        case _:
            raise ValueError("its relevance is not what a ranking says")
    if not isinstance(record.members, list):
        raise ValueError("its members are no array")
    for member in record.members:
        match member:
            case {"name": str(), "sha256": str(), "coefficient": [*several]} if (
                len(several) == len(record.modules) > 0
            ):
                member["coefficient"] = [_number("coefficient", one) for one in several]
            case {"name": str(), "sha256": str(), "coefficient": given}:
                member["coefficient"] = _number("coefficient", given)
            case _:
                raise ValueError("a member lacks its name, sha256 or coefficient")
        for name in ("distance", "similarity"):
            if (value := member.get(name)) is not None:
                member[name] = _number(f"{name} of a member", value)
    if not any(np.any(member["coefficient"]) for member in record.members):
        raise ValueError("no member has a coefficient other than 0")


def _check_settings(settings: dict[str, Any]) -> None:
    match settings:
        case {"bank": str(bank), "base_model": str() | None, **given} if "\0" not in bank:
            pass
        case _:
            raise ValueError("its settings lack bank or base_model")
    kinds = _KINDS | {"drop_unsupported": (bool,), "base_weights": (str, NoneType)}
    kinds |= {"base": (dict, NoneType)}
    for name, value in given.items():
        if name in kinds and type(value) not in kinds[name]:
            raise ValueError(f"`{name}` in its settings is not of the right type")
    for name in ("modules", "formats"):
        texts = given.get(name, [])
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            raise ValueError(f"`{name}` in its settings is no array of texts")
    match given.get("refined"):
        case None:
            pass
        case {"rows": int(), "before": before, "after": after, "weights": dict(weights), **rest}:
            parts = rest.get("coefficients", {})
            if not isinstance(parts, dict):
                raise ValueError("the coefficients of what was refined are no object")
            for value in (before, after, *parts.values(), *weights.values()):
                _number("what was refined", value)
        case _:
            raise ValueError("`refined` in its settings lacks rows, before, after or weights")
    if lacking := {"dtype", "allow_nan"} - given.keys():
        raise ValueError(f"its settings lack {lacking.pop()}")


def _number(what: str, value: Any) -> float:
    """`value` if it is a finite number that a float can hold."""
    if type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    raise ValueError(f"the {what} is no finite number")


def _again(record: Provenance, settings: dict[str, Any], bank: Bank) -> Provenance:
    """The same, made by this version and from files where they are now."""
    folders = {member.name: str(member.folder.absolute()) for member in bank.members}
    return replace(
        record,
        version=_core.version(),
        settings=record.settings | settings,
        members=[
            {
                "name": member["name"],
                "path": folders[member["name"]],
                "sha256": member["sha256"],
                "config_sha256": member.get("config_sha256"),
                "distance": member.get("distance"),
                "similarity": member.get("similarity"),
                "coefficient": member["coefficient"],
            }
            for member in record.members
        ],
    )


def provenance(bank: Bank, job: Job, options: Options) -> Provenance:
    """What a job's adapter is made of; the bank's index has the members that it uses."""
    from lorameta_rs.formats.base import Base
    from lorameta_rs.repeat import RepeatedJob

    ranking = job.ranking
    settings: dict[str, Any] = {
        "bank": str(bank.folder.absolute()),
        "base_model": bank.base_model,
        "drop_unsupported": bank.drop_unsupported,
        **{name: getattr(options, name) for name in OF_RESULT},
        "formats": list(options.formats),
    }
    if (base := options.base or Base.known(None, bank.folder)) is not None:
        settings["base"] = base.table
    if bank.base_weights is not None:
        settings["base_weights"] = str(bank.base_weights.absolute())
    if job.modules:
        settings["modules"] = list(job.modules)
    if job.refined is not None:
        settings["refined"] = dict(job.refined)
    if isinstance(job, RepeatedJob):
        return _again(job.record, settings, bank)
    target = None
    if ranking is not None:
        settings |= asdict(ranking.settings)
    if job.dataset is not None and job.fingerprint is not None:
        record = job.fingerprint.dataset
        settings["columns"] = job.fingerprint.columns
        target = {
            "path": str(job.dataset.absolute()),
            "sha256": None if record is None else record.sha256,
        }
    members = []
    for i, member in enumerate(bank.members):
        own = np.asarray(job.coefficients[i], dtype=np.float64)
        if not own.any():
            continue
        similarity = None if ranking is None else ranking.similarity
        members.append(
            {
                "name": member.name,
                "path": str(member.folder.absolute()),
                "sha256": bank.index.sha256(member),
                "config_sha256": member.config_sha256,
                "distance": None if ranking is None else float(ranking.distances[i]),
                "similarity": None if similarity is None else float(similarity[i]),
                "coefficient": own.tolist(),
            }
        )
    return Provenance(
        version=_core.version(),
        settings=settings,
        target=target,
        method=options.method,
        relevance=None if ranking is None else asdict(ranking.relevance),
        members=members,
    )
