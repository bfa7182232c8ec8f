"""`merge --refine` on a base of two layers, in the real llama.cpp."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from words import rows_of, write_bank

from lorameta_rs import Bank
from lorameta_rs.coefficients import normalized
from lorameta_rs.errors import InvalidDataset, InvalidSetting
from lorameta_rs.flow import jobs_for
from lorameta_rs.formats.base import Base
from lorameta_rs.formats.conversion import write_gguf
from lorameta_rs.formats.opening import open_adapters
from lorameta_rs.llama import Llama
from lorameta_rs.merge import Options
from lorameta_rs.provenance import Provenance
from lorameta_rs.ranking import Settings
from lorameta_rs.refine import (
    MERGE,
    POWERS,
    Refining,
    answer_ids,
    chosen_rows,
    context_of,
    end_of_answers,
    merges_of,
    refine,
)

MEMBERS = ("a_r8", "b_r8", "e_r16")
# How each merge among the candidates is made without refining.
MERGES = {
    "(merge)": (),
    "(sharper)": ("--temperature", "0.5"),
    "(flatter)": ("--temperature", "2"),
    "(uniform)": ("--pipeline", "uniform"),
}

pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel for this platform")


@pytest.fixture
def base(golden):
    return golden / "interop" / "gguf" / "base.gguf"


@pytest.fixture
def bank(golden, tmp_path):
    (tmp_path / "new.jsonl").write_text(rows_of(4))
    return write_bank(golden, tmp_path / "bank")


@pytest.mark.parametrize("norms", [(), ("--normalize", "none")])
def test_the_mixture_that_is_found_is_what_is_merged(lorameta, bank, base, tmp_path, norms):
    command = ["merge", bank, tmp_path / "new.jsonl", *norms, "--rows", "8", "--budget", "30"]
    status, _, err = lorameta(*command, "-o", tmp_path / "out", "--refine", base)
    assert status == 0, err
    assert "refined by" in err
    assert "method svd: what --refine finds" in err
    record = json.loads((tmp_path / "out" / "lorameta.json").read_text())
    refined = record["settings"]["refined"]
    assert [*refined["weights"]][:4] == [*MERGES]
    assert {*refined["weights"]} == {*MERGES, *MEMBERS}
    assert refined["after"] <= refined["before"]
    # Refined or not, every module is Σ weight · candidate: here with all of them written out.
    for name, settings in MERGES.items():
        plain = ("--method", "svd", "--rank", "32", *norms, *settings)
        assert lorameta(*command[:3], "-o", tmp_path / name, *plain)[0] == 0
    status, _, err = lorameta(
        *command, "-o", tmp_path / "full", "--refine", base, "--rank", "32", "--force"
    )
    assert status == 0, err
    # llama.cpp's sums depend on which requests it works on together: each run has its own record.
    text = (tmp_path / "full" / "lorameta.json").read_text()
    refined = json.loads(text)["settings"]["refined"]
    found = deltas(tmp_path / "full")
    assert np.count_nonzero([refined["weights"][name] for name in POWERS]) == 1
    wanted = dict.fromkeys(found, 0.0)
    for folder in (*(tmp_path / name for name in MERGES), *(bank / name for name in MEMBERS)):
        for name, delta in deltas(folder).items():
            wanted[name] = wanted[name] + refined["weights"][folder.name] * delta
    for name, delta in wanted.items():
        np.testing.assert_allclose(found[name], delta, atol=2e-5 * np.abs(delta).max())
    again = tmp_path / "again"
    assert lorameta("merge", "--repeat", tmp_path / "out" / "lorameta.json", "-o", again)[0] == 0
    weights = "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_what_is_said_is_of_what_was_found(lorameta, bank, base, tmp_path):
    out = tmp_path / "out"
    command = ["merge", bank, tmp_path / "new.jsonl", "--rows", "8", "--budget", "20", "-o", out]
    status, text, err = lorameta(*command, "--refine", base, "--json")
    assert status == 0, err
    (found,) = json.loads(text)["jobs"]
    given = {one["name"]: one["coefficient"] for one in found["members"]}
    weights = found["refined"]["weights"]
    wanted = {name: weights[name] for name in MEMBERS}
    for merge, settings in MERGES.items():
        _, text, _ = lorameta("rank", bank, tmp_path / "new.jsonl", "--json", *settings)
        for one in json.loads(text)["members"]:
            wanted[one["name"]] += weights[merge] * one["coefficient"]
    for name, want in wanted.items():
        assert (given[name], found["refined"]["coefficients"][name]) == (pytest.approx(want),) * 2
    record = Provenance.load(out / "lorameta.json")
    shares = np.abs(list(given.values()))
    number = np.exp(-np.sum(shares / shares.sum() * np.log(shares / shares.sum())))
    assert found["relevance"]["effective_number"] == pytest.approx(number)
    assert record.effective_number == pytest.approx(number)
    assert record.relevance["effective_number"] == pytest.approx(number)
    card = (out / "README.md").read_text()
    for name, coefficient in given.items():
        assert f"| {coefficient:.4f} |" in next(x for x in card.splitlines() if f"| {name} " in x)
    assert f"In effect {number:.1f} adapters take part." in card
    assert "with the base model on 8 rows" in card
    assert f"{found['refined']['after']:.3f}" in card
    record = json.loads((out / "lorameta.json").read_text())
    refined = record["settings"]["refined"]
    for broken in ([], refined | {"before": "x"}, refined | {"weights": {"(merge)": "x"}}):
        record["settings"]["refined"] = broken
        (tmp_path / "broken.json").write_text(json.dumps(record))
        with pytest.raises(InvalidSetting, match="refined"):
            Provenance.load(tmp_path / "broken.json")


@pytest.mark.parametrize("cut", [("--rank", "1"), ("--energy", "0.5")])
def test_losses_are_of_what_is_written(lorameta, bank, base, tmp_path, cut):
    out = tmp_path / "out"
    command = ["merge", bank, tmp_path / "new.jsonl", "--rows", "8", "--budget", "20", *cut]
    status, _, err = lorameta(*command, "-o", out, "--refine", base)
    assert status == 0, err
    refined = Provenance.load(out / "lorameta.json").refined
    assert lorameta(*command[:3], *cut, "-o", tmp_path / "plain")[0] == 0
    assert loss(bank, base, out) == pytest.approx(refined["after"], abs=1e-3)
    assert loss(bank, base, tmp_path / "plain") == pytest.approx(refined["before"], abs=1e-3)


def loss(bank, base, folder):
    """Of the answers that a search of eight rows holds out, with one adapter."""
    _, held = chosen_rows(folder.parent / "new.jsonl", None, Refining(base, rows=8))
    rows = answer_ids(Bank(bank).tokenizer, held, end_of_answers(base))
    path = folder / "adapter.gguf"
    (member,) = open_adapters(folder)
    write_gguf(member, path, Base.load(base), "float32", Options())
    with Llama(base, [path], context=context_of(rows)) as llama:
        return -np.concatenate(llama.log_likelihoods(rows, [1.0])).mean()


def test_a_search_that_was_broken_off_is_taken_up(lorameta, bank, base, tmp_path):
    cache = tmp_path / "cache"
    command = ["merge", bank, tmp_path / "new.jsonl", "--rows", "8", "--budget", "20"]
    command += ["--refine", base, "--cache", cache]
    status, _, err = lorameta(*command, "-o", tmp_path / "out")
    assert (status, "refining takes about" in err) == (0, True), err
    kept = sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    kept[5].write_text("half a fi")
    for path in kept[6:]:
        path.unlink()
    times = [path.stat().st_mtime_ns for path in kept[:6]]
    status, _, err = lorameta(*command, "-o", tmp_path / "again")
    assert (status, "refining takes about" in err) == (0, True), err
    now = [path.stat().st_mtime_ns for path in kept[:6]]
    assert (now[:5], now[5] > times[5]) == (times[:5], True)
    status, _, err = lorameta(*command, "-o", tmp_path / "third")
    assert (status, "refining takes about" in err) == (0, False), err
    again, third = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("again", "third")
    )
    assert again == third


def deltas(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    stems = {name.rsplit(".", 2)[0] for name in tensors}
    return {
        stem: scaling
        * tensors[f"{stem}.lora_B.weight"].astype(np.float64)
        @ tensors[f"{stem}.lora_A.weight"]
        for stem in stems
    }


def test_the_base_that_refines_is_that_of_a_gguf(lorameta, bank, base, tmp_path):
    command = ["merge", bank, tmp_path / "new.jsonl", "--format", "gguf", "-o", tmp_path / "out"]
    status, _, err = lorameta(*command)
    assert (status, "architecture, which is not known" in err) == (1, True)
    status, _, err = lorameta(*command, "--refine", base, "--rows", "8", "--budget", "10")
    assert (status, (tmp_path / "out" / "adapter.gguf").exists()) == (0, True), err
    assert int(re.search(r"refined by (\d+) evaluations", err)[1]) <= 10


def test_what_cannot_be_written_is_refused_before_refining(lorameta, bank, base, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "phi3", "num_attention_heads": 2}')
    command = ["merge", bank, tmp_path / "new.jsonl", "--format", "gguf", "-o", tmp_path / "out"]
    command += ["--base-config", tmp_path / "config.json"]
    status, _, err = lorameta(*command, "--refine", base, "--rows", "8", "--budget", "10")
    assert (status, "refining takes about" in err) == (1, False), err


def test_a_dry_run_says_that_it_would_refine(lorameta, bank, base, tmp_path):
    command = ["merge", bank, tmp_path / "new.jsonl", "-o", tmp_path / "out", "--dry-run"]
    status, _, err = lorameta(*command, "--refine", base, "--rows", "8", "--budget", "10")
    assert (status, "by 10 evaluations of 8 rows at most" in err) == (0, True), err
    for option in ("--rows", "--budget", "--candidates", "--cache"):
        status, _, err = lorameta(*command, option, "12")
        assert (status, f"{option} has no effect without --refine" in err) == (2, True), err


@pytest.mark.parametrize("options", [(), ("--top-k", "1")], ids=["chosen", "candidate"])
def test_bad_members_take_no_part(lorameta, bank, base, tmp_path, options):
    """Neither in the merge, nor beside it: candidates are read whether they were chosen or not."""
    (tmp_path / "new.jsonl").write_text(rows_of(1))  # as `a_r8` has them
    path = bank / "e_r16" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[:] = np.nan
    save_file(tensors, path)
    command = ["merge", bank, tmp_path / "new.jsonl", "--refine", base, *options, "--json"]
    command += ["--rows", "4", "--budget", "10", "-o", tmp_path / "out"]
    status, text, err = lorameta(*command)
    assert (status, err.count("warning: `e_r16` is left out")) == (0, 1), err
    assert err.count("refining takes about") == 1
    (job,) = json.loads(text)["jobs"]
    assert {*job["refined"]["weights"]} - {*MERGES} == {"a_r8", "b_r8"}


def test_merges_are_of_temperatures_and_of_the_same_sum():
    distances = np.array([0.1, 0.7, 0.4, 0.2])
    found = merges_of(0.8 * normalized(distances))
    assert [*found] == [MERGE, *POWERS]
    for name, temperature in zip(found, (1.0, 0.5, 2.0, 1e9), strict=True):
        np.testing.assert_allclose(found[name], 0.8 * normalized(distances, temperature), rtol=1e-8)


def test_merges_keep_signs_and_leave_out_who_takes_no_part():
    for own in merges_of(np.array([0.9, -0.3, 0.0])).values():
        np.testing.assert_array_equal(np.sign(own), [1, -1, 0])
        assert np.abs(own).sum() == pytest.approx(1.2)


@pytest.mark.parametrize("given", [[1.0], [0.5, 0.5], [0.0, 2.0, 0.0], [1.0, -1.0], [-1.0]])
def test_merges_that_are_the_same_are_one(given):
    ((name, found),) = merges_of(np.array(given)).items()
    assert (name, found.tolist()) == (MERGE, given)


@pytest.mark.parametrize(("kept", "merges"), [(1, 1), (2, 4)])
def test_a_bank_of_one_or_two_members(lorameta, bank, base, tmp_path, kept, merges):
    for name in MEMBERS[kept:]:
        shutil.rmtree(bank / name)
    command = ["merge", bank, tmp_path / "new.jsonl", "--rows", "8", "--budget", "10"]
    status, _, err = lorameta(*command, "-o", tmp_path / "out", "--refine", base)
    assert status == 0, err
    weights = Provenance.load(tmp_path / "out" / "lorameta.json").refined["weights"]
    assert [*weights][:merges] == [*MERGES][:merges]
    assert {*weights} == {*[*MERGES][:merges], *MEMBERS[:kept]}


def test_a_pipeline_without_temperature(lorameta, bank, base, tmp_path):
    command = ["merge", bank, tmp_path / "new.jsonl", "--rows", "8", "--budget", "10"]
    command += ["-o", tmp_path / "out", "--refine", base, "--pipeline", "attentional"]
    status, _, err = lorameta(*command)
    assert status == 0, err
    weights = Provenance.load(tmp_path / "out" / "lorameta.json").refined["weights"]
    assert {*weights} == {*MERGES, *MEMBERS}


def test_a_budget_that_is_too_small_is_refused_before_the_work(lorameta, bank, base, tmp_path):
    assert lorameta("index", bank)[0] == 0
    opened = Bank(bank)
    (job,) = jobs_for(opened, [tmp_path / "new.jsonl"], [tmp_path / "out"], Settings())
    with pytest.raises(InvalidSetting, match="4 merges and 3 members need 8 evaluations at least"):
        refine(opened, job, Options(), Refining(base, budget=7), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_the_candidates_are_the_nearest_whatever_their_coefficients(lorameta, bank, base, tmp_path):
    (tmp_path / "near.jsonl").write_text(rows_of(3))
    command = ["merge", bank, tmp_path / "near.jsonl", "-o", tmp_path / "out", "--json"]
    few = ("--rows", "8", "--budget", "20", "--candidates", "1", "--pipeline", "uniform")
    status, out, err = lorameta(*command, "--refine", base, *few)
    assert status == 0, err
    _, ranked, _ = lorameta("rank", bank, tmp_path / "near.jsonl", "--json")
    nearest = min(json.loads(ranked)["members"], key=lambda one: one["distance"])["name"]
    assert nearest != MEMBERS[0], "that would be the first by equal coefficients"
    weights = json.loads(out)["jobs"][0]["refined"]["weights"]
    assert [name for name in weights if name in MEMBERS] == [nearest]


def test_rows_are_drawn_apart_with_the_seed(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(rows_of(1, 500))
    how = Refining(tmp_path, rows=16)
    chosen, held = chosen_rows(path, None, how)
    assert (len(chosen), len(held), len({*chosen, *held})) == (16, 16, 32)
    assert chosen_rows(path, None, how) == (chosen, held)
    assert chosen_rows(path, None, Refining(tmp_path, rows=16, seed=1)) != (chosen, held)
    path.write_text(rows_of(1, 9))
    chosen, held = chosen_rows(path, None, how)
    assert (len(chosen), len(held)) == (4, 5)


def test_what_cannot_be_refined_is_said(lorameta, bank, base, tmp_path):
    (tmp_path / "plain.txt").write_text("\n".join(f"w{i}" for i in range(20)))
    command = ["merge", bank, tmp_path / "plain.txt", "-o", tmp_path / "out", "--refine", base]
    status, _, err = lorameta(*command)
    assert (status, "0 rows tell an answer" in err) == (1, True)
    with pytest.raises(InvalidDataset):
        chosen_rows(tmp_path / "plain.txt", None, Refining(base))
    command[2] = tmp_path / "new.jsonl"
    status, _, err = lorameta(*command, "--method", "soup")
    assert (status, "the method is `soup`, but what is found is a sum of ΔW" in err) == (1, True)
    for more in (("--method", "cat"), ("--method", "cat", "--dry-run")):
        status, _, err = lorameta(*command, *more)
        assert (status, "`svd` brings to one rank" in err) == (1, True)
    status, _, err = lorameta(*command[:-1], tmp_path / "none.gguf")
    assert (status, "none.gguf" in err) == (1, True)
    assert lorameta("merge", bank, "--weights", "a_r8=1", *command[3:])[0] == 2
    assert not (tmp_path / "out").exists()
