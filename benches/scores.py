"""`evaluate` through llama.cpp beside scores that transformers and PEFT gave, task by task.

    python benches/scores.py LAB [--cache FOLDER]

LAB holds `base.gguf`, `base/tokenizer.json`, `bank/` with a `test.jsonl` for each member, and
`scores.json` with Rouge-L of the base and of the fine-tuned adapters on the first 40 rows, of 24
tokens at most. Takes minutes; with a cache answers are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from lorameta_rs.evaluate import Rows, evaluate
from lorameta_rs.tokenizer import Tokenizer

ROWS, TOKENS = 40, 24
LARGEST = 0.01


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("lab", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--tasks", type=int, help="as many of the first; all by default")
    arguments = parser.parse_args()
    lab, bank = arguments.lab, arguments.lab / "bank"
    tokenizer = Tokenizer(lab / "base" / "tokenizer.json")
    known = {
        one["name"]: one["tasks"]
        for one in json.loads((lab / "scores.json").read_text())["scores"]
        if one["name"] in ("base", "fine-tuned") and one["bank"] in ("-", "same")
    }
    apart: dict[str, float] = {}
    for task in sorted(known["base"])[: arguments.tasks]:
        rows = Rows.of(bank / task / "test.jsonl", tokenizer, most=ROWS)
        with tempfile.TemporaryDirectory() as folder:
            found = evaluate(
                lab / "base.gguf",
                [bank / task],
                rows,
                folder=Path(folder),
                cache=arguments.cache,
                most_tokens=TOKENS,
            )
        for name, one in zip(("base", "fine-tuned"), found, strict=True):
            apart[f"{task}, {name}"] = abs(one.mean("rouge_l") - known[name][task][0])
    worst = max(apart, key=apart.__getitem__)
    print(f"{len(apart)} Rouge-L, {apart[worst]:.5f} apart at most ({worst})")
    assert apart[worst] <= LARGEST


if __name__ == "__main__":
    main()
