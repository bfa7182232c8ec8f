"""Pipelines that a bank has taught, and what is kept beside it for them: `learned.safetensors`.

The file has the members' inner products of ΔW at norm one in each module, their distances from each
other by each metric, and a network for each choice of metrics: some numbers for each pair of
members. `calibrate` makes it. It serves as long as no member is new, and none has another adapter
or dataset than then; members may be missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from lorameta_rs import closed_forms, files, neural
from lorameta_rs.coefficients import combined_rows
from lorameta_rs.distance import SEPARATOR
from lorameta_rs.errors import InvalidBank, LoraMetaError, MissingFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank

FILE_NAME = "learned.safetensors"
FORMAT = 1
PIPELINES = ("neural", "ridge", "simplex")
"""`neural`: softmin of a network's view of the distances (`neural`); `ridge` and `simplex`: those
with the least expected error (`closed_forms`), of any sign and sum, or shares of one."""


@dataclass(frozen=True, eq=False)
class Learned:
    """What the pipelines need; the matrices are in the order of `stamps`."""

    stamps: dict[str, str]
    """Of each member what tells its adapter and its dataset from others (`stamps`)."""
    gram: Floats
    """`closed_forms.unit_gram` of the members [n, n]."""
    distances: dict[str, Floats]
    """`distance.pairwise` by each single metric [n, n]."""
    networks: Mapping[str, neural.Weights]
    """By metrics, separated by commas."""

    @classmethod
    def of(cls, bank: Bank) -> Learned:
        """What is kept beside the bank, of its members as they are now.

        Raises:
            MissingFile: Nothing was learned yet.
            InvalidBank: The file is broken, or was made of other members.
        """
        found = cls.load(bank)
        check(bank, found.stamps, path_of(bank))
        now = stamps(bank)
        places = [i for i, name in enumerate(found.stamps) if name in now]
        kept = np.ix_(places, places)
        of_now = {name: matrix[kept] for name, matrix in found.distances.items()}
        return cls(now, found.gram[kept], of_now, found.networks)

    def coefficients(self, pipeline: str, metric: str, distances: Floats) -> Floats:
        """The members' coefficients for a new dataset.

        Args:
            pipeline: One of `PIPELINES`.
            metric: Those that it was compared by, separated by commas.
            distances: Its distances from the members [n]; by several metrics what
                `coefficients.combined` makes.

        Returns:
            float64 [n]; of `neural` and `simplex` not negative, and one in all.

        Raises:
            InvalidBank: Nothing was learned for the metric.
        """
        if pipeline == "neural":
            if metric not in self.networks:
                raise self._lacks(f"network for the metric `{metric}`", metric)
            return neural.coefficients(self.networks[metric], distances)
        rows = self.rows(metric)
        products = closed_forms.expected_products(rows, self.gram, distances)
        form = closed_forms.ridge if pipeline == "ridge" else closed_forms.simplex
        return form(self.gram, products)

    def rows(self, metric: str) -> Floats:
        """The distances of each member from the others [n, n], as `coefficients.combined_rows`."""
        names = metric.split(SEPARATOR)
        for name in names:
            if name not in self.distances:
                raise self._lacks(f"distances by `{name}`", metric)
        return combined_rows(np.stack([self.distances[name] for name in names]))

    def _lacks(self, what: str, metric: str) -> InvalidBank:
        known = ", ".join(f"`{name}`" for name in self.networks)
        return InvalidBank(
            f"`{FILE_NAME}` has no {what}; it was learned for {known}\n"
            f"learn more with `lorameta-rs calibrate BANK --metric {metric}`"
        )

    def beside_earlier(self, bank: Bank) -> Learned:
        """With what was learned from the same members before, for other metrics."""
        try:
            earlier = Learned.load(bank)
        except LoraMetaError:
            return self
        if earlier.stamps != self.stamps:
            return self
        return replace(
            self,
            distances=earlier.distances | self.distances,
            networks={**earlier.networks, **self.networks},
        )

    def save(self, bank: Bank) -> None:
        """Keep it beside the bank's index; errors as `files.write_whole`."""
        tensors = {"gram": self.gram}
        tensors |= {f"distances/{name}": matrix for name, matrix in self.distances.items()}
        for metric, weights in self.networks.items():
            tensors |= {f"networks/{metric}/{name}": np.array(weights[name]) for name in weights}
        about = json.dumps({"format": FORMAT, "members": self.stamps})
        path = path_of(bank)
        with files.refusals(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, safetensors.numpy.save(tensors, {"learned": about}))

    @classmethod
    def load(cls, bank: Bank) -> Learned:
        """What the file has, of whatever members; errors as `of`."""
        path = path_of(bank)
        if not path.exists():
            raise MissingFile(2, f"nothing was learned yet: {hint(bank)}", str(path))
        try:
            with files.reading(path), safetensors.safe_open(path, "numpy") as content:
                about = json.loads((content.metadata() or {}).get("learned", "null"))
                found = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            return _checked(about, found)
        except (safetensors.SafetensorError, ValueError, RecursionError) as error:
            raise InvalidBank(f"`{path}`: {error}\n{hint(bank)}") from error


def stamps(bank: Bank) -> dict[str, str]:
    """Of each member the SHA-256 of its adapter, as the index has it, and of its fingerprint."""
    index = bank.index
    return {
        member.name: f"{index.sha256(member)} {bank.fingerprint(member).sha256}"
        for member in bank.members
    }


def check(bank: Bank, then: Mapping[str, str], path: Path) -> None:
    """See that the members are those of which a file was made, or some of them.

    Raises:
        InvalidBank: One is new, or has another adapter or dataset than `then`.
    """
    for name, stamp in stamps(bank).items():
        if then.get(name) != stamp:
            why = "is new" if name not in then else "has changed since, or was not indexed"
            raise InvalidBank(f"`{path}` is out of date: `{name}` {why}\n{hint(bank)}")


def path_of(bank: Bank) -> Path:
    """Where it is kept."""
    return bank.index_path.with_name(FILE_NAME)


def hint(bank: Bank) -> str:
    """How to make it."""
    return f"make it with `lorameta-rs calibrate {bank.folder}`"


def _checked(about: Any, tensors: Mapping[str, Any]) -> Learned:
    """What the file holds; `ValueError` if any of it cannot be."""
    match about:
        case {"format": int(version), "members": dict(members)} if version == FORMAT and all(
            isinstance(stamp, str) for stamp in members.values()
        ):
            pass
        case _:
            raise ValueError(f"its metadata is not that of format {FORMAT}")
    distances: dict[str, Floats] = {}
    networks: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating) or not np.isfinite(tensor).all():
            raise ValueError(f"`{name}` holds something else than finite numbers")
        kind, _, rest = name.partition("/")
        if kind == "networks":
            metric, _, part = rest.partition("/")
            networks.setdefault(metric, {})[part] = tensor
        elif tensor.shape != (len(members),) * 2:
            raise ValueError(f"`{name}` has shape {tensor.shape}, for {len(members)} members")
        elif kind == "distances":
            distances[rest] = tensor
    if "gram" not in tensors:
        raise ValueError("it has no `gram`")
    for metric, weights in networks.items():
        if not neural.is_network(weights):
            raise ValueError(f"its network for `{metric}` is none")
    return Learned(members, tensors["gram"], distances, networks)
