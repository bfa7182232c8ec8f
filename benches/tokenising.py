"""How fast a dataset is tokenised and counted, beside what `tokenizers` alone reaches.

The file is read and parsed within our time, not within theirs. Not named `tokenize`, which would
hide the standard library's module of that name from whatever a bench imports.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from lorameta_rs.fingerprint import token_distribution

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json")
    parser.add_argument("datasets", type=Path, nargs="+", help="jsonl with `input` and `output`")
    parser.add_argument("--megabytes", type=float, default=16, help="repeat them up to this size")
    parser.add_argument("--rounds", type=int, default=5, help="the best of so many counts")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.jsonl")
        once = b"".join(dataset.read_bytes() for dataset in options.datasets)
        path.write_bytes(once * max(1, round(options.megabytes * 1e6 / len(once))))
        compare(path, options.tokenizer, options.rounds)


def compare(path: Path, tokenizer: Path, rounds: int) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tokenizer))
    texts = [row_text(line) for line in path.read_bytes().splitlines()]
    characters = sum(map(len, texts))
    batches = [texts[i : i + 1000] for i in range(0, len(texts), 1000)]

    fingerprint = token_distribution(path, tokenizer=tokenizer)
    expected = np.bincount([i for text in texts for i in backend.encode(text).ids])
    assert np.array_equal(fingerprint.ids, np.flatnonzero(expected))
    assert np.array_equal(fingerprint.counts, expected[expected > 0])

    contenders: dict[str, Callable[[], object]] = {
        "token_distribution": lambda: token_distribution(path, tokenizer=tokenizer),
        "encode_batch": lambda: [backend.encode_batch(batch) and None for batch in batches],
        "encode_batch_fast": lambda: [
            backend.encode_batch_fast(batch) and None for batch in batches
        ],
    }
    # In turns, so that whatever else the machine does falls on all of them.
    seconds = [{name: timed(run) for name, run in contenders.items()} for _ in range(rounds)]
    best = {name: min(turn[name] for turn in seconds) for name in contenders}
    for name, time_taken in best.items():
        ratio = time_taken / best["token_distribution"]
        print(f"{name:20} {characters / time_taken / 1e6:7.2f} MB/s   ours / this: {ratio:.2f}")


def row_text(line: bytes) -> str:
    row = json.loads(line)
    output = row["output"]
    return str(row["input"] + (output if isinstance(output, str) else output[0]))


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
