"""Datasets: what every format gives, and what is said about the bad ones."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path

import pytest

from lorameta_rs.dataset import DatasetWarning, Example, examples, find, texts
from lorameta_rs.errors import (
    InvalidDataset,
    InvalidSetting,
    LoraMetaError,
    MissingExtra,
    MissingFile,
    UnreadableFile,
)

MALFORMED = Path(__file__).parent / "golden" / "malformed"
ENTRIES = json.loads((MALFORMED / "datasets.json").read_text())


def entries(expect):
    return [pytest.param(entry, id=entry["path"]) for entry in ENTRIES if entry["expect"] == expect]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read(entry):
    return list(texts(MALFORMED / "datasets" / entry["path"], vocab_size=32000))


@pytest.mark.parametrize("entry", entries("accept"))
def test_good_and_borderline_files_are_read(entry):
    assert all(read(entry))


@pytest.mark.parametrize("entry", entries("warn"))
def test_doubtful_files_are_read_with_a_warning(entry):
    with pytest.warns(DatasetWarning) as caught:
        assert len(read(entry)) == 1
    for name in (entry["path"], *entry["message_should_name"]):
        assert name in str(caught[0].message)


@pytest.mark.parametrize("entry", entries("error"))
def test_bad_files_are_refused_by_name(entry):
    with pytest.raises(LoraMetaError) as caught:
        read(entry)
    for name in (entry["path"], *entry["message_should_name"]):
        assert name in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"input": "a ", "output": ["b", "c"]}, "a b"),
        ({"input": "a", "output": "b", "text": "x"}, "ab"),
        ({"instruction": "a", "input": "b", "output": "c"}, "a\nbc"),
        ({"instruction": "a", "input": "", "output": "c"}, "ac"),
        ({"instruction": "a", "input": None, "output": "c"}, "ac"),
        ({"instruction": "a", "output": "c"}, "ac"),
        ({"prompt": "a", "completion": "b"}, "ab"),
        ({"question": "a", "answer": "b"}, "ab"),
        ({"text": "a\nb"}, "a\nb"),
        ({"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}, "a\nb"),
        ({"messages": [{"content": None}, {"content": [{"text": "b"}, {"image": 1}]}]}, "b"),
        ({"prompt": [{"content": "a"}], "completion": [{"content": "b"}]}, "ab"),
        ({"input_ids": [0, 5, 31999]}, [0, 5, 31999]),
        ({"text": "x", "input_ids": [1]}, "x"),
    ],
)
def test_the_text_of_a_row(write, row, text):
    assert list(texts(write("d.jsonl", json.dumps(row)))) == [text]


def test_columns_are_joined_by_a_newline(write):
    path = write("d.jsonl", '{"a": "x", "b": ["y"], "c": "", "d": "z", "ids": [7]}')
    assert list(texts(path, columns=["d", "c", "a", "b"])) == ["z\nx\ny"]
    assert list(texts(path, columns=["ids"])) == [[7]]
    with pytest.raises(
        InvalidDataset, match=r"line 1: no field `e`, found `a`, `b`.*\n`--columns`"
    ):
        list(texts(path, columns=["e"]))


TASK = {
    "Contributors": ["somebody"],
    "Definition": ["Add them."],
    "Positive Examples": [{"input": "0", "output": "0", "explanation": "none"}],
    "Instances": [{"id": "1", "input": "é", "output": ["b,", "x"]}, {"input": "c", "output": "d"}],
    "Instance License": ["MIT"],
}
FORMATS = {
    "d.jsonl": '{"input": "é", "output": "b,"}\n\n{"input": "c", "output": "d"}',
    "d.json": ' [ {"input": "é", "output": "b,"} ,{"input": "c", "output": "d"}\n]\n',
    "task.json": json.dumps(TASK, indent=4),
    "task in a line.json": json.dumps(TASK, ensure_ascii=False),
    "lines.json": '{"input": "é", "output": "b,"}\n{"input": "c", "output": "d"}\n',
    "blank.json": '\n \n{"input": "é", "output": "b,"}\n\n{"input": "c", "output": "d"}\n',
    "d.csv": 'input,output\r\né,"b,"\r\n\r\nc,d',
    "d.tsv": "input\toutput\né\tb,\nc\td\n",
    "d.txt": "éb,\n \ncd",
    "D.TXT": "\ufeff" + "éb,\r\ncd\r\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_say_the_same_plain_and_compressed(write, name):
    content = FORMATS[name].encode()
    assert list(texts(write(name, content))) == ["éb,", "cd"]
    assert list(texts(write(f"{name}.gz", gzip.compress(content)))) == ["éb,", "cd"]


def test_parquet_without_pyarrow_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lorameta-rs\[parquet\]'"):
        list(texts(write("d.parquet", b"")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "x" * 300, "d.jsonl`, line 1: longer than 200 bytes"),
        ("d.txt", "a\n" + "x" * 300, "line 2: longer than 200 bytes"),
        ("d.json", '[{"text": "a"}, {"text": "' + "x" * 300, "row 2: not valid JSON: Unterminated"),
        ("d.json", "", "expected an array of rows"),
        ("d.json", "3", "expected an array of rows"),
        ("d.json", "[]", "the dataset has no rows"),
        ("d.json", "[1]", "row 1: expected an object with named fields, found the number 1"),
        ("d.json", '[{"text": "a"} {', "row 1: not valid JSON: expected `,` or `]` after it"),
        ("d.json", '[{"text": "a"},]', "row 2: not valid JSON: Expecting value"),
        ("d.json", '[{"text": "a"}] x', "something follows the end of the JSON"),
        ("d.json", '[{"text": "a"}', "row 1: not valid JSON: expected `,` or `]` after it"),
        ("d.json", b'[{"text": "\xff"}]', "not UTF-8"),
        ("d.json", '{"text": "a"}\n{"text": b}', "line 2: not valid JSON at column 10"),
        ("d.json", '{"text": "a"} x', "line 1: not valid JSON"),
        ("d.json", '{\n"a": 1,\n"b": []\n}', "an object with `a`, `b`: expected an array of rows"),
        ("d.json", "{\n}", "an object with no fields: expected an array of rows"),
        ("d.json", '{"Instances":\n3}', "field `Instances`: expected an array of rows"),
        ("d.json", '{"Instances": []}', "the dataset has no rows"),
        ("d.json", '{"Instances": []}}', "line 1: not valid JSON"),
        ("d.json", '{"Instances":\n[]}}', "something follows the end of the JSON"),
        ("d.json", '{"Instances":\n[],"Instances":[]}', "`Instances` is there twice"),
        ("d.json", '{"Instances": [{"text": "a"}, {"text"', "row 2: not valid JSON"),
        ("d.json", '{"Instances": [{"text": "a"}', "row 1: not valid JSON: expected `,` or `]`"),
        ("d.json", '{"Instances": [{"text": "a"}],', 'expected a name in `"`'),
        ("d.json", '{\n"a"', "field `a`: not valid JSON: expected `:`"),
        ("d.json", '{\n"a": 1 2', "field `a`: not valid JSON: expected `,` or `}` after it"),
        ("d.json", '{\n"a": "' + "x" * 300, "field `a`: not valid JSON: Unterminated"),
        ("d.json", "[" * 100, "row 1: not valid JSON"),
        ("d.csv", 'text\n"' + "x\n" * 200, "line 2: not valid CSV: longer than 200 characters"),
        ("d.csv", 'text\n"x', "line 2: not valid CSV: unexpected end of data"),
        ("d.tsv", "input,output\na,b", "`input,output`: .csv has commas between columns"),
        ("d.txt", "h\0i\0", "not UTF-8 text: it has a NUL byte"),
        ("d.jsonl", '{"\\u001b[2J": 1}', "no known text, found `\\x1b[2J`"),
        ("d.jsonl", '{"messages": [{"content": 1}]}', "message 1 of field `messages` has no text"),
        (
            "d.jsonl",
            '{"messages": ["a", 1]}\n{"messages": []}',
            "line 2: field `messages` holds an",
        ),
        (
            "d.jsonl",
            '{"messages": [{"role": "user"}]}',
            "message 1 of field `messages` has no text",
        ),
        ("d.jsonl", '{"input": "a", "output": [5]}', "an array that begins with the number 5, ex"),
        ("d.jsonl", '{"text": [1, 2]}', "field `text` holds an array that begins with the number"),
        ("d.jsonl", '{"input_ids": "abc"}', "`input_ids` holds the text `abc`, expected an array"),
        ("d.jsonl", '{"input_ids": [true]}', "holds true, no token id"),
        ("d.csv", "text\ra\rb", "line 1: not valid CSV: its lines end with a lone CR"),
        ("d.tsv", 'a\tb\n"c" d\te', "line 2: not valid CSV: '\t' expected after"),
        ("d.tsv", 'a\tb\n"c" d\te', "stands in quotes, with each"),
        ("d.xlsx", "", "unknown format: expected .jsonl, .json, .csv"),
        ("d.gz", "", "unknown format"),
        ("d.jsonl.gz", "text", "not a whole gzip file"),
        ("d.jsonl.gz", gzip.compress(os.urandom(99))[:50], "not a whole gzip file"),
        ("d.parquet.gz", gzip.compress(b"PAR1"), "not valid parquet"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(write, name, content, message):
    path = write(name, content)
    with pytest.raises(InvalidDataset) as caught:
        list(texts(path, max_row=200))
    assert f"`{path}`" in str(caught.value)
    assert message in str(caught.value)


def test_messages_do_not_echo_the_data(write):
    with pytest.raises(InvalidDataset) as caught:
        list(texts(write("d.jsonl", json.dumps({"x" * 1000: 1, "y" * 1000: 2}))))
    assert "x" * 50 in str(caught.value)
    assert "x" * 100 not in str(caught.value)


@pytest.mark.parametrize("columns", ["text", []])
def test_columns_are_a_list_of_names(write, columns):
    with pytest.raises(InvalidSetting, match="expected a list of one or more fields"):
        list(texts(write("d.txt", "a"), columns=columns))


def test_integers_of_any_length_may_stand_in_unused_fields(write):
    path = write("d.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}")
    assert list(texts(path)) == ["a"]


def test_a_repeated_field_is_warned_about_once(write):
    with pytest.warns(DatasetWarning, match=r"line 2: field `text` is given twice") as caught:
        list(texts(write("d.jsonl", '{"text": "a"}\n' + '{"text": "a", "text": "b"}\n' * 9)))
    assert len(caught) == 1


def test_json_values_may_cross_the_ends_of_what_is_read_at_a_time(write):
    rows = [{"text": "é" * n} for n in (1, 70_000, 1, 200_000, 65_000)]
    path = write("d.json", json.dumps(rows, ensure_ascii=False, indent=1))
    assert list(texts(path)) == [row["text"] for row in rows]


@pytest.mark.parametrize("number", ["123456", "-1.25", "1e+5", "0"])
def test_json_numbers_may_cross_the_ends_of_what_is_read_at_a_time(write, number):
    for before in range((1 << 16) - 40, (1 << 16) + 1):
        start = '{"d": "' + "x" * (before - 20) + '", "n": '
        path = write("d.json", start + number + ', "Instances": [{"text": "a"}]}')
        assert list(texts(path)) == ["a"], before


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("folder", "zero", "pipe"):
        path = tmp_path / f"{name}.jsonl"
        with pytest.raises(UnreadableFile, match=str(path)) as caught:
            list(texts(path))
        assert (caught.value.filename, caught.value.errno is None) == (str(path), False)


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(MissingFile) as caught:
        list(texts(tmp_path / "d.jsonl"))
    assert caught.value.filename == str(tmp_path / "d.jsonl")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt", "d.jsonl.gz", "d.json.gz"])
def test_memory_does_not_grow_with_the_rows(write, name):
    row, rows = '{"text": "some words that make a row"}', 30_000
    content = {
        "d.jsonl": f"{row}\n" * rows,
        "d.json": f"[{f'{row},' * (rows - 1)}{row}]",
        "d.csv": "text\n" + "some words that make a row\n" * rows,
        "d.txt": "some words that make a row\n" * rows,
    }[name.removesuffix(".gz")].encode()
    path = write(name, gzip.compress(content, 1) if name.endswith(".gz") else content)
    size = len(content)
    del content
    tracemalloc.start()
    try:
        assert sum(1 for _ in texts(path)) == rows
        assert tracemalloc.get_traced_memory()[1] < size // 2
    finally:
        tracemalloc.stop()


def test_a_column_that_is_there_twice_among_many_is_named(write):
    header = ",".join(f"c{i}" for i in range(50_000))
    with pytest.raises(InvalidDataset, match="column `c7` is there twice"):
        list(texts(write("d.csv", f"{header},c7\n")))


def test_the_csv_limit_of_the_process_is_left_as_it_was(write):
    limit = csv.field_size_limit()
    path = write("d.csv", f"text\n{'x' * (limit + 1)}\ny\n")
    for text in texts(path):
        assert csv.field_size_limit() == limit
        assert text
    assert csv.field_size_limit() == limit


def test_find_prefers_train_then_the_formats_in_order(tmp_path):
    assert find(tmp_path) is None
    for name in ("data.jsonl", "dataset.parquet", "train.txt.gz", "train.csv.gz", "train.csv"):
        (tmp_path / name).touch()
        assert find(tmp_path) == tmp_path / name
    (tmp_path / "train.jsonl").mkdir()
    assert find(tmp_path) == tmp_path / "train.csv"
    with pytest.raises(MissingFile):
        find(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("row", "columns", "example"),
    [
        ({"input": "a", "output": ["b", "c"]}, None, ("a", "b")),
        ({"instruction": "a", "input": "", "output": "b"}, None, ("a", "b")),
        ({"prompt": "a", "completion": ""}, None, ("a", "")),
        (
            {"messages": [{"content": "a"}, {"content": "b"}, {"content": "c"}]},
            None,
            ("a\nb\n", "c"),
        ),
        ({"messages": [{"content": "a"}]}, None, ("a", "")),
        ({"text": "a"}, None, ("a", "")),
        ({"x": "a", "y": "b", "z": "c"}, ["z", "x", "y"], ("c\na\n", "b")),
        ({"x": "a", "y": "b", "z": ""}, ["x", "y", "z"], ("a\nb", "")),
        ({"x": "", "y": "", "z": "c"}, ["x", "y", "z"], ("", "c")),
        ({"messages": [{"content": "a"}, {"content": "b"}, {"content": None}]}, None, ("a\nb", "")),
        ({"messages": [{"content": "a"}, {"content": [{"image": 1}]}]}, None, ("a", "")),
    ],
)
def test_answers_are_told_apart(write, row, columns, example):
    path = write("d.jsonl", json.dumps(row))
    assert list(examples(path, columns=columns)) == [Example(*example)]
    assert list(texts(path, columns=columns)) == ["".join(example)]
