"""A dataset's fingerprint: how often each token id occurs in it, and how answers come about."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from lorameta_rs import files
from lorameta_rs.dataset import Example, examples
from lorameta_rs.errors import FileChanged, InvalidBank, InvalidDataset, LoraMetaError
from lorameta_rs.parts import BUCKETS, PARTS, Histogram, Parts, StoredParts, vector
from lorameta_rs.relations import NAMES, Relations
from lorameta_rs.tokenizer import MAX_VOCAB_SIZE, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

FORMAT = 3
"""The version of the fingerprint file that is written, and the only one that is read."""

_MAX_FILE = 1 << 30

# Shares of a few kinds are known well enough from so many rows, and each takes some time.
_ROWS_WITH_ANSWERS = 4096


@dataclass(frozen=True)
class DatasetRecord:
    """Which file a fingerprint was made from, to see later whether it is still the same."""

    name: str
    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> DatasetRecord:
        """The record of the file as it is now, all of it read; errors as `files.reading`."""
        with files.reading(path) as file:
            status = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.name, status.st_size, status.st_mtime_ns, digest)

    def untouched(self, path: Path) -> bool:
        """Whether `path` has the size and time recorded here: then its bytes need no look."""
        with files.refusals(path):
            status = path.stat()
        return (self.size, self.mtime_ns) == (status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Token counts of one dataset under one tokenizer.

    `ids` [n] uint32, ascending and distinct; `counts` [n] uint64, positive. `rows` were counted;
    `tokenizer` is the SHA-256 of its file; `columns` is what the reader was asked for; `dataset`
    is None where nobody recorded it. `relations` [len(relations.NAMES)] uint64 counts how answers
    come from inputs; None where the dataset has no answers apart from its inputs. `parts` has
    histograms of `parts.PARTS`, as far as there are. `vector` is one that the user gave; it is not
    saved.
    """

    ids: NDArray[np.uint32]
    counts: NDArray[np.uint64]
    vocab_size: int
    rows: int = 0
    tokenizer: str = ""
    columns: tuple[str, ...] | None = None
    dataset: DatasetRecord | None = None
    relations: NDArray[np.uint64] | None = None
    parts: Mapping[str, Histogram] = field(default_factory=dict)
    vector: NDArray[np.float64] | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens counted."""
        return int(self.counts.sum())

    def part(self, name: str) -> Fingerprint:
        """One of its parts as a fingerprint of its own.

        Raises:
            KeyError: It has none of that name.
        """
        ids, counts = self.parts[name]
        size = BUCKETS if name == "bigrams" else self.vocab_size
        return replace(self, ids=ids, counts=counts, vocab_size=size)

    @property
    def sha256(self) -> str:
        """Of its counts and of what they were made of, which tell a dataset from others."""
        made_from = None if self.dataset is None else self.dataset.sha256
        digest = hashlib.sha256(json.dumps([self.identity, self.columns, made_from]).encode())
        for array in (self.ids, self.counts, self.relations):
            digest.update(b"" if array is None else np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def identity(self) -> str:
        """Over which token ids it counts, in words."""
        return f"{self.vocab_size} ids, SHA-256 {self.tokenizer[:12] or 'unknown'}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to `path`, whole or not at all; equal fingerprints give equal bytes.

        Raises:
            MissingFile, UnreadableFile: the folder is not there, or cannot be written to.
        """
        about = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "rows": self.rows,
            "tokens": self.tokens,
            "tokenizer": self.tokenizer,
            "columns": self.columns,
            "dataset": None if self.dataset is None else asdict(self.dataset),
        }
        # One entry, because the library writes several in an order that changes from run to run.
        metadata = {"fingerprint": json.dumps(about)}
        tensors: dict[str, NDArray[Any]] = {"all.ids": self.ids, "all.counts": self.counts}
        if self.relations is not None:
            tensors["relations"] = self.relations
        for name, part in self.parts.items():
            tensors |= {f"{name}.ids": part.ids, f"{name}.counts": part.counts}
        files.write_whole(Path(path), safetensors.numpy.save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fingerprint:
        """The fingerprint at `path`; other tensors that the file may have are left alone.

        Raises:
            MissingFile, UnreadableFile: the file cannot be read.
            InvalidBank: it is no fingerprint, or contradicts itself.
        """
        path = Path(path)
        try:
            with files.reading(path) as file:
                if os.fstat(file.fileno()).st_size > _MAX_FILE:
                    raise ValueError(f"larger than {_MAX_FILE:,} bytes")
                with safetensors.safe_open(path, "numpy") as content:
                    about = json.loads((content.metadata() or {}).get("fingerprint", "null"))
                    ids = vector(content, "all.ids", "U32")
                    counts = vector(content, "all.counts", "U64")
                    kept = "relations" in content.keys()  # noqa: SIM118, it is no mapping
                    relations = vector(content, "relations", "U64") if kept else None
                    stored = content.keys()
            found = _checked(about, ids, counts)
            names = tuple(name for name in PARTS if f"{name}.ids" in stored)
            parts = StoredParts(path, names, found.vocab_size)
            return replace(found, relations=_relations(relations), parts=parts)
        except (safetensors.SafetensorError, ValueError, RecursionError) as error:
            hint = "where its dataset is there, `lorameta-rs index` makes it again"
            raise InvalidBank(f"`{path}`: not a fingerprint: {error}\n{hint}") from error

    def staleness(
        self,
        *,
        dataset: str | os.PathLike[str] | None = None,
        tokenizer: Tokenizer | None = None,
        columns: Sequence[str] | None = None,
    ) -> str | None:
        """Why it has to be made again, in words that continue "it is stale: ", or None if fresh.

        What is None is not compared: fingerprints are published without the data they came from,
        and say themselves from which `columns`.

        Raises:
            MissingFile, UnreadableFile: the dataset or the tokenizer cannot be read.
            InvalidBank: the tokenizer is broken.
        """
        if tokenizer is not None and tokenizer.sha256 != self.tokenizer:
            return f"it was made with another tokenizer than `{tokenizer.path}`"
        if tokenizer is not None and tokenizer.vocab_size != self.vocab_size:
            found = f"`{tokenizer.path}` has {tokenizer.vocab_size}"
            return f"it was made with another tokenizer, of {self.vocab_size} ids; {found}"
        if columns is not None and _columns(columns) != self.columns:
            return f"it was made from {_asked(self.columns)}, not {_asked(_columns(columns))}"
        if dataset is None:
            return None
        dataset = Path(dataset)
        if self.dataset is None:
            return f"it does not say whether it was made from `{dataset}`"
        # A copied bank has other times than the original, and the same bytes.
        same = self.dataset.untouched(dataset) or files.sha256(dataset) == self.dataset.sha256
        return None if same else f"its dataset `{dataset}` has changed"


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """The fingerprints of many datasets as one sparse matrix, a row a dataset (CSR).

    Row i has its ids in `ids[indptr[i]:indptr[i + 1]]` (uint32, ascending, distinct) and its
    counts in the same places of `counts` (uint64); `vocab_size` is the number of columns.
    `relations` [rows, len(relations.NAMES)] has zeros for a dataset without answers, and is None
    where none has any. `rows` are the fingerprints that it was stacked of, which have the rest.
    """

    indptr: NDArray[np.int64]
    ids: NDArray[np.uint32]
    counts: NDArray[np.uint64]
    vocab_size: int
    relations: NDArray[np.uint64] | None = None
    rows: Sequence[Fingerprint] = ()

    @classmethod
    def stack(cls, fingerprints: Sequence[Fingerprint]) -> Fingerprints:
        """The matrix with these rows, in this order.

        >>> a = Fingerprint(np.uint32([1, 5]), np.uint64([2, 1]), vocab_size=8)
        >>> b = Fingerprint(np.uint32([3]), np.uint64([4]), vocab_size=8)
        >>> Fingerprints.stack([a, b]).indptr
        array([0, 2, 3])

        Raises:
            InvalidBank: there are none, or their tokenizers differ.
        """
        if not fingerprints:
            raise InvalidBank("there are no fingerprints")
        first = fingerprints[0]
        for i, other in enumerate(fingerprints):
            if (other.tokenizer, other.vocab_size) != (first.tokenizer, first.vocab_size):
                raise InvalidBank(
                    f"fingerprint {i} was made with another tokenizer than fingerprint 0: "
                    f"{other.identity}, not {first.identity}"
                )
        without = np.zeros(len(NAMES), np.uint64)
        relations = [without if one.relations is None else one.relations for one in fingerprints]
        return cls(
            indptr=np.cumsum([0, *(len(one.ids) for one in fingerprints)], dtype=np.int64),
            ids=_joined([one.ids for one in fingerprints]),
            counts=_joined([one.counts for one in fingerprints]),
            vocab_size=first.vocab_size,
            relations=np.stack(relations) if any(row is not without for row in relations) else None,
            rows=fingerprints,
        )

    def part(self, name: str) -> Fingerprints:
        """One part of every row as fingerprints of their own.

        Raises:
            KeyError: A row has none of that name.
        """
        return self.stack([row.part(name) for row in self.rows])

    def __len__(self) -> int:
        return len(self.indptr) - 1


def load_all(
    paths: Mapping[str, Path],
) -> tuple[dict[str, Fingerprint], dict[str, LoraMetaError]]:
    """The fingerprints at `paths` by name, and what is wrong with those that cannot be read.

    They lie side by side in memory, so that `Fingerprints.stack` need not copy them: those of a
    large bank are most of what a ranking holds.
    """
    # A file holds 12 bytes for each of its ids, and more. What stays unused is never touched: of
    # numpy's own memory, whose pages are huge where they can be, 3 MB more would be.
    room = sum(path.stat().st_size for path in paths.values() if path.is_file()) // 12 or 1
    ids = np.frombuffer(mmap.mmap(-1, 4 * room), np.uint32)
    counts = np.frombuffer(mmap.mmap(-1, 8 * room), np.uint64)
    loaded: dict[str, Fingerprint] = {}
    faults: dict[str, LoraMetaError] = {}
    start = 0
    for name, path in paths.items():
        try:
            one = Fingerprint.load(path)
        except LoraMetaError as error:
            faults[name] = error
            continue
        place = slice(start, start + len(one.ids))
        ids[place], counts[place] = one.ids, one.counts
        loaded[name] = replace(one, ids=ids[place], counts=counts[place])
        start = place.stop
    return loaded, faults


def token_distribution(
    dataset: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Fingerprint:
    r"""The fingerprint of a dataset, each row tokenised with the model's special tokens.

    >>> import tempfile
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> model = Tokenizer(models.WordLevel({"to": 0, "be": 1, "or": 2, "?": 3}, unk_token="?"))
    >>> model.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(f"{folder}/tokenizer.json")
    ...     _ = Path(folder, "train.txt").write_text("to be or\nnot to be")
    ...     hamlet = token_distribution(f"{folder}/train.txt", tokenizer=f"{folder}/tokenizer.json")
    >>> hamlet.ids, hamlet.counts
    (array([0, 1, 2, 3], dtype=uint32), array([2, 2, 1, 1], dtype=uint64))

    Args:
        dataset: The file; `dataset.examples` says which formats and fields it may have.
        tokenizer: The base model's, or the path of its `tokenizer.json`.
        columns: The fields that make up a row's text, instead of those that are recognised.
        progress: Told, now and then, how many rows have been counted so far.

    Raises:
        MissingFile, UnreadableFile: the dataset or the tokenizer cannot be read.
        InvalidDataset: the dataset is broken, or has no token at all.
        InvalidBank: the tokenizer is broken.
        FileChanged: the dataset changed meanwhile.
        MissingExtra: the dataset is parquet, and pyarrow is not installed.
        InvalidSetting: `columns` names no field.

    Warns:
        DatasetWarning: as `dataset.examples`.
    """
    path, tokenizer = Path(dataset), Tokenizer.of(tokenizer)
    record = DatasetRecord.of(path)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    rows, relations, parts = 0, Relations(), Parts(tokenizer.vocab_size)
    contents = examples(path, columns=columns, vocab_size=tokenizer.vocab_size)
    for batch in tokenizer.token_ids(_answers_first(contents)):
        ids = np.fromiter(chain.from_iterable(row for row, _ in batch), dtype=np.int64)
        counts += np.bincount(ids, minlength=len(counts))
        relations.add(batch)
        parts.add(batch, ids)
        rows += len(batch)
        if progress is not None:
            progress(rows)
    if not record.untouched(path):
        raise FileChanged(f"`{path}`: it changed while it was being read")
    ids = np.flatnonzero(counts)
    if not len(ids):
        raise InvalidDataset(f"`{path}`: the dataset has no tokens")
    return Fingerprint(
        ids=ids.astype(np.uint32),
        counts=counts[ids].astype(np.uint64),
        vocab_size=tokenizer.vocab_size,
        rows=rows,
        tokenizer=tokenizer.sha256,
        columns=_columns(columns),
        dataset=record,
        relations=relations.counts if relations.counts.any() else None,
        parts=parts.histograms(relations.definition),
    )


def _checked(about: Any, ids: NDArray[np.uint32], counts: NDArray[np.uint64]) -> Fingerprint:
    """What the file holds; `ValueError` if any of it cannot be."""
    match about:
        case {
            "format": int(version),
            "vocab_size": int(vocab_size),
            "rows": int(rows),
            "tokens": int(tokens),
            "tokenizer": str(tokenizer),
            "columns": list() | None as columns,
            "dataset": dict() | None as dataset,
        } if version == FORMAT and rows >= 0:
            pass
        case _:
            raise ValueError(f"its metadata is not that of format {FORMAT}")
    if columns is not None and not all(isinstance(name, str) for name in columns):
        raise ValueError("its metadata names columns by something else than text")
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {vocab_size} ids")
    Histogram(ids, counts).check(vocab_size)
    if counts.sum() != tokens:
        raise ValueError(f"its counts are not those of {tokens} tokens")
    return Fingerprint(
        ids=ids,
        counts=counts,
        vocab_size=vocab_size,
        rows=rows,
        tokenizer=tokenizer,
        columns=_columns(columns),
        dataset=None if dataset is None else _record(dataset),
    )


def _answers_first(rows: Iterable[Example | list[int]]) -> Iterator[Example | list[int]]:
    """The rows, all but the first without telling their answers apart."""
    for number, row in enumerate(rows):
        if isinstance(row, Example) and number >= _ROWS_WITH_ANSWERS:
            yield Example(row.text)
        else:
            yield row


def _relations(counts: NDArray[np.uint64] | None) -> NDArray[np.uint64] | None:
    """The counts that a file has; `ValueError` if they cannot be."""
    if counts is None:
        return None
    if len(counts) != len(NAMES) or not counts.any() or counts.sum(dtype=np.float64) >= 2**63:
        raise ValueError(f"its relations are not {len(NAMES)} counts")
    return counts


def _record(dataset: dict[str, Any]) -> DatasetRecord:
    match dataset:
        case {
            "name": str(name),
            "size": int(size),
            "mtime_ns": int(mtime_ns),
            "sha256": str(sha256),
        }:
            return DatasetRecord(name, size, mtime_ns, sha256)
    raise ValueError("its metadata has a broken record of the dataset")


def _joined(vectors: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The vectors one behind the other; in place where they lie so already."""
    first = vectors[0]
    room = first.base
    ends = np.cumsum([vector.nbytes for vector in vectors])
    starts = first.ctypes.data + ends - [vector.nbytes for vector in vectors]
    beside = all(
        vector.base is room and vector.ctypes.data == start
        for vector, start in zip(vectors, starts, strict=True)
    )
    if not beside or not isinstance(room, np.ndarray) or room.ndim != 1:
        return np.concatenate(vectors)
    begin = (first.ctypes.data - room.ctypes.data) // room.itemsize
    return np.asarray(room[begin : begin + int(ends[-1]) // room.itemsize])


def _columns(columns: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if columns is None else tuple(columns)


def _asked(columns: tuple[str, ...] | None) -> str:
    if columns is None:
        return "the fields that are recognised"
    return "the fields " + ", ".join(f"`{name}`" for name in columns)
