"""What a bank has taught: kept beside it, used for new datasets, and refused when out of date."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from test_ranking import text
from test_trials import NAMES

from lorameta_rs import Bank, closed_forms, distance, neural, token_distribution
from lorameta_rs.calibration import calibrated
from lorameta_rs.coefficients import combined, combined_rows
from lorameta_rs.errors import InvalidBank, InvalidSetting, MissingFile
from lorameta_rs.gram import gram_of_modules
from lorameta_rs.index import hash_adapters, make_fingerprints
from lorameta_rs.learned import FILE_NAME, Learned, path_of


def prepared(folder):
    bank = Bank(folder)
    make_fingerprints(bank)
    hash_adapters(bank)
    return bank


@pytest.fixture(scope="module")
def original(make_bank):
    """A bank of eight, and what it taught."""
    own = {name: {"text": text(i)} for i, name in enumerate(NAMES)}
    folder = make_bank(own, tokenizer=True).folder
    bank = prepared(folder)
    _, learned = calibrated(bank, ["js", "js,mmd"], 6)
    learned.save(bank)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of it, with the times of its files."""
    return shutil.copytree(original, tmp_path / "bank")


@pytest.fixture
def target(folder, tmp_path):
    (tmp_path / "new.txt").write_text(text(99))
    return token_distribution(tmp_path / "new.txt", tokenizer=folder / "tokenizer.json")


def test_what_is_kept_is_what_was_learned(folder):
    bank = Bank(folder)
    found = Learned.of(bank)
    unit = closed_forms.unit_gram([*gram_of_modules(bank).values()])
    np.testing.assert_array_equal(found.gram, unit)
    np.testing.assert_array_equal(found.distances["js"], distance.pairwise("js", bank.fingerprints))
    assert set(found.distances) == {"js", "mmd"}
    both = np.stack([found.distances["js"], found.distances["mmd"]])
    np.testing.assert_array_equal(found.rows("js,mmd"), combined_rows(both))
    assert set(found.networks) == {"mmd", "js", "js,mmd"}  # the default, and those asked for
    before = path_of(bank).read_bytes()
    found.save(bank)
    assert path_of(bank).read_bytes() == before


@pytest.mark.parametrize("metric", ["js", "js,mmd"])
def test_coefficients_of_a_new_dataset(folder, target, metric):
    bank = Bank(folder)
    learned = Learned.of(bank)
    each = [distance.distances(name, bank.fingerprints, target) for name in metric.split(",")]
    seen = each[0] if len(each) == 1 else combined(np.stack(each))
    products = closed_forms.expected_products(learned.rows(metric), learned.gram, seen)
    want = {
        "ridge": closed_forms.ridge(learned.gram, products),
        "simplex": closed_forms.simplex(learned.gram, products),
    }
    if metric in learned.networks:
        want["neural"] = neural.coefficients(learned.networks[metric], seen)
    for pipeline, coefficients in want.items():
        ranking = bank.rank(target, metric=metric, pipeline=pipeline)
        np.testing.assert_allclose(ranking.coefficients, coefficients, rtol=1e-12)
        np.testing.assert_allclose(ranking.distances, seen, rtol=1e-12)
    two = bank.rank(target, metric=metric, pipeline="simplex", top_k=2, scale=0.5).coefficients
    assert two.sum() == pytest.approx(0.5)
    assert np.count_nonzero(two) <= 2


def test_members_may_be_missing(folder, target):
    whole = Learned.of(Bank(folder))
    rest = Bank(folder, exclude=["c"])
    found = Learned.of(rest)
    kept = [NAMES.index(name) for name in rest.names]
    np.testing.assert_array_equal(found.gram, whole.gram[np.ix_(kept, kept)])
    assert len(rest.rank(target, metric="js", pipeline="ridge").coefficients) == 7


def test_what_has_changed_makes_it_out_of_date(folder, target):
    bank = Bank(folder)
    rank = {"metric": "js", "pipeline": "simplex"}
    weights = folder / "c" / "adapter_model.safetensors"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(InvalidBank, match=r"out of date: `c` has changed since, or was not inde"):
        Bank(folder).rank(target, **rank)
    hash_adapters(Bank(folder))  # the same bytes with another time
    Bank(folder).rank(target, **rank)
    (folder / "d" / "train.txt").write_text(text(50))
    make_fingerprints(other := Bank(folder))
    with pytest.raises(InvalidBank, match=r"learned\.safetensors` is out of date: `d` has changed"):
        other.rank(target, **rank)
    shutil.copytree(folder / "a", folder / "new")
    with pytest.raises(InvalidBank, match="`new` is new\nmake it with `lorameta-rs calibrate"):
        Learned.of(prepared(folder).without(["d"]))
    path_of(bank).unlink()
    with pytest.raises(MissingFile, match="nothing was learned yet: make it with"):
        bank.rank(target, **rank)


def test_what_was_learned_before_stays(folder, target):
    bank = Bank(folder)
    before = Learned.of(bank)
    _, learned = calibrated(bank, ["mmd"], 5)
    learned.save(bank)
    now = Learned.of(bank)
    assert set(now.networks) == set(before.networks) | {"mmd"}
    bank.rank(target, metric="mmd", pipeline="neural")
    with pytest.raises(InvalidBank, match="no network for the metric `cosine`; it was learned for"):
        bank.rank(target, metric="cosine", pipeline="neural")
    with pytest.raises(InvalidBank, match="no distances by `cosine`"):
        bank.rank(target, metric="cosine", pipeline="ridge")
    shutil.rmtree(folder / "h")  # other members: all is learned anew
    _, learned = calibrated(prepared(folder), ["js"], 5)
    assert set(learned.networks) == {"mmd", "js"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline": "ridge", "top_k": 3}, "none of its coefficients can be left out"),
        ({"pipeline": "neural", "temperature": 2.0}, "`neural` has no temperature"),
        ({"pipeline": "simplex", "compat": "paper"}, "no `compat`"),
        ({"scale": 0.0}, r"scale 0\.0: expected a finite number above 0"),
        ({"scale": float("nan")}, "scale nan"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(folder, target, settings, message):
    with pytest.raises(InvalidSetting, match=message):
        Bank(folder).rank(target, **{"metric": "js", **settings})


def broken(path, change):
    """Write the file again after `change` was done to its tensors and what it says of them."""
    with safetensors.safe_open(path, "numpy") as content:
        about = json.loads(content.metadata()["learned"])
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    change(tensors, about)
    path.write_bytes(safetensors.numpy.save(tensors, {"learned": json.dumps(about)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors.pop("gram"), "no `gram`"),
        (lambda tensors, _: tensors.update(gram=np.ones((2, 2))), r"shape \(2, 2\), for 8"),
        (lambda tensors, _: tensors.update(gram=np.full((8, 8), np.nan)), "finite numbers"),
        (lambda tensors, _: tensors.update(gram=np.ones((8, 8), int)), "finite numbers"),
        (lambda _, about: about.update(format=9), "its metadata is not that of format 1"),
        (lambda _, about: about["members"].update(a=3), "its metadata is not that of format 1"),
        (lambda tensors, _: tensors.pop("networks/js/mlp.3.bias"), "its network for `js` is none"),
    ],
)
def test_a_broken_file(folder, change, message):
    path = folder / FILE_NAME
    broken(path, change)
    with pytest.raises(InvalidBank, match=message):
        Learned.of(Bank(folder))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(original, content):
    bank = Bank(original)
    path = path_of(bank)
    kept = path.read_bytes()
    try:
        path.write_bytes(content)
        with pytest.raises(InvalidBank, match="make it with"):
            Learned.load(bank)
    finally:
        path.write_bytes(kept)
