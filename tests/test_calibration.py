"""A calibration: chosen, kept, used by `rank` and `merge`, and left aside where it does not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from test_ranking import text
from test_trials import NAMES
from words import rows_of, write_bank

from lorameta_rs import Bank, generate
from lorameta_rs.calibration import (
    SCALES,
    Calibration,
    by_answers,
    calibrated,
    path_of,
    shortlist,
)
from lorameta_rs.errors import InvalidBank
from lorameta_rs.index import hash_adapters, make_fingerprints
from lorameta_rs.learned import stamps
from lorameta_rs.merge import Options
from lorameta_rs.ranking import Settings


@pytest.fixture(scope="module")
def original(make_bank):
    own = {name: {"text": text(i)} for i, name in enumerate(NAMES)}
    folder = make_bank(own, tokenizer=True).folder
    make_fingerprints(bank := Bank(folder))
    hash_adapters(bank)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    (tmp_path / "new.txt").write_text(text(99))
    return shutil.copytree(original, tmp_path / "bank")


@pytest.fixture(scope="module")
def found(original):
    return calibrated(Bank(original), ["js", "js,mmd"], 5)[0]


def test_the_table_has_the_default_first_and_then_the_best(found):
    first, *others = found.tried
    default = ("mmd", "normalized", "unit")  # of datasets that have no answers
    assert (first["metric"], first["pipeline"], first["normalize"]) == default
    assert first["against"] == [0.0, 0.0]
    cosines = [row["cosine"] for row in others]
    assert cosines == sorted(cosines, reverse=True)
    for row in others:
        assert row["against"][0] == pytest.approx(row["cosine"] - first["cosine"])
    offered = [row for row in found.tried if not row["of_modules"] and row["pipeline"] != "ridge"]
    best = max(offered, key=lambda row: row["cosine"])
    mean, error = best["against"]
    chosen = best if mean > 2 * error else first
    assert found.settings.metric == chosen["metric"]
    assert found.normalize == chosen["normalize"]
    assert found.measure == "delta"


def test_the_shortlist_is_the_default_at_three_scales_and_the_best_of_each_way(found):
    listed = shortlist(found, 8)
    default = Settings(metric="mmd")
    assert listed[0] == (default, "unit")
    assert [settings.scale for settings, _ in listed[1:3]] == list(SCALES)
    ways = [(settings.metric, settings.pipeline) for settings, _ in listed[3:]]
    assert len(set(ways)) == len(ways) == 5
    assert ("mmd", "normalized") not in ways
    assert shortlist(found, 2) == listed[:2]


def test_by_answers_the_likeliest_is_chosen(found):
    candidates = shortlist(found, 3)
    losses = np.array([[2.0, 1.0, 3.0], [2.5, 1.5, 3.5], [1.4, 0.5, 2.6]])
    chosen = by_answers(found, candidates, losses)
    assert (chosen.settings, chosen.measure) == (candidates[2][0], "answers")
    assert [row["loss"] for row in chosen.tried] == pytest.approx([2.0, 1.5, 2.5])
    assert chosen.tried[1]["against"] == pytest.approx([-0.5, np.std([0.6, 0.5, 0.4]) / 2**0.5])
    doubtful = by_answers(found, candidates, np.array([[2.0, 1.0], [2.5, 1.5], [0.1, 2.8]]))
    assert doubtful.settings == candidates[0][0]


def test_it_is_kept_whole(folder, found):
    bank = Bank(folder)
    assert Calibration.of(bank) is None
    found.save(bank)
    assert Calibration.of(bank) == found
    assert json.loads(path_of(bank).read_text())["choice"]["metric"] == found.settings.metric
    assert str(found).startswith(f"metric {found.settings.metric}, {found.settings.pipeline}")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format": 2}',
        '{"format": 1, "measure": "delta", "choice": {"metric": "js", "pipeline": "nearest", '
        '"normalize": "unit", "colour": 3}, "tried": [], "members": {}}',
        '{"format": 1, "measure": "taste", "choice": {"metric": "js", "pipeline": "nearest", '
        '"normalize": "unit"}, "tried": [], "members": {}}',
        '{"format": 1, "measure": "delta", "choice": {"metric": "js", "pipeline": "nearest", '
        '"normalize": "unit", "temperature": "0.5"}, "tried": [], "members": {}}',
    ],
    ids=range(8),
)
def test_a_broken_file(folder, content):
    bank = Bank(folder)
    path_of(bank).write_text(content)
    with pytest.raises(InvalidBank, match=r"no calibration.*\nmake it with `lorameta-rs calibrate"):
        Calibration.of(bank)


def test_no_metric_says_anything(folder):
    with pytest.raises(InvalidBank, match="no metric says anything"):
        calibrated(Bank(folder), ["relations"])


def coefficients(out):
    return {row.split("\t")[0]: row.split("\t")[3] for row in out.splitlines()[1:]}


def test_rank_and_merge_use_it(lorameta, folder, tmp_path):
    new, out = tmp_path / "new.txt", tmp_path / "out"
    status, table, err = lorameta("calibrate", folder, "--width", 4)
    assert status == 0, err
    assert table.splitlines()[0].startswith("metric\tpipeline\t")
    assert {"neural", "ridge", "simplex"} <= {row.split("\t")[1] for row in table.splitlines()}
    assert "chosen by delta: metric " in err
    status, said, err = lorameta("rank", folder, new, "--metric", "js", "--pipeline", "simplex")
    assert status == 0, err
    bank = Bank(folder)
    kept = json.loads(path_of(bank).read_text())
    kept["choice"] |= {"metric": "js", "temperature": 0.5, "normalize": "none"}
    path_of(bank).write_text(json.dumps(kept))
    status, said, err = lorameta("rank", folder, new)
    assert "calibrated by delta: metric js, normalized, temperature 0.5, normalize none" in err
    by_hand = lorameta("rank", folder, new, "--metric", "js", "--temperature", 0.5)
    assert "calibrated" not in by_hand[2]
    assert coefficients(said) == coefficients(by_hand[1])
    for option in (["--paper"], ["--no-calibration"], ["--top-k", 8]):
        _, other, err = lorameta("rank", folder, new, *option)
        assert "calibrated" not in err
        assert coefficients(other) != coefficients(said)
    status, _, err = lorameta("merge", folder, new, "-o", out)
    assert (status, "calibrated by delta" in err) == (0, True), err
    record = json.loads((out / "lorameta.json").read_text())["settings"]
    assert (record["metric"], record["temperature"], record["normalize"]) == ("js", 0.5, "none")
    status, _, err = lorameta("merge", folder, new, "-o", tmp_path / "x", "--normalize", "unit")
    record = json.loads((tmp_path / "x" / "lorameta.json").read_text())["settings"]
    assert (record["temperature"], record["normalize"]) == (0.5, "unit")
    status, _, err = lorameta("merge", folder, new, "-o", tmp_path / "y", "--no-calibration")
    assert "calibrated" not in err
    shutil.copytree(folder / "a", folder / "newer")
    status, said, err = lorameta("rank", folder, new)
    assert (status, "calibration.json` is out of date: `newer` is new" in err) == (0, True)


def test_generate_uses_it_as_merge_does(folder, found, tmp_path):
    bank, new = Bank(folder), tmp_path / "new.txt"
    settings = Settings(metric="js", temperature=0.5)
    replace(found, settings=settings, normalize="none", stamps=stamps(bank)).save(bank)
    ranking = generate(folder, new, tmp_path / "out")
    assert (ranking.settings, ranking.calibrated) == (settings, True)
    record = json.loads((tmp_path / "out" / "lorameta.json").read_text())["settings"]
    assert (record["temperature"], record["normalize"]) == (0.5, "none")
    generate(folder, new, tmp_path / "unit", options=Options(normalize="unit"))
    record = json.loads((tmp_path / "unit" / "lorameta.json").read_text())["settings"]
    assert (record["temperature"], record["normalize"]) == (0.5, "unit")
    assert not generate(folder, new, tmp_path / "given", settings=Settings()).calibrated
    shutil.copytree(folder / "a", folder / "newer")
    assert not generate(later := Bank(folder), new, tmp_path / "later").calibrated
    assert any("is out of date: `newer` is new" in note for note in later.notes)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"metric": "relations"}, "metric `relations`: a dataset has no answers"),
        ({"metric": "cosine", "pipeline": "neural"}, "has no network for the metric `cosine`"),
    ],
    ids=["metric", "pipeline"],
)
def test_where_it_does_not_apply_the_defaults_are_used(lorameta, folder, tmp_path, choice, words):
    new, out = tmp_path / "new.txt", tmp_path / "out"
    assert lorameta("calibrate", folder, "--metric", "js", "--width", 4)[0] == 0
    kept = json.loads(path_of(Bank(folder)).read_text())
    kept["choice"] |= {"temperature": 1.0, "normalize": "none"} | choice
    path_of(Bank(folder)).write_text(json.dumps(kept))
    status, said, err = lorameta("rank", folder, new)
    assert (status, err.count("warning: ")) == (0, 1), err
    assert "warning: the calibration does not apply, and the defaults are used: " in err
    assert words in err
    assert coefficients(said) == coefficients(lorameta("rank", folder, new, "--no-calibration")[1])
    status, _, err = lorameta("merge", folder, new, "-o", out)
    assert (status, "warning: the calibration does not apply" in err) == (0, True), err
    record = json.loads((out / "lorameta.json").read_text())["settings"]
    assert (record["metric"], record["normalize"]) == ("mmd", "unit")
    status, _, err = lorameta(
        "rank", folder, new, "--metric", choice["metric"], "--pipeline", "neural"
    )
    assert (status, words in err) == (1, True)  # what is given by hand is used or refused


def test_a_calibrated_bank_is_still_a_bank(lorameta, folder, tmp_path):
    assert lorameta("calibrate", folder, "--metric", "js", "--width", 4)[0] == 0
    assert (folder / "learned.safetensors").exists()
    status, out, err = lorameta("inspect", folder, "--json")
    assert (status, len(json.loads(out)["adapters"])) == (0, len(NAMES)), err
    status, _, err = lorameta("convert", folder, "--to", "peft", "-o", tmp_path / "packed")
    assert (status, len(Bank(tmp_path / "packed").names)) == (0, len(NAMES)), err


def test_calibrate_as_json(lorameta, folder, tmp_path):
    new = tmp_path / "new.txt"
    status, out, err = lorameta("calibrate", folder, "--metric", "js", "--width", 4, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found == json.loads((folder / "calibration.json").read_text())
    assert {row["metric"] for row in found["tried"]} == {"mmd", "js"}
    assert found["tried"][0]["metric"] == "mmd"  # the default competes, whatever else is tried
    learned = [row["metric"] for row in found["tried"] if row["pipeline"] == "neural"]
    assert sorted(learned) == ["js", "mmd"]
    status, _, err = lorameta("rank", folder, new, "--metric", "js", "--pipeline", "neural")
    assert status == 0, err


def test_a_member_that_holds_nan_is_left_out_at_once(lorameta, make_bank):
    own = {name: {"text": text(i)} for i, name in enumerate(NAMES)}
    written = make_bank(own, tokenizer=True)
    written.edit("b", lambda tensors: next(iter(tensors.values())).fill(np.nan))
    for _ in range(2):  # not indexed yet, and then
        status, _, err = lorameta("calibrate", written.folder, "--metric", "js", "--width", 4)
        assert (status, err.count("warning: `b` is left out")) == (0, 1), err


@pytest.mark.parametrize("option", ["members", "rows", "candidates", "seed"])
def test_options_of_the_base_need_one(lorameta, folder, option):
    status, _, err = lorameta("calibrate", folder, f"--{option}", 5)
    assert (status, f"--{option} has no effect without --base" in err) == (2, True)


def test_answers_of_a_base(lorameta, golden, tmp_path):
    """On a base of two layers, in the real llama.cpp: losses are those of what is merged."""
    pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel for this platform")
    from lorameta_rs.evaluate import as_gguf
    from lorameta_rs.likelihoods import losses, sample
    from lorameta_rs.llama import Llama
    from lorameta_rs.merge import Job, Options, merge
    from lorameta_rs.ranking import rank
    from lorameta_rs.refine import Refining, answer_ids, chosen_rows, end_of_answers

    base = golden / "interop" / "gguf" / "base.gguf"
    folder = write_bank(golden, tmp_path / "bank")
    shutil.copytree(golden / "peft_combine" / "adapters" / "g_r8_qv_only", folder / "g_r8")
    (folder / "g_r8" / "train.jsonl").write_text(rows_of(4, 20))
    command = ["calibrate", folder, "--width", 4, "--base", base, "--members", 3, "--rows", 4]
    status, out, err = lorameta(*command, "--candidates", 5, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["measure"], len(found["tried"])) == ("answers", 5)
    assert found["tried"][0]["against"] == [0.0, 0.0]

    bank = Bank(folder)
    how = Refining(base, rows=4)
    (name, *_) = sample(bank, 3, how)
    settings = Settings(scale=0.8)
    (((loss,),)) = losses(bank, [(settings, "unit")], [name], how, tmp_path / "made")
    member = bank.members[bank.names.index(name)]
    rest = bank.without([name])
    ranking = rank(rest, bank.fingerprint(member), settings)
    assert ranking.coefficients.sum() == pytest.approx(0.8)
    merge(rest, [Job(ranking.coefficients, tmp_path / "own", ranking)], Options())
    drawn = chosen_rows(bank.dataset(member), None, how)[0]
    rows = answer_ids(bank.tokenizer, drawn, end_of_answers(base))
    with Llama(base, as_gguf([tmp_path / "own"], base, tmp_path), context=256) as llama:
        want = -np.concatenate(llama.log_likelihoods(rows, [1.0])).mean()
    assert loss == pytest.approx(want, abs=1e-3)

    (folder / "g_r8" / "train.jsonl").write_text(rows_of(4, 3))  # too few to be asked
    for other in ("a_r8", "b_r8"):
        shutil.rmtree(folder / other)
    make_fingerprints(few := Bank(folder))
    with pytest.raises(InvalidBank, match="1 members have datasets with answers"):
        sample(few, 3, how)
