"""A user's own vectors of datasets, such as embeddings, for the metric `vectors`.

Files of NumPy (`.npz`) or safetensors hold a vector for each member, under its name, and for each
new dataset, under its file's name: `new` or `new.jsonl` for `data/new.jsonl`.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import safetensors.numpy

from lorameta_rs import files
from lorameta_rs.errors import InvalidBank, InvalidDataset

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank
    from lorameta_rs.fingerprint import Fingerprint

_NAMED = 3  # members without a vector that are named


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors by name, all of one length."""

    paths: tuple[Path, ...]
    by_name: dict[str, Floats]

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Vectors:
        """The vectors of some files; a name that is in several is taken from the last.

        Raises:
            MissingFile, UnreadableFile: A file cannot be read.
            InvalidDataset: It holds something else, or vectors of different lengths.
        """
        found: dict[str, Floats] = {}
        for path in paths:
            for name, tensor in _tensors(path).items():
                if tensor.dtype.kind not in "fiu" or not _is_vector(tensor.astype(np.float64)):
                    raise InvalidDataset(
                        f"`{path}`: `{name}`, {tensor.dtype} of shape {tensor.shape}, is no vector "
                        "of finite numbers that are not all 0"
                    )
                vector = tensor.astype(np.float64)
                first = next(iter(found.values()), vector)
                if len(vector) != len(first):
                    raise InvalidDataset(
                        f"`{path}`: `{name}` has {len(vector)} numbers, "
                        f"`{next(iter(found))}` has {len(first)}"
                    )
                found[name] = vector
        return cls(tuple(paths), found)

    def give(self, bank: Bank) -> None:
        """Give each member of a bank that has fingerprints its vector.

        Raises:
            InvalidBank: Some have none.
        """
        without = [name for name in bank.names if name not in self.by_name]
        if without:
            names = ", ".join(f"`{name}`" for name in without[:_NAMED])
            more = f" and {len(without) - _NAMED} other members" if len(without) > _NAMED else ""
            raise InvalidBank(f"{self._where}: no vector of {names}{more} of `{bank.folder}`")
        for member in bank.members:
            vector = self.by_name[member.name]
            bank.keep(member.name, replace(bank.fingerprint(member), vector=vector))

    def of(self, dataset: Path, fingerprint: Fingerprint) -> Fingerprint:
        """A new dataset's fingerprint with its vector.

        Raises:
            InvalidDataset: There is none.
        """
        names = (dataset.name, dataset.name.split(".")[0])
        for name in names:
            if name in self.by_name:
                return replace(fingerprint, vector=self.by_name[name])
        raise InvalidDataset(
            f"{self._where}: no vector of `{dataset}`; expected one named "
            f"{' or '.join(f'`{name}`' for name in dict.fromkeys(reversed(names)))}"
        )

    @property
    def _where(self) -> str:
        return ", ".join(f"`{path}`" for path in self.paths)


def _is_vector(numbers: Floats) -> bool:
    return numbers.ndim == 1 and bool(np.isfinite(numbers).all() and numbers.any())


def _tensors(path: Path) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """What a file of either kind holds."""
    try:
        with files.reading(path) as file:
            if path.suffix == ".npz":
                with np.load(file, allow_pickle=False) as content:
                    return {name: content[name] for name in content.files}
            return safetensors.numpy.load(file.read())
    except (
        safetensors.SafetensorError,
        zipfile.BadZipFile,
        ValueError,
        TypeError,
        KeyError,
        EOFError,
    ) as error:
        expected = "expected `.npz` of numbers, or safetensors"
        raise InvalidDataset(f"`{path}`: no vectors: {error}\n{expected}") from error
