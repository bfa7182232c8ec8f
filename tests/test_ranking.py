"""From a dataset to coefficients over a real folder, and `generate`, which does it all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from lorameta_rs import Bank, Fingerprint, generate, token_distribution
from lorameta_rs.distance import pairwise
from lorameta_rs.errors import InvalidBank, InvalidDataset, InvalidSetting
from lorameta_rs.flow import jobs_for
from lorameta_rs.index import make_fingerprints
from lorameta_rs.merge import Options
from lorameta_rs.ranking import Settings
from lorameta_rs.relations import NAMES
from lorameta_rs.relevance import leave_one_out_nearest

WORDS = ["where", "is", "the", "window", "two", "and", "four", "three", "six", "here", "ten"]


def text(seed, rows=12):
    """Rows of words, of which some seeds prefer the first and some the last."""
    random = np.random.default_rng(seed)
    share = random.dirichlet(np.full(len(WORDS), 0.4))
    return "\n".join(" ".join(random.choice(WORDS, 8, p=share)) for _ in range(rows))


@pytest.fixture(scope="module")
def written(make_bank):
    """Five members with datasets of their own."""
    own = {name: {"text": text(seed)} for seed, name in enumerate("abcde")}
    written = make_bank(own, tokenizer=True)
    make_fingerprints(Bank(written.folder))
    return written


@pytest.fixture(scope="module")
def bank(written):
    return Bank(written.folder)


@pytest.fixture(scope="module")
def target(bank, tmp_path_factory):
    path = tmp_path_factory.mktemp("new") / "new.txt"
    path.write_text(text(99))
    return token_distribution(path, tokenizer=bank.tokenizer)


def dense(bank, fingerprint=None):
    """A fingerprint, or all of the bank's, as rows over the vocabulary."""
    if fingerprint is not None:
        return reference.dense(fingerprint.ids, fingerprint.counts, fingerprint.vocab_size)
    return np.array([dense(bank, bank._kept.loaded[name]) for name in bank.names])


@pytest.mark.parametrize("metric", reference.METRICS)
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_a_ranking_is_that_of_the_formulas(bank, target, metric, temperature):
    found = bank.rank(target, metric=metric, temperature=temperature)
    distances = [reference.METRICS[metric](p, dense(bank, target)) for p in dense(bank)]
    np.testing.assert_allclose(found.distances, distances, rtol=1e-9)
    coefficients = reference.normalized(np.array(distances), temperature)
    np.testing.assert_allclose(found.coefficients, coefficients, rtol=1e-7)
    assert found.names == bank.names
    assert found.nearest_first() == sorted(range(5), key=lambda i: distances[i])
    assert found.relevance.nearest == bank.names[int(np.argmin(distances))]
    rows = dense(bank)
    own = [
        min(reference.METRICS[metric](p, q) for j, p in enumerate(rows) if j != i)
        for i, q in enumerate(rows)
    ]
    share = 100 * np.mean(np.array(own) < min(distances))
    assert found.relevance.percentile == pytest.approx(share)


def test_similarity(bank, target):
    found = bank.rank(target, metric="js")
    np.testing.assert_allclose(found.similarity, 1 - found.distances / np.log(2))
    assert bank.rank(target, metric="wasserstein").similarity is None


def test_selection(bank, target):
    full = bank.rank(target, metric="js")
    largest = np.argsort(-full.coefficients)
    two = bank.rank(target, metric="js", top_k=2).coefficients
    assert set(np.flatnonzero(two)) == set(largest[:2])
    assert two.sum() == pytest.approx(1)
    least = float(np.median(full.similarity))
    near = bank.rank(target, metric="js", min_similarity=least).coefficients
    assert (near > 0).tolist() == (full.similarity >= np.median(full.similarity)).tolist()
    with pytest.raises(InvalidSetting, match="similarity"):
        bank.rank(target, metric="kl", min_similarity=0.5)
    with pytest.raises(InvalidSetting, match="metric `euclid`"):
        bank.rank(target, metric="euclid")


def test_a_member_of_the_bank_is_its_own_nearest(bank, written):
    path = written.folder / "c" / "train.txt"
    found = bank.rank(token_distribution(path, tokenizer=bank.tokenizer))
    assert found.relevance.nearest == "c"
    assert found.distances[2] == 0.0
    assert found.relevance.percentile == 0.0


def test_another_vocabulary(bank):
    other = Fingerprint(np.array([1], np.uint32), np.array([1], np.uint64), 9, tokenizer="x")
    with pytest.raises(InvalidBank):
        bank.rank(other)


@settings(max_examples=10)
@given(order=st.permutations("abcde"))
def test_permuting_the_bank_permutes_the_coefficients(
    bank, written, target, tmp_path_factory, order
):
    folder = tmp_path_factory.mktemp("permuted")
    for name, new in zip("abcde", order, strict=True):
        shutil.copytree(written.folder / name, folder / new)
    shutil.copy(written.folder / "tokenizer.json", folder)
    before = dict(zip(bank.names, bank.rank(target).coefficients, strict=True))
    other = Bank(folder)
    after = dict(zip(other.names, other.rank(target).coefficients, strict=True))
    for name, new in zip("abcde", order, strict=True):
        assert after[new] == pytest.approx(before[name], rel=1e-12)


def test_generate(written, tmp_path):
    """The whole flow in one call, on a bank that was never indexed."""
    folder = shutil.copytree(
        written.folder, tmp_path / "bank", ignore=shutil.ignore_patterns("fingerprint*")
    )
    (tmp_path / "new.txt").write_text(text(99))
    out, told = tmp_path / "out", []
    found = generate(
        folder,
        tmp_path / "new.txt",
        out,
        settings=Settings(top_k=3),
        options=Options(method="soup", dtype="float16"),
        progress=lambda *now: told.append(now),
    )
    assert np.count_nonzero(found.coefficients) == 3
    got, dtypes = reference.read(out / "adapter_model.safetensors")
    assert dtypes == {"F16"}
    want = reference.soup([*written.numbers.values()], found.coefficients)
    for name, numbers in got.items():
        np.testing.assert_allclose(numbers, want[name], rtol=2**-10, atol=1e-5)
    assert told[-1][0] == told[-1][1]
    again = generate(Bank(folder), tmp_path / "new.txt", tmp_path / "again")
    assert np.count_nonzero(again.coefficients) == 5
    record = json.loads((tmp_path / "again" / "lorameta.json").read_text())
    assert record["target"]["path"] == str(tmp_path / "new.txt")


def test_progress_of_the_new_datasets(bank, tmp_path):
    told = []
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for rows, path in zip((3, 5), paths, strict=True):
        path.write_text(text(99, rows))
    jobs_for(bank, paths, [tmp_path / "a", tmp_path / "b"], Settings(), progress=told.append)
    assert told == [3, 5]


def test_generate_makes_nothing_of_a_bad_dataset(written, tmp_path):
    (tmp_path / "new.txt").write_text("")
    with pytest.raises(InvalidDataset, match=r"new\.txt"):
        generate(written.folder, tmp_path / "new.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_distances_of_several_metrics_are_added_up_in_standard_deviations(bank, target):
    names = ("js", "mmd", "kl")
    each = [bank.rank(target, metric=name).distances for name in names]
    deviations = [np.append(row, 0.0).std() for row in each]
    want = sum(row / deviation for row, deviation in zip(each, deviations, strict=True))
    found = bank.rank(target, metric="js,mmd,kl")
    np.testing.assert_allclose(found.distances, want, rtol=1e-12)
    np.testing.assert_allclose(found.coefficients, np.exp(-want) / np.exp(-want).sum(), rtol=1e-12)
    np.testing.assert_allclose(found.similarity, bank.rank(target, metric="js").similarity)
    assert found.relevance.nearest == bank.names[int(want.argmin())]
    shares = [
        np.mean(leave_one_out_nearest(pairwise(name, bank.fingerprints)) < row.min())
        for name, row in zip(names, each, strict=True)
    ]
    assert found.relevance.percentile == pytest.approx(100 * np.mean(shares))


def test_relations_where_some_or_all_datasets_have_no_answers(bank, target):
    assert Settings().metric == "relations,mmd"
    found = bank.rank(target)
    assert found.settings.metric == "mmd"
    assert found.note == (
        "`relations` is left out: the new dataset's rows do not tell answers from inputs"
    )
    assert bank.rank(target, metric="mmd").note is None
    np.testing.assert_array_equal(found.distances, bank.rank(target, metric="mmd").distances)
    with_ = replace(target, relations=np.ones(len(NAMES), np.uint64))
    assert bank.rank(with_).note == (
        "`relations` is left out: the rows of `a` and 4 others do not tell answers from inputs"
    )
    bank.keep("b", replace(bank.fingerprint(bank.members[1]), relations=with_.relations))
    found = bank.rank(with_)
    assert found.settings.metric == "relations,mmd"
    assert found.note == (
        "`relations` finds nothing in common with some members: the rows of `a` and 3 others do "
        "not tell answers from inputs"
    )


def test_the_papers_setting():
    assert (Settings.paper().metric, Settings.paper().temperature) == ("js", 1.0)
    assert (Options.paper().method, Options.paper().normalize) == ("soup", "none")
