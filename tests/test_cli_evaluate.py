"""`evaluate` and `try` with the real llama.cpp on a base of two layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from words import write_tokenizer

from lorameta_rs.evaluate import Rows, doubts

pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel for this platform")
pytest.importorskip("rouge_score", reason="rouge-score is not installed")


@pytest.fixture(scope="module")
def base(golden):
    return golden / "interop" / "gguf" / "base.gguf"


@pytest.fixture(scope="module")
def adapter(golden):
    return golden / "peft_combine" / "adapters" / "a_r8"


@pytest.fixture
def files(tmp_path):
    """A dataset, and a tokenizer with a word for each of the base's 64 ids."""
    write_tokenizer(tmp_path)
    rows = [{"input": f"w{i} w{i + 5} w17", "output": f" w{i}"} for i in range(5, 45)]
    dataset = tmp_path / "test.jsonl"
    dataset.write_text("\n".join(json.dumps(row) for row in rows))
    return dataset, tmp_path / "tokenizer.json"


def test_scores_of_the_base_and_of_adapters(lorameta, base, adapter, files, golden, tmp_path):
    dataset, tokenizer = files
    gguf = golden / "interop" / "gguf" / "a_r8.folded.gguf"
    command = [
        *("evaluate", base, adapter, gguf, "--dataset", dataset, "--tokenizer", tokenizer),
        *("--most-tokens", "4", "--cache", tmp_path / "cache"),
    ]
    status, out, err = lorameta(*command, "--json")
    assert status == 0, err
    alone, peft, other = json.loads(out)
    assert [one["rows"] for one in (alone, peft, other)] == [40] * 3
    assert peft["answers"] == other["answers"] != alone["answers"]
    assert all(len(answer.split()) <= 4 for answer in alone["answers"])
    low, high = peft["rouge_l_interval"]
    assert low <= peft["rouge_l"] <= high
    kept = {path: path.read_text() for path in (tmp_path / "cache").iterdir()}
    assert len(kept) == 6
    # What is kept is what is scored: an answer that is put there counts.
    for path, text in kept.items():
        path.write_text(json.dumps(["w0"] * len(json.loads(text))))
    status, out, _ = lorameta(*command, "--json")
    assert {answer for one in json.loads(out) for answer in one["answers"]} == {"w0"}
    for path in kept:
        path.write_text("half a fi")
    status, out, _ = lorameta(*command)
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == ["adapter", "(base)", str(adapter), str(gguf)]
    assert float(lines[2][1]) == pytest.approx(peft["rouge_l"], abs=1e-3)


def test_questions_and_answers_side_by_side(lorameta, base, adapter, files):
    dataset, tokenizer = files
    command = ["try", base, adapter, "--tokenizer", tokenizer, "--most-tokens", "3"]
    status, out, err = lorameta(*command, "--dataset", dataset, "--rows", "2", "--json")
    assert status == 0, err
    rows = json.loads(out)
    assert [row["prompt"] for row in rows] == ["w5 w10 w17", "w6 w11 w17"]
    assert [row["reference"] for row in rows] == [" w5", " w6"]
    assert list(rows[0]["answers"]) == [str(base), str(adapter)]
    status, out, _ = lorameta(*command, "--prompt", "w5 w10 w17")
    said = dict(line.split("\t") for line in out.splitlines() if line)
    assert said == {"prompt": "w5 w10 w17", **rows[0]["answers"]}


def test_what_cannot_be_asked(lorameta, base, adapter, files, tmp_path):
    dataset, _ = files
    assert lorameta("try", base, adapter)[0] == 2
    assert lorameta("try", base, adapter, "--prompt", "x", "--dataset", dataset)[0] == 2
    (tmp_path / "plain.txt").write_text("a\nb")
    status, _, err = lorameta("evaluate", base, "--dataset", tmp_path / "plain.txt")
    assert (status, "row 1 has no answer" in err) == (1, True)
    rows = [json.loads(row) for row in dataset.read_text().splitlines()[:4]]
    rows[1]["output"] = ""
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    status, _, err = lorameta("evaluate", base, "--dataset", tmp_path / "some.jsonl")
    assert (status, "row 2 has no answer" in err) == (1, True), err
    status, _, err = lorameta("try", base, adapter, "--prompt", "x", "--rows", "3")
    assert (status, "--rows has no effect beside --prompt" in err) == (2, True), err
    status, _, err = lorameta("evaluate", tmp_path / "none.gguf", "--dataset", dataset)
    assert (status, "none.gguf" in err) == (1, True)
    status, _, err = lorameta("evaluate", adapter, "--dataset", dataset)
    assert status == 1


def test_a_base_whose_tokenizer_does_not_know_the_text_is_warned_of(lorameta, base, files):
    dataset, tokenizer = files
    words = "120 words are 0 tokens: the tokenizer in"
    command = ["evaluate", base, "--dataset", dataset, "--most-tokens", "2"]
    status, _, err = lorameta(*command)
    assert (status, words in err, "--tokenizer" in err) == (0, True, True), err
    assert "warning" not in lorameta(*command, "--tokenizer", tokenizer)[2]
    _, _, err = lorameta("try", base, base.parent / "a_r8.folded.gguf", "--prompt", "w5 w7")
    assert "2 words are 0 tokens" in err


def test_empty_answers_are_doubted_where_the_prompts_are_not():
    rows = Rows(["one two"], [])
    assert "every answer is empty" in doubts(Path("base.gguf"), rows, [[""], [""]], [5])
    assert doubts(Path("base.gguf"), rows, [[""], ["a"]], [5]) == ""


def test_a_prompt_beyond_the_context_is_named(lorameta, base, files, tmp_path):
    _, tokenizer = files
    dataset = tmp_path / "long.jsonl"
    rows = [{"input": "w5 " * count, "output": "w7"} for count in (3, 127, 140, 126)]
    dataset.write_text("\n".join(map(json.dumps, rows)))
    command = ["evaluate", base, "--dataset", dataset, "--tokenizer", tokenizer]
    status, _, err = lorameta(*command, "--most-tokens", "1")
    assert status == 1
    # One token begins each text; the base was made for 128.
    assert "row 3 asks with 141 tokens, and the model's context is 128" in err
    assert "here 2" in err
    dataset.write_text("\n".join(map(json.dumps, (rows[0], rows[3]))))
    assert lorameta(*command, "--most-tokens", "1")[0] == 0


def test_an_adapter_that_is_not_loaded_is_named_as_it_was_given(lorameta, base, make_bank):
    bank = make_bank(["a"], modules={"model.layers.0.mlp.up_proj": (32, 40)}).folder
    status, _, err = lorameta("try", base, bank / "a", "--prompt", "x")
    assert status == 1
    assert f"does not load `{base}`, `{bank / 'a'}`" in err
    assert "0.gguf" not in err
