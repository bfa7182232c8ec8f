"""`study` on a base of two layers, in the real llama.cpp; families, differences and pictures."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from words import rows_of, write_bank

from lorameta_rs import Bank
from lorameta_rs.distance import pairwise
from lorameta_rs.errors import UnreadableFile
from lorameta_rs.evaluate import Evaluation
from lorameta_rs.index import make_fingerprints
from lorameta_rs.scores import MEASURES
from lorameta_rs.study import CONTROLS, PICTURES, Study, drawn, families

pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel for this platform")
pytest.importorskip("rouge_score", reason="rouge-score is not installed")


@pytest.fixture
def bank(golden, tmp_path):
    return write_bank(golden, tmp_path / "bank")


def made(**means):
    """A study whose tasks have these means."""
    found = Study()
    for task in range(len(next(iter(means.values())))):
        found.add(
            str(task),
            {
                name: Evaluation(
                    name, [""], np.full((1, len(MEASURES)), values[task]), [task * 100]
                )
                for name, values in means.items()
            },
        )
    return found


def test_differences_are_paired():
    found = made(one=[0.1, 0.5, 0.9], other=[0.2, 0.7, 1.0])
    difference, error = found.against("other", "one")
    assert difference == pytest.approx(0.4 / 3)
    assert error == pytest.approx(np.std([0.1, 0.2, 0.1], ddof=1) / np.sqrt(3))
    assert made(one=[0.1], other=[0.2]).against("other", "one")[1] is None
    assert found.by_length("one") == {
        "up to 64": (1, pytest.approx(0.1)),
        "up to 256": (2, pytest.approx(0.7)),
    }


def test_families_are_those_of_the_file_or_of_the_two_nearest(bank, tmp_path):
    for name in ("b_r8", "e_r16"):
        shutil.rmtree(bank / name)
    (bank / "a_r8").rename(bank / "one0")
    (bank / "one0" / "train.jsonl").write_text(alike(0, 0))
    for family, kind in (("one", 0), ("two", 1)):
        for number in range(1 - kind, 4):
            shutil.copytree(bank / "one0", bank / f"{family}{number}")
            (bank / f"{family}{number}" / "train.jsonl").write_text(alike(kind, number))
    opened = Bank(bank)
    make_fingerprints(opened)
    matrix = pairwise("mmd", opened.fingerprints) + np.diag(np.full(8, np.inf))
    assert matrix.argmin(axis=1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]  # pairs, by one nearest
    found = families(opened)
    assert [
        {found[name] for name in opened.names if name.startswith(one)} for one in ("one", "two")
    ] == [{found["one0"]}, {found["two0"]}]
    assert found["one0"] != found["two0"]


def alike(kind, number):
    """Rows of one kind's words; of its members the first two are nearer each other."""
    common, own = 10 + 20 * kind, 14 + 20 * kind + 4 * (number // 2) + number % 2
    rows = [{"input": f"w{common + i % 3}", "output": f" w{own}"} for i in range(12)]
    return "\n".join(map(json.dumps, rows))


def test_families_of_the_file(bank):
    make_fingerprints(Bank(bank))
    (bank / "bank.toml").write_text('[families]\na_r8 = "x"\ne_r16 = "x"\n')
    assert families(Bank(bank)) == {"a_r8": "x", "b_r8": "b_r8", "e_r16": "x"}


def test_where_a_picture_goes_is_seen_before_the_work(lorameta, bank, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command = ["study", bank, "--base", tmp_path / "none.gguf", "--plot"]
    for name, words in (
        ("study.xyz", "study.xyz`: expected a name that ends with .png, .jpg, .svg, .pdf"),
        ("study", "study`: expected a name that ends with"),
        ("none/study.png", "none`: there is no such folder for the picture"),
    ):
        status, out, err = lorameta(*command, tmp_path / name)
        assert (status, out, words in err) == (1, "", True), err
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(UnreadableFile, match=r"taken\.png"):
        drawn(made(base=[0.1], generated=[0.2]), tmp_path / "taken.png")
    for suffix in PICTURES:
        drawn(made(base=[0.1], generated=[0.2]), tmp_path / f"study{suffix}")


def test_each_member_is_answered_by_the_others(lorameta, bank, golden, tmp_path):
    base = golden / "interop" / "gguf" / "base.gguf"
    shutil.rmtree(bank / "e_r16")  # of another rank, which the paper's operator does not take
    shutil.copytree(golden / "peft_combine" / "adapters" / "g_r8_qv_only", bank / "c_r8")
    (bank / "c_r8" / "train.jsonl").write_text(rows_of(3, 20))
    for name in ("a_r8", "c_r8"):
        (bank / name / "test.jsonl").write_text(rows_of(2, 6))
    command = ["study", bank, "--base", base, "--most-tokens", "2", "--cache", tmp_path / "kept"]
    status, out, err = lorameta(*command, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["tasks"] == ["a_r8", "c_r8"]
    assert list(found["adapters"]) == list(CONTROLS)
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    status, out, err = lorameta(*command, "--plot", tmp_path / "study.png")
    assert status == 0, err
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == kept
    assert [line.split("\t")[0] for line in out.splitlines()[1:]] == list(CONTROLS)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    (bank / "bank.toml").write_text('[families]\na_r8 = "x"\nb_r8 = "x"\nc_r8 = "y"\n')
    status, out, err = lorameta(*command, "--protocol", "lofo", "--json")
    assert status == 0, err
    assert json.loads(out)["tasks"] == ["a_r8", "c_r8"]
    assert json.loads(out)["families"] == [["a_r8", "b_r8"], ["c_r8"]]
    assert "families, by `bank.toml`: `a_r8`, `b_r8`; `c_r8`" in err
    (bank / "bank.toml").write_text('[families]\na_r8 = "x"\nb_r8 = "x"\nc_r8 = "x"\n')
    status, _, err = lorameta(*command, "--protocol", "lofo")
    assert (status, "all members are of its family" in err) == (1, True)
    status, _, err = lorameta(*command, "--test", "none.jsonl")
    assert (status, "no member has a test set" in err) == (1, True)
