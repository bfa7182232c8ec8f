"""A bank for the two-layer base of `golden/interop`, with a word for each of its 64 ids."""

from __future__ import annotations

import json
import shutil

import tokenizers
from tokenizers import models, pre_tokenizers, processors


def rows_of(shift, count=40):
    """Rows whose answer is the word `shift` after the first."""
    rows = [
        {"input": f"w{i} w{i + shift} w17", "output": f" w{i + shift}"} for i in range(5, 5 + count)
    ]
    return "\n".join(map(json.dumps, rows))


def write_bank(golden, folder):
    """Write three members of different ranks, with their datasets and the tokenizer."""
    for shift, name in enumerate(("a_r8", "b_r8", "e_r16"), 1):
        shutil.copytree(golden / "peft_combine" / "adapters" / name, folder / name)
        (folder / name / "train.jsonl").write_text(rows_of(shift, 20))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder):
    """Write a tokenizer with a word for each of the base's 64 ids."""
    words = {"<s>": 1} | {f"w{i}": i for i in range(64) if i != 1}
    model = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    model.save(str(folder / "tokenizer.json"))
