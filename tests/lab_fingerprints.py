"""Makes `golden/lab_fingerprints.safetensors`: the token counts of the lab bank's 48 datasets.

    python tests/lab_fingerprints.py LAB

LAB holds `base/tokenizer.json` and `bank/NAME/train.jsonl`; a text is a row's input and output with
nothing between, tokenised with special tokens. The file has `indptr`, `ids` and `counts`, and in
its metadata the members' names, their task families and the size of the vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

OUT = Path(__file__).parent / "golden" / "lab_fingerprints.safetensors"


def main(lab: Path) -> None:
    tokenizer = Tokenizer.from_file(str(lab / "base" / "tokenizer.json"))
    folders = sorted(path.parent for path in lab.glob("bank/*/train.jsonl"))
    rows = [token_counts(folder / "train.jsonl", tokenizer) for folder in folders]
    indptr = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    pairs = np.array([pair for row in rows for pair in row])
    names = [folder.name for folder in folders]
    families = {task["id"]: task["family"] for task in json.loads((lab / "tasks.json").read_text())}
    save_file(
        {
            "indptr": indptr,
            "ids": pairs[:, 0].astype(np.uint32),
            "counts": pairs[:, 1].astype(np.uint64),
        },
        OUT,
        metadata={
            "names": json.dumps(names),
            "families": json.dumps([families[name] for name in names]),
            "vocab_size": str(tokenizer.get_vocab_size()),
        },
    )


def token_counts(dataset: Path, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    counts: Counter[int] = Counter()
    for line in dataset.read_text().splitlines():
        row = json.loads(line)
        counts.update(tokenizer.encode(row["input"] + row["output"]).ids)
    return sorted(counts.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
