"""`index`: what it makes, that it makes it once, and that it goes on past bad members."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lorameta_rs import Bank, Fingerprint, token_distribution
from lorameta_rs.distance import pairwise
from lorameta_rs.files import sha256
from lorameta_rs.relevance import leave_one_out_nearest

HOSTILE = Path(__file__).parent / "golden" / "malformed" / "banks"
TEXTS = {"a": "to be or not to be", "b": "out brief candle", "c": "a horse a horse"}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def bank(make_bank):
    return make_bank({name: {"text": text} for name, text in TEXTS.items()}, tokenizer=True).folder


def indexed(lorameta, bank, *options):
    """What `index --json` says."""
    status, out, _ = lorameta("index", bank, "--json", *options)
    assert status == 0
    return json.loads(out)


def test_fingerprints_and_hashes_are_those_of_the_files(bank, lorameta):
    status, out, err = lorameta("index", bank)
    assert (status, out) == (0, "")
    assert err == "3 members: 3 fingerprints made, 3 adapters hashed, 0 folders left out\n"
    recorded = json.loads((bank / "index.json").read_text())["adapters"]
    for name in TEXTS:
        kept = Fingerprint.load(bank / name / "fingerprint.safetensors")
        made = token_distribution(bank / name / "train.txt", tokenizer=bank / "tokenizer.json")
        assert kept.ids.tolist() == made.ids.tolist()
        assert kept.counts.tolist() == made.counts.tolist()
        assert recorded[name]["sha256"] == sha256(bank / name / WEIGHTS)


def test_only_what_is_missing_or_out_of_date_is_made(bank, lorameta):
    everything = {"fingerprints_made": 3, "adapters_hashed": 3}
    nothing = {"fingerprints_made": 0, "adapters_hashed": 0}
    assert everything.items() <= indexed(lorameta, bank).items()
    assert nothing.items() <= indexed(lorameta, bank).items()
    (bank / "a" / "train.txt").write_text("to be, or not to be?")
    assert indexed(lorameta, bank)["fingerprints_made"] == 1
    (bank / "a" / WEIGHTS).write_bytes((bank / "b" / WEIGHTS).read_bytes())
    assert indexed(lorameta, bank)["adapters_hashed"] == 1
    (bank / "c" / "fingerprint.safetensors").write_bytes(b"broken")
    assert indexed(lorameta, bank)["fingerprints_made"] == 1
    assert nothing.items() <= indexed(lorameta, bank).items()


def test_fresh_fingerprints_do_where_the_rest_is_kept_elsewhere(bank, tmp_path, lorameta):
    indexed(lorameta, bank)
    elsewhere = tmp_path / "new" / "kept"
    found = indexed(lorameta, bank, "--fingerprints", elsewhere)
    assert (found["fingerprints_made"], found["adapters_hashed"]) == (0, 3)
    assert [path.name for path in elsewhere.iterdir()] == ["index.json"]


def test_columns_are_those_of_the_members(make_bank, lorameta):
    bank = make_bank(["a", "b"], tokenizer=True).folder
    for name in "ab":
        (bank / name / "train.csv").write_text("text,x,y\nnothing,one,two\n")
    columns = ["--columns", "x,y"]
    assert indexed(lorameta, bank)["fingerprints_made"] == 2
    assert indexed(lorameta, bank, *columns)["fingerprints_made"] == 2
    assert indexed(lorameta, bank, *columns)["fingerprints_made"] == 0
    assert indexed(lorameta, bank)["fingerprints_made"] == 0
    for name in "ab":
        assert Fingerprint.load(bank / name / "fingerprint.safetensors").columns == ("x", "y")
    (bank / "a" / "train.csv").write_text("text,x,y\nnothing,two,two\n")
    assert indexed(lorameta, bank)["fingerprints_made"] == 1
    assert Fingerprint.load(bank / "a" / "fingerprint.safetensors").columns == ("x", "y")


@pytest.mark.parametrize("metric", ["js", "kl", "wasserstein", "mmd", "cosine"])
def test_how_near_the_members_are_is_kept(bank, lorameta, metric):
    indexed(lorameta, bank, "--metric", metric)
    kept = json.loads((bank / "index.json").read_text())["nearest"][metric]["distances"]
    matrix = pairwise(metric, Bank(bank).fingerprints)
    np.testing.assert_array_equal(kept, leave_one_out_nearest(matrix))


def test_a_bad_member_is_left_out_loudly_and_keeps_its_hash(bank, lorameta):
    indexed(lorameta, bank)
    (bank / "b" / "train.txt").write_bytes(b"\xff\xfe")
    status, out, err = lorameta("index", bank, "--json")
    found = json.loads(out)
    assert (status, found["members"]) == (0, ["a", "c"])
    assert str(bank / "b" / "train.txt") in found["left_out"]["b"]
    assert err.count("warning: `b` is left out") == 1
    assert "b" in json.loads((bank / "index.json").read_text())["adapters"]


def test_a_fingerprint_that_is_made_again_is_not_advised_to_be(bank, lorameta):
    assert lorameta("index", bank)[0] == 0
    for name in list(TEXTS)[:2]:
        (bank / name / "fingerprint.safetensors").write_bytes(b"of an earlier format")
    status, _, err = lorameta("index", bank)
    assert (status, "makes it again" in err, "warning" in err) == (0, False, False), err
    assert "2 fingerprints to be made again, of `" in err
    assert "2 fingerprints made" in err


def test_a_member_that_holds_nan_is_named_and_left_out_of_merges(make_bank, tmp_path, lorameta):
    members = {name: {"text": text} for name, text in TEXTS.items()}
    written = make_bank(members, tokenizer=True)
    written.edit("b", lambda tensors: next(iter(tensors.values())).fill(np.nan))
    (tmp_path / "new.txt").write_text("to be a horse")
    merge = ["merge", written.folder, tmp_path / "new.txt", "-o", tmp_path / "out"]
    tensor = next(iter(written.numbers["b"]))
    status, _, err = lorameta("index", written.folder)
    assert (status, tensor in err, "1 folder left out" in err) == (0, True, True)
    assert err.count("warning: `b` is left out") == 1
    for command in (["index", written.folder], ["rank", *merge[1:3]], merge):
        status, _, err = lorameta(*command)
        assert (status, err.count("warning: `b` is left out")) == (0, 1)
    status, _, err = lorameta("merge", written.folder, "--weights", "b=1", *merge[3:], "--force")
    assert (status, tensor in err) == (1, True)
    status, _, err = lorameta(*merge, "--force", "--allow-nan")
    assert (status, "`b` is left out" in err) == (0, False)


def test_a_bank_without_usable_members_is_an_error(bank, tmp_path, lorameta):
    for name in TEXTS:
        (bank / name / WEIGHTS).unlink()
    for folder in (bank, tmp_path):
        status, _, err = lorameta("index", folder)
        assert status == 1
        assert err.startswith(f"error: `{folder}`")


@pytest.mark.parametrize("name", [path.name for path in HOSTILE.iterdir()])
def test_a_hostile_bank_is_indexed_or_named(golden, tmp_path, lorameta, name):
    bank = tmp_path / name
    shutil.copytree(HOSTILE / name, bank)
    shutil.copy(golden / "paper" / "tokenizer" / "tokenizer.json", bank)
    for command in (["index", bank], ["inspect", bank], ["rank", bank, bank / "a" / "data.jsonl"]):
        status, out, err = lorameta(*command, "--json")
        assert status in (0, 1)
        assert json.loads(out) if out else "error: " in err


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to whole consoles")
def test_ctrl_c_leaves_only_whole_files(make_bank):
    bank = make_bank([f"{i:03d}" for i in range(100)], tokenizer=True, text="to be\n" * 5000).folder
    command = [sys.executable, "-m", "lorameta_rs", "index", bank]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while process.poll() is None and not any(bank.rglob("fingerprint.safetensors")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.decode().split() == ["interrupted"]
    for path in bank.rglob("*fingerprint*"):
        Fingerprint.load(path)
    assert not any(bank.rglob(".*"))


def test_many_broken_members_are_not_all_listed(make_bank, lorameta):
    written = make_bank({f"m{i:02}": {"text": "to be"} for i in range(24)}, tokenizer=True)
    for i in range(20):
        written.weights(f"m{i:02}").write_bytes(b"")
    status, _, err = lorameta("index", written.folder)
    assert (status, err.count(" is left out: ")) == (0, 16)
    assert "warning: 4 more members left out: `lorameta-rs index --json` has all reasons" in err
    assert "20 folders left out" in err
