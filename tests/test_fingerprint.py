"""Fingerprints: counts as the authors have them, whole files, and staleness."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lorameta_rs.dataset import DatasetWarning
from lorameta_rs.errors import FileChanged, InvalidBank, InvalidDataset, MissingFile, UnreadableFile
from lorameta_rs.fingerprint import DatasetRecord, Fingerprint, Fingerprints, token_distribution
from lorameta_rs.tokenizer import Tokenizer

PAPER = Path(__file__).parent / "golden" / "paper"
TOKENIZER = Tokenizer(PAPER / "tokenizer" / "tokenizer.json")
DATASETS = sorted((PAPER / "datasets").glob("*.jsonl"))


def small(**changes):
    fingerprint = Fingerprint(
        np.array([1, 5], np.uint32),
        np.array([2, 3], np.uint64),
        vocab_size=8,
        rows=2,
        tokenizer="ab" * 32,
        columns=("x", "y"),
        dataset=DatasetRecord("train.jsonl", 10, 20, "cd" * 32),
    )
    return dataclasses.replace(fingerprint, **changes)


def equal(a, b):
    arrays = ("ids", "counts", "relations", "parts")
    scalars = [{k: v for k, v in vars(f).items() if k not in arrays} for f in (a, b)]
    assert list(a.parts) == list(b.parts)
    for name in a.parts:
        assert all(map(np.array_equal, a.parts[name], b.parts[name]))
    assert (a.ids.dtype, a.counts.dtype) == (b.ids.dtype, b.counts.dtype) == ("u4", "u8")
    return scalars[0] == scalars[1] and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids", "counts")
    )


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: path.name)
def test_counts_are_the_authors(path):
    with (PAPER / "token_ids.jsonl").open() as file:
        records = {record["dataset"]: record["ids"] for record in map(json.loads, file)}
    expected = np.bincount(records[int(path.stem)], minlength=512)
    fingerprint = token_distribution(path, tokenizer=TOKENIZER)
    dense = np.zeros(fingerprint.vocab_size, np.uint64)
    dense[fingerprint.ids] = fingerprint.counts
    assert fingerprint.vocab_size == 512
    assert fingerprint.tokens == expected.sum()
    np.testing.assert_array_equal(dense, expected)


@given(rows=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_counts_are_those_of_each_row_alone(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "d.json"
    path.write_text(json.dumps([{"text": "a"}, *({"text": row} for row in rows)]))
    plain = tokenizers.Tokenizer.from_file(str(TOKENIZER.path))
    expected = Counter(i for row in ["a", *rows] for i in plain.encode(row).ids)
    fingerprint = token_distribution(path, tokenizer=TOKENIZER)
    found = dict(zip(fingerprint.ids.tolist(), fingerprint.counts.tolist(), strict=True))
    assert found == expected
    assert fingerprint.ids.tolist() == sorted(expected)
    assert fingerprint.rows == len(rows) + 1


def test_ready_token_ids_are_counted_as_they_are(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"input_ids": [5, 2, 5]}\n{"input_ids": []}\n')
    fingerprint = token_distribution(str(path), tokenizer=str(TOKENIZER.path))
    assert (fingerprint.ids.tolist(), fingerprint.counts.tolist()) == ([2, 5], [1, 2])
    path.write_text('{"input_ids": [512]}')
    with pytest.raises(InvalidDataset, match="512, no token id: those are integers from 0 to 511"):
        token_distribution(path, tokenizer=TOKENIZER)


def test_what_is_known_about_a_fingerprint(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"a": "x"}\n' * 20_000)
    seen = []
    fingerprint = token_distribution(path, tokenizer=TOKENIZER, columns=["a"], progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == fingerprint.rows == 20_000
    assert fingerprint.columns == ("a",)
    assert fingerprint.tokenizer == TOKENIZER.sha256
    assert fingerprint.dataset == DatasetRecord.of(path)


def test_datasets_without_tokens(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": ""}\n')
    with pytest.warns(DatasetWarning, match="the text of every row is empty"):
        assert token_distribution(path, tokenizer=TOKENIZER).ids.tolist() == [1]
    path.write_text('{"input_ids": []}\n')
    with (
        pytest.warns(DatasetWarning, match="empty"),
        pytest.raises(InvalidDataset, match=r"d\.jsonl`: the dataset has no tokens"),
    ):
        token_distribution(path, tokenizer=TOKENIZER)


def test_a_dataset_that_changes_meanwhile_is_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(FileChanged, match=r"d\.jsonl"):
        token_distribution(path, tokenizer=TOKENIZER, progress=lambda _: os.utime(path, ns=(1, 1)))


@given(
    counts=st.dictionaries(st.integers(0, 99), st.integers(1, 2**50), min_size=1),
    columns=st.none() | st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple),
    dataset=st.none() | st.just(DatasetRecord("é.txt", 0, -1, "")),
)
def test_saved_and_loaded_it_is_the_same(tmp_path_factory, counts, columns, dataset):
    path = tmp_path_factory.mktemp("saved") / "fingerprint.safetensors"
    ids = sorted(counts)
    fingerprint = small(
        ids=np.array(ids, np.uint32),
        counts=np.array([counts[i] for i in ids], np.uint64),
        vocab_size=100,
        columns=columns,
        dataset=dataset,
    )
    fingerprint.save(path)
    assert equal(Fingerprint.load(path), fingerprint)


def test_a_saved_file_is_whole_readable_and_reproducible(tmp_path):
    path = tmp_path / "f.safetensors"
    umask = os.umask(0o022)
    try:
        small().save(path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    first = path.read_bytes()
    small().save(path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(MissingFile):
        small().save(tmp_path / "nowhere" / "f.safetensors")


def test_nothing_is_left_where_a_file_cannot_be_replaced(tmp_path):
    path = tmp_path / "f.safetensors"
    path.mkdir()
    with pytest.raises(UnreadableFile, match=r"f\.safetensors"):
        small().save(path)
    assert list(tmp_path.iterdir()) == [path]


def test_further_tensors_are_left_alone(tmp_path):
    path = tmp_path / "f.safetensors"
    about = content_of(small(), path)[1]
    tensors = {
        "all.ids": small().ids,
        "all.counts": small().counts,
        "other.ids": np.zeros(3, np.uint32),
    }
    path.write_bytes(safetensors.numpy.save(tensors, {"fingerprint": json.dumps(about)}))
    assert equal(Fingerprint.load(path), small())


def content_of(fingerprint, path):
    fingerprint.save(path)
    with safetensors.safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["fingerprint"])
    return safetensors.numpy.load_file(path), about


BROKEN = {
    "format": ({"format": 1}, {}),
    "vocab_size": ({"vocab_size": 5}, {}),
    "huge vocabulary": ({"vocab_size": 1 << 40}, {}),
    "tokens": ({"tokens": 4}, {}),
    "rows": ({"rows": "2"}, {}),
    "negative rows": ({"rows": -1}, {}),
    "columns": ({"columns": [1]}, {}),
    "dataset": ({"dataset": {"name": "x"}}, {}),
    "id dtype": ({}, {"all.ids": np.array([1, 5], np.int64)}),
    "id shape": ({}, {"all.ids": np.array([[1, 5]], np.uint32)}),
    "descending": ({}, {"all.ids": np.array([5, 1], np.uint32)}),
    "twice": ({}, {"all.ids": np.array([5, 5], np.uint32)}),
    "one id": ({}, {"all.ids": np.array([5], np.uint32)}),
    "zero": ({}, {"all.counts": np.array([0, 5], np.uint64)}),
    "wrap": ({}, {"all.counts": np.array([2**64 - 1, 6], np.uint64)}),
    "empty": ({"tokens": 0}, {"all.ids": np.uint32([]), "all.counts": np.uint64([])}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_a_fingerprint_is_refused(tmp_path, name):
    path = tmp_path / "f.safetensors"
    tensors, about = content_of(small(), path)
    about.update(BROKEN[name][0])
    tensors.update(BROKEN[name][1])
    path.write_bytes(safetensors.numpy.save(tensors, {"fingerprint": json.dumps(about)}))
    with pytest.raises(InvalidBank, match="not a fingerprint") as caught:
        Fingerprint.load(path)
    assert f"`{path}`" in str(caught.value)
    assert "lorameta-rs index" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        safetensors.numpy.save({}, {"fingerprint": "[" * 100_000}),
        safetensors.numpy.save({}, {"fingerprint": '{"format": 1'}),
        safetensors.numpy.save({"all.ids": np.zeros(1, np.uint32)}),
    ],
    ids=["empty", "noise", "deep", "cut", "no metadata"],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(InvalidBank, match=r"f\.safetensors`: not a fingerprint"):
        Fingerprint.load(tmp_path / "f.safetensors")


def test_missing_fingerprints_are_missing_files(tmp_path):
    with pytest.raises(MissingFile):
        Fingerprint.load(tmp_path / "f.safetensors")


def test_stacked_fingerprints_are_the_rows_of_a_matrix():
    other = small(ids=np.array([7], np.uint32), counts=np.array([9], np.uint64))
    stacked = Fingerprints.stack([small(), other, small()])
    assert len(stacked) == 3
    assert (stacked.indptr.dtype, stacked.ids.dtype, stacked.counts.dtype) == ("i8", "u4", "u8")
    assert stacked.indptr.tolist() == [0, 2, 3, 5]
    assert stacked.ids.tolist() == [1, 5, 7, 1, 5]
    assert stacked.counts.tolist() == [2, 3, 9, 2, 3]
    assert stacked.vocab_size == 8


@pytest.mark.parametrize(
    "others", [[], [small(), small(vocab_size=9)], [small(tokenizer="x"), small()]]
)
def test_fingerprints_of_different_tokenizers_do_not_stack(others):
    with pytest.raises(InvalidBank, match="fingerprint"):
        Fingerprints.stack(others)


def test_staleness(tmp_path):
    path = tmp_path / "train.jsonl"
    shutil.copyfile(DATASETS[0], path)
    fresh = token_distribution(path, tokenizer=TOKENIZER)
    assert fresh.staleness(dataset=path, tokenizer=TOKENIZER) is None
    assert fresh.staleness(tokenizer=TOKENIZER) is None  # published without its data

    os.utime(path, ns=(1, 1))  # copied or cloned: other times, same bytes
    assert fresh.staleness(dataset=path) is None
    path.write_bytes(path.read_bytes().replace(b"sentence", b"SENTENCE"))
    assert "has changed" in fresh.staleness(dataset=path)

    assert "the fields `a`, `b`" in fresh.staleness(columns=["a", "b"])
    assert dataclasses.replace(fresh, columns=("a",)).staleness() is None
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER.path.read_bytes() + b"\n")
    other = Tokenizer(tmp_path / "tokenizer.json")
    assert "another tokenizer" in fresh.staleness(tokenizer=other)
    larger = dataclasses.replace(fresh, vocab_size=513)
    assert "another tokenizer, of 513 ids" in larger.staleness(tokenizer=TOKENIZER)
    unrecorded = dataclasses.replace(fresh, dataset=None)
    assert "does not say" in unrecorded.staleness(dataset=path)


def test_relations_are_those_of_the_first_rows(tmp_path):
    row = json.dumps({"input": "to be or not", "output": "not"}) + "\n"
    found = []
    for count in (4096, 4097, 9000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text(row * count)
        found.append(token_distribution(path, tokenizer=TOKENIZER))
    assert [one.rows for one in found] == [4096, 4097, 9000]
    assert found[0].relations.sum() > 4096
    assert all(np.array_equal(one.relations, found[0].relations) for one in found)
    found[0].save(tmp_path / "f.safetensors")
    assert np.array_equal(
        Fingerprint.load(tmp_path / "f.safetensors").relations, found[0].relations
    )
