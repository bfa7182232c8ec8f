"""What `index` makes: fingerprints that are made once, hashes, and the bank's own distances."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import reference

from lorameta_rs import Bank, Fingerprint, files, index
from lorameta_rs.distance import pairwise
from lorameta_rs.errors import InvalidBank, InvalidDataset, MissingFile, UnreadableFile
from lorameta_rs.index import (
    Index,
    hash_adapters,
    leave_out_not_finite,
    make_fingerprints,
    nearest_distances,
)
from lorameta_rs.parts import StoredParts
from lorameta_rs.relevance import leave_one_out_nearest
from lorameta_rs.shape import delta_norms

TEXTS = {
    "a": "where is the window\nthe window is here\n",
    "b": "two and two are four\nthree and three are six\n",
    "c": "where are four windows\nsix and three\n",
}


@pytest.fixture
def folder(make_bank):
    """A bank of three members with datasets, and a tokenizer."""
    return make_bank({name: {"text": text} for name, text in TEXTS.items()}, tokenizer=True).folder


@pytest.fixture
def indexed(folder):
    """The same, with fingerprints."""
    make_fingerprints(Bank(folder))
    return folder


def test_fingerprints_are_made_once(folder):
    told = []
    assert make_fingerprints(Bank(folder), progress=told.append) == dict.fromkeys("abc", True)
    assert told == ["a", "b", "c"]
    before = [(folder / name / "fingerprint.safetensors").stat().st_mtime_ns for name in "abc"]
    again = Bank(folder)
    assert again.unfingerprinted() == {}
    assert make_fingerprints(again) == {}
    after = [(folder / name / "fingerprint.safetensors").stat().st_mtime_ns for name in "abc"]
    assert after == before
    assert (again.left_out, again.notes) == ({}, [])
    assert len(again.fingerprints) == 3


def test_what_was_made_is_read_from_its_files(folder):
    """So that the parts of many datasets take no memory, and their counts lie side by side."""
    bank = Bank(folder)
    make_fingerprints(bank)
    made = [bank.fingerprint(member) for member in bank.members]
    assert all(isinstance(one.parts, StoredParts) for one in made)
    assert np.shares_memory(bank.fingerprints.counts, made[0].counts)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("dataset", "has changed"),
        ("tokenizer", "another tokenizer"),
        ("columns", "it was made from the fields that are recognised, not the fields `text`"),
        ("gone", "it has no fingerprint"),
        ("broken", "its fingerprint cannot be read"),
    ],
)
def test_what_is_stale_is_made_again(indexed, change, reason):
    if change == "dataset":
        (indexed / "b" / "train.txt").write_text("ten and ten\n")
    elif change == "tokenizer":
        text = (indexed / "tokenizer.json").read_text(encoding="utf-8")
        (indexed / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    elif change == "gone":
        (indexed / "b" / "fingerprint.safetensors").unlink()
    elif change == "broken":
        (indexed / "b" / "fingerprint.safetensors").write_bytes(b"junk")
    bank = Bank(indexed, columns=["text"] if change == "columns" else None)
    stale = bank.unfingerprinted()
    assert reason in stale["b"]
    assert list(stale) == (["b"] if change in ("dataset", "gone", "broken") else ["a", "b", "c"])
    with pytest.raises(InvalidBank, match=rf"{len(stale)} of 3 .*\n.*lorameta-rs index"):
        _ = bank.fingerprints
    if change == "columns":
        for name in "abc":
            data = json.dumps({"text": TEXTS[name]})
            (indexed / name / "train.txt").unlink()
            (indexed / name / "train.jsonl").write_text(data)
    assert make_fingerprints(bank) == dict.fromkeys(stale, True)
    assert len(bank.fingerprints) == 3
    assert Bank(indexed, columns=bank.columns).unfingerprinted() == {}


def test_a_copied_dataset_is_not_stale(indexed):
    os.utime(indexed / "b" / "train.txt", ns=(0, 1))
    assert Bank(indexed).unfingerprinted() == {}


def test_fingerprints_serve_without_the_data_and_the_tokenizer(indexed):
    want = Bank(indexed).fingerprints
    for name in "abc":
        (indexed / name / "train.txt").unlink()
    bank = Bank(indexed)
    assert make_fingerprints(bank) == {}
    np.testing.assert_array_equal(bank.fingerprints.counts, want.counts)
    (indexed / "tokenizer.json").unlink()
    bank = Bank(indexed)
    np.testing.assert_array_equal(bank.fingerprints.counts, want.counts)
    with pytest.raises(MissingFile, match=r"the bank has no tokenizer; copy .*tokenizer\.json"):
        _ = bank.tokenizer


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MissingFile, match="the bank has no tokenizer") as caught:
        make_fingerprints(Bank(folder))
    assert caught.value.filename == str(folder / "tokenizer.json")


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidBank, match=r"tokenizer\.json`: not a tokenizer"):
        make_fingerprints(Bank(folder))


def test_a_bad_dataset_does_not_stop_the_others(folder):
    (folder / "b" / "train.txt").write_text("")
    shutil.copy(folder / "a" / "train.txt", folder / "c" / "train.jsonl")
    (folder / "c" / "train.txt").unlink()
    bank = Bank(folder)
    assert make_fingerprints(bank) == {"a": True, "b": False, "c": False}
    assert bank.names == ["a"]
    for name in "bc":
        assert isinstance(bank.left_out[name], InvalidDataset)
        assert str(folder / name / "train.") in str(bank.left_out[name])
    assert len(bank.fingerprints) == 1


def test_no_dataset_at_all(make_bank):
    bank = Bank(make_bank(tokenizer=True).folder)
    with pytest.raises(InvalidBank, match="none of 3 members can be used"):
        make_fingerprints(bank)


def test_datasets_that_are_equal_are_noted_once(make_bank):
    own = {"a": {"text": "one\ntwo\n"}, "b": {"text": "six\n"}, "c": {"text": "two\none\n"}}
    bank = Bank(make_bank(own, tokenizer=True).folder)
    make_fingerprints(bank)
    make_fingerprints(bank)
    (note,) = bank.notes
    assert note.startswith("`a`, `c` have the same token counts")


def test_fingerprints_elsewhere(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    make_fingerprints(Bank(folder, fingerprints=tmp_path / "kept"))
    bank = Bank(folder, fingerprints=tmp_path / "kept")
    assert bank.unfingerprinted() == {}
    hash_adapters(bank)
    nearest_distances(bank, "js", patient=True)
    assert sorted(folder.rglob("*")) == before
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"a", "b", "c", "index.json"}


def test_a_bank_that_cannot_be_written_to(folder, monkeypatch):
    def refuse(path, content):
        raise UnreadableFile(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files, "write_whole", refuse)
    bank = Bank(folder)
    assert make_fingerprints(bank) == dict.fromkeys("abc", True)
    (note,) = bank.notes
    assert "fingerprints are made anew each time" in note
    assert "Read-only" in note
    assert "--fingerprints DIR" in note
    assert len(bank.fingerprints) == 3


def test_a_folder_that_cannot_be_made(folder, tmp_path):
    """A file stands in its place: that stops a superuser, too."""
    (tmp_path / "file").write_text("")
    bank = Bank(folder, fingerprints=tmp_path / "file")
    assert make_fingerprints(bank) == dict.fromkeys("abc", True)
    assert "fingerprints are made anew each time" in bank.notes[-1]
    assert len(bank.fingerprints) == 3


def test_fingerprints_that_are_not_to_be_kept(folder):
    before = sorted(folder.rglob("*"))
    bank = Bank(folder)
    make_fingerprints(bank, keep=False)
    assert len(bank.fingerprints) == 3
    assert sorted(folder.rglob("*")) == before


def test_fingerprints_of_two_tokenizers(indexed, make_bank):
    (indexed / "a" / "train.txt").unlink()
    text = (indexed / "tokenizer.json").read_text(encoding="utf-8") + "\n"
    (indexed / "tokenizer.json").write_text(text, encoding="utf-8")
    bank = Bank(indexed)
    assert list(bank.outdated()) == ["a", "b", "c"]
    assert make_fingerprints(bank) == {"a": False, "b": True, "c": True}
    file, tokenizer = indexed / "a" / "fingerprint.safetensors", indexed / "tokenizer.json"
    assert str(bank.left_out["a"]) == (
        f"`{file}`: it was made with another tokenizer than `{tokenizer}`; there is no dataset to "
        f"make it again\nput its tokenizer into the bank, or its dataset into `{indexed / 'a'}` "
        "and run `lorameta-rs index`"
    )
    assert bank.outdated() == {}
    assert len(bank.fingerprints) == 2


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("data", [True, False])
def test_a_fingerprint_of_another_vocabulary(indexed, tokenizer, data):
    """It cannot be stacked with the others, and does not stop them."""
    file = indexed / "a" / "fingerprint.safetensors"
    found = Fingerprint.load(file)
    replace(found, vocab_size=found.vocab_size + 1).save(file)
    if not data:
        (indexed / "a" / "train.txt").unlink()
    bank = Bank(indexed)
    if not tokenizer:
        (indexed / "tokenizer.json").unlink()
    with pytest.raises(InvalidBank, match=rf"first `a`: `{file}`: it was made with another token"):
        _ = bank.fingerprints
    if tokenizer and data:
        assert make_fingerprints(bank) == {"a": True}
        assert len(bank.fingerprints) == 3
    elif not data:
        assert make_fingerprints(bank) == {"a": False}
        assert f"`{file}`: it was made with another tokenizer" in str(bank.left_out["a"])
        assert "513 ids" in str(bank.left_out["a"])
        assert len(bank.fingerprints) == 2


def test_fingerprints_of_a_vocabulary_that_the_tokenizer_has_not(indexed):
    for name in "abc":
        file = indexed / name / "fingerprint.safetensors"
        replace(Fingerprint.load(file), vocab_size=600).save(file)
    bank = Bank(indexed)
    assert make_fingerprints(bank) == dict.fromkeys("abc", True)
    assert bank.fingerprints.vocab_size == bank.tokenizer.vocab_size


@pytest.mark.parametrize("change", ["gone", "folder"])
def test_a_fingerprint_serves_where_its_dataset_cannot_be_read(indexed, change):
    (indexed / "bank.toml").write_text('[datasets]\na = "elsewhere"')
    if change == "folder":
        (indexed / "elsewhere").mkdir()
    bank = Bank(indexed)
    assert make_fingerprints(bank) == {}
    assert bank.names == ["a", "b", "c"]
    (note,) = bank.notes
    assert note.startswith(f"`a`: its fingerprint is used as it is: `{indexed / 'elsewhere'}`: ")
    assert len(bank.fingerprints) == 3


def test_a_stale_fingerprint_whose_dataset_is_gone(indexed):
    (indexed / "bank.toml").write_text('[datasets]\na = "elsewhere"')
    with (indexed / "tokenizer.json").open("a") as file:
        file.write("\n")
    bank = Bank(indexed)
    assert "another tokenizer" in bank.outdated()["a"]
    assert make_fingerprints(bank) == {"a": False, "b": True, "c": True}
    assert isinstance(bank.left_out["a"], MissingFile)
    assert bank.notes == []


def test_a_broken_fingerprint_without_its_dataset(indexed):
    (indexed / "a" / "train.txt").unlink()
    (indexed / "a" / "fingerprint.safetensors").write_bytes(b"junk")
    bank = Bank(indexed)
    assert make_fingerprints(bank) == {"a": False}
    said = f"`{indexed / 'a'}`: its fingerprint cannot be read, and it has no dataset; it cannot be"
    assert str(bank.left_out["a"]).startswith(said)
    (note,) = bank.notes
    assert "not a fingerprint" in note
    assert "where its dataset is there, `lorameta-rs index` makes it again" in note


def test_columns_that_were_recorded_are_kept(indexed):
    (indexed / "b" / "train.txt").unlink()
    data = indexed / "b" / "train.jsonl"
    data.write_text('{"x": "two", "text": "four"}')
    assert make_fingerprints(Bank(indexed, columns="x", exclude="[ac]")) == {"b": True}
    bank = Bank(indexed)
    assert bank.unfingerprinted() == {}
    data.write_text('{"x": "two two", "text": "four"}')
    bank = Bank(indexed)
    assert bank.columns_of(bank.members[1]) == ("x",)
    assert make_fingerprints(bank) == {"b": True}
    assert Fingerprint.load(indexed / "b" / "fingerprint.safetensors").columns == ("x",)
    assert Bank(indexed, columns=["text"]).outdated().keys() == {"a", "b", "c"}


# Hashes.


def test_hashes_are_those_of_the_files(folder):
    told = []
    assert hash_adapters(Bank(folder), progress=told.append) == 3
    assert told == ["a", "b", "c"]
    bank = Bank(folder)
    content = json.loads((folder / "index.json").read_text())
    assert content["format"] == 1
    assert content["nearest"] == {}
    for member in bank.members:
        status = member.adapter.path.stat()
        digest = hashlib.sha256(member.adapter.path.read_bytes()).hexdigest()
        assert content["adapters"][member.name] == {
            "sha256": digest,
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "norms": content["adapters"][member.name]["norms"],
            "fault": None,
            "zeros": [],
        }
        (kept,), (anew,) = delta_norms([member], Index.of(bank)), delta_norms([member])
        assert kept == pytest.approx(anew)
        assert Index.of(bank).norms(member) is not None
        assert Index.of(bank).sha256(member) == digest
    assert hash_adapters(bank) == 0


def test_hashes_that_were_made_before_an_interrupt_are_kept(folder):
    def interrupt(name):
        if name == "c":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hash_adapters(Bank(folder), progress=interrupt)
    assert sorted(Index.of(Bank(folder)).adapters) == ["a", "b"]
    assert hash_adapters(Bank(folder)) == 1


def test_an_index_that_cannot_be_written_may_lie_elsewhere(folder, monkeypatch):
    def refused(path, content):
        raise UnreadableFile(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files, "write_whole", refused)
    bank = Bank(folder)
    assert hash_adapters(bank) == 3
    assert hash_adapters(bank) == 0, "what is known in this run is not looked at again"
    (note,) = bank.notes
    assert note.startswith(f"adapters are hashed anew each time: `{folder / 'index.json'}`: Read-")
    assert note.endswith("--fingerprints DIR")


def test_hashes_are_made_again_for_files_that_changed(folder):
    hash_adapters(Bank(folder))
    path = folder / "b" / "adapter_model.safetensors"
    shutil.copy(folder / "a" / "adapter_model.safetensors", path)
    os.utime(path, ns=(0, 1))
    shutil.rmtree(folder / "c")
    bank = Bank(folder)
    a, b = (Index.of(bank).sha256(member) for member in bank.members)
    assert b is None
    assert hash_adapters(bank) == 1
    assert [Index.of(bank).sha256(member) for member in bank.members] == [a, a]
    assert Index.of(bank).adapters.keys() == {"a", "b"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "junk",
        "[]",
        "null",
        '{"format": 2, "adapters": {}, "nearest": {}}',
        '{"format": 1, "adapters": {"a": 3}, "nearest": {}}',
        '{"format": 1, "adapters": {"a": {"sha": ""}}, "nearest": {}}',
        '{"format": 1, "adapters": [], "nearest": {}}',
        '{"format": 1, "adapters": {"a": {"sha256": 3, "size": 1, "mtime_ns": 2}}, "nearest": {}}',
        '{"format": 1, "adapters": {}, "nearest": 3}',
        '{"format": 1, "adapters": {}, "nearest": {"js": 3}}',
        '{"format": 1, "adapters": {}, "nearest": {"js": {"fingerprints": "x", "distances": 3}}}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_an_index_that_is_broken_counts_as_empty(indexed, tmp_path, text):
    (indexed / "index.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    bank = Bank(indexed)
    want = leave_one_out_nearest(pairwise("js", bank.fingerprints))
    np.testing.assert_array_equal(nearest_distances(bank, "js", patient=True), want)
    bank.merge([1.0, 0.0, 0.0], tmp_path / "out", verify=True)
    assert json.loads((indexed / "index.json").read_text())["adapters"].keys() == {"a"}
    assert hash_adapters(bank) == 2
    assert json.loads((indexed / "index.json").read_text())["adapters"].keys() == set("abc")


@pytest.mark.parametrize("value", [[math.nan] * 4, [-1.0] * 4, ["x"] * 4, [1] * 4, 3])
def test_a_broken_record_of_an_adapter_counts_as_missing(indexed, value):
    hash_adapters(Bank(indexed))
    content = json.loads((indexed / "index.json").read_text())
    content["adapters"]["b"]["norms"] = value
    (indexed / "index.json").write_text(json.dumps(content))
    bank = Bank(indexed)
    known = [Index.of(bank).sha256(member) is not None for member in bank.members]
    assert known == [True, False, True]


def test_members_that_hold_nan_are_known_and_left_out(make_bank):
    written = make_bank({name: {"text": TEXTS[name]} for name in TEXTS}, tokenizer=True)
    written.edit("b", lambda tensors: next(iter(tensors.values())).fill(math.nan))
    bank = Bank(written.folder)
    leave_out_not_finite(bank)
    assert bank.left_out == {}
    hash_adapters(bank)
    leave_out_not_finite(bank)
    assert bank.names == ["a", "c"]
    assert str(written.weights("b")) in str(bank.left_out["b"])
    assert next(iter(written.numbers["b"])) in str(bank.left_out["b"])
    # Another file is another matter.
    shutil.copy(written.weights("a"), written.weights("b"))
    again = Bank(written.folder)
    leave_out_not_finite(again)
    assert again.names == ["a", "b", "c"]


def test_what_adds_nothing_is_noted(make_bank):
    def silence(tensors):
        for name, numbers in tensors.items():
            numbers *= "q_proj.lora_B" not in name

    written = make_bank({name: {"text": TEXTS[name]} for name in TEXTS}, tokenizer=True)
    written.edit("c", silence)
    bank = Bank(written.folder)
    hash_adapters(bank)
    leave_out_not_finite(bank)
    leave_out_not_finite(bank)
    (note,) = bank.notes
    assert note.startswith(
        "`c` changes nothing in `model.layers.0.self_attn.q_proj`, "
        "`model.layers.1.self_attn.q_proj`; only zeros are in "
        "`base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight`, "
    )
    assert len(bank) == 3


# The bank's own distances.


@pytest.mark.parametrize("metric", reference.METRICS)
def test_nearest_distances_are_those_of_the_formula(indexed, metric):
    bank = Bank(indexed)
    rows = [
        reference.dense(counts.ids, counts.counts, counts.vocab_size)
        for counts in (bank._kept.loaded[name] for name in bank.names)
    ]
    distance = reference.METRICS[metric]
    want = [min(distance(p, q) for p in rows if p is not q) for q in rows]
    np.testing.assert_allclose(nearest_distances(bank, metric), want, rtol=1e-9, atol=1e-12)
    assert not (indexed / "index.json").exists()
    np.testing.assert_allclose(nearest_distances(bank, metric, patient=True), want, rtol=1e-9)
    kept = json.loads((indexed / "index.json").read_text())["nearest"]
    np.testing.assert_allclose(kept[metric]["distances"], want, rtol=1e-9)


def test_kept_distances_are_used_while_the_fingerprints_are_the_same(indexed, monkeypatch):
    want = nearest_distances(Bank(indexed), "js", patient=True)
    monkeypatch.setattr(index, "_QUICK", 0)
    np.testing.assert_array_equal(nearest_distances(Bank(indexed), "js"), want)
    assert nearest_distances(Bank(indexed), "cosine") is None
    assert nearest_distances(Bank(indexed, exclude=["c"]), "js") is None
    (indexed / "b" / "train.txt").write_text("ten and ten\n")
    bank = Bank(indexed)
    make_fingerprints(bank)
    assert nearest_distances(bank, "js") is None


@pytest.mark.parametrize("value", ["x", [1], math.nan, 1, None])
def test_kept_distances_that_are_none_are_computed_again(indexed, value):
    want = nearest_distances(Bank(indexed), "js", patient=True)
    content = json.loads((indexed / "index.json").read_text())
    content["nearest"]["js"]["distances"] = [value] * 3
    (indexed / "index.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(nearest_distances(Bank(indexed), "js"), want)


def test_progress_of_the_distances(indexed):
    told = []
    nearest_distances(Bank(indexed), "js", progress=lambda *now: told.append(now))
    assert told
    assert told == sorted(told)
    assert told[-1] == (3, 3)


def test_one_member_has_no_nearest(indexed):
    bank = Bank(indexed, exclude=["b", "c"])
    assert nearest_distances(bank, "js", patient=True).shape == (0,)
    assert not (indexed / "index.json").exists()


def test_kept_distances_of_a_part_are_of_that_part(indexed):
    """The same words in another order: equal counts, and other pairs of neighbours."""
    bank = Bank(indexed)
    before = {name: nearest_distances(bank, name) for name in ("js", "js:bigrams")}
    sha256 = bank.fingerprint(bank.members[0]).sha256
    (indexed / "a" / "train.txt").write_text("where the is window\nthe is window here\n")
    changed = Bank(indexed)
    make_fingerprints(changed)
    assert changed.fingerprint(changed.members[0]).sha256 != sha256
    for name, old in before.items():
        expected = leave_one_out_nearest(pairwise(name, changed.fingerprints))
        np.testing.assert_array_equal(nearest_distances(changed, name), expected)
        assert np.array_equal(old, expected) == (name == "js")
