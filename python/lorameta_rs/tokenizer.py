"""The base model's tokenizer, as its `tokenizer.json` has it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from lorameta_rs import files
from lorameta_rs.dataset import Example
from lorameta_rs.errors import InvalidBank

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

MAX_VOCAB_SIZE = 1 << 21
"""More ids than any model has. A count is kept for each id, so one huge id would fill memory."""

_BATCH = 1 << 17  # characters tokenised at a time; what is made of them takes some 10 MB


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizer.json`; read when it is first needed, and only as far as it is."""

    path: Path

    @classmethod
    def of(cls, tokenizer: Tokenizer | str | os.PathLike[str]) -> Tokenizer:
        """`tokenizer` itself, or the one at that path."""
        return tokenizer if isinstance(tokenizer, Tokenizer) else cls(Path(tokenizer))

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file, which tells whether two banks speak of the same ids.

        Raises:
            MissingFile, UnreadableFile: the file cannot be read.
        """
        return files.sha256(self.path)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that it can produce, added and special tokens included.

        Raises:
            InvalidBank: there is no id, or one past `MAX_VOCAB_SIZE`; and as `encode`.
        """
        # Ids may have gaps, so their number is not enough; what is put around every text
        # need not be in the vocabulary.
        vocabulary = self._backend.get_vocab(with_added_tokens=True).values()
        (around,) = self.encode([""])
        size = 1 + max((*vocabulary, *around.ids), default=-1)
        if size == 0:
            raise InvalidBank(f"`{self.path}`: it has no tokens")
        if size > MAX_VOCAB_SIZE:
            expected = f"expected one below {MAX_VOCAB_SIZE:,}"
            raise InvalidBank(f"`{self.path}`: its largest token id is {size - 1}, {expected}")
        return size

    def encode(self, texts: Sequence[str], *, placed: bool = False) -> list[tokenizers.Encoding]:
        """The tokens of each text with the special tokens that the model wants around it.

        The texts are shared out among all cores, and the interpreter is free meanwhile. Tokens that
        are `placed` know where in their text they stand, which takes half as long again.

        Raises:
            MissingFile, UnreadableFile: the file cannot be read.
            InvalidBank: it is no tokenizer, or has no tokens for a text.
        """
        backend = self._backend
        encode = backend.encode_batch if placed else backend.encode_batch_fast
        with self._faults("cannot encode a text"):
            return encode(list(texts), add_special_tokens=True)

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that a model is to go on from; errors as `encode`.

        Special tokens that a text would end with are left out: an answer follows.
        """
        found = []
        for encoding in self.encode(texts):
            ids = encoding.ids
            while ids and encoding.special_tokens_mask[len(ids) - 1]:
                ids = ids[:-1]
            found.append(ids or encoding.ids)
        return found

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of ids, without special tokens; errors as `encode`."""
        backend = self._backend
        with self._faults("cannot decode tokens"):
            return [backend.decode(list(ids), skip_special_tokens=True) for ids in rows]

    def token_ids(
        self, rows: Iterable[Example | list[int]]
    ) -> Iterator[list[tuple[list[int], int]]]:
        """The ids of the texts in `rows`, and those that are ids already, a batch at a time.

        Each comes with the number of ids before its answer: all of them where it has none.

        While the caller has one batch the next is in work, so reading the rows and counting
        their ids cost little time. Within a batch the order is not that of `rows`. Errors as
        `encode`. Who stops early, or presses Ctrl-C, waits for the batch in work at most.
        """
        worker = ThreadPoolExecutor(1)
        try:
            begun: Future[list[tuple[list[int], int]]] | None = None
            for batch in _batches(rows):
                following = worker.submit(self._batch_ids, batch)
                if begun is not None:
                    yield begun.result()
                begun = following
            if begun is not None:
                yield begun.result()
        finally:
            worker.shutdown(cancel_futures=True)

    def _batch_ids(self, batch: list[Example | list[int]]) -> list[tuple[list[int], int]]:
        ready = [(row, len(row)) for row in batch if not isinstance(row, Example)]
        examples = [row for row in batch if isinstance(row, Example)]
        answers = any(example.answer for example in examples)
        encodings = self.encode([example.text for example in examples], placed=answers)
        return ready + [
            (encoding.ids, _answer_start(encoding, example))
            for encoding, example in zip(encodings, examples, strict=True)
        ]

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        with files.reading(self.path) as file:
            content = file.read()
        with self._faults("not a tokenizer"):
            backend = tokenizers.Tokenizer.from_buffer(content)
        # Left over from training in some files: they would cut texts off and count padding.
        backend.no_truncation()
        backend.no_padding()
        return backend

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """Within this block, what the library raises is said to be `what` is wrong with the file.

        It raises nothing more precise than `Exception`, and where its Rust panics not even that.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise InvalidBank(f"`{self.path}`: {what}: {error}") from error


def _answer_start(encoding: tokenizers.Encoding, example: Example) -> int:
    """The first token of an answer: the one that holds its first character, if any does.

    White space at its beginning may be in no token.
    """
    start = len(example.before)
    blank = len(example.answer) - len(example.answer.lstrip())
    for character in (start, start + blank) if example.answer else ():
        token = encoding.char_to_token(character)
        if token is not None:
            return token
    return len(encoding.ids)


def _batches(rows: Iterable[Example | list[int]]) -> Iterator[list[Example | list[int]]]:
    """`rows` in order; a batch ends with the row that fills it."""
    batch: list[Example | list[int]] = []
    size = 0
    for row in rows:
        batch.append(row)
        # One more, so that empty rows fill one too.
        size += 1 + len(row.text if isinstance(row, Example) else row)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
