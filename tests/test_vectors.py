"""A user's own vectors: read, given to a bank's members, and compared."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
from scipy.spatial.distance import cosine
from test_ranking import text

from lorameta_rs import Bank, distance, token_distribution
from lorameta_rs.errors import InvalidBank, InvalidDataset, MissingFile
from lorameta_rs.index import make_fingerprints
from lorameta_rs.vectors import Vectors

NAMES = list("abcde")


@pytest.fixture
def given():
    random = np.random.default_rng(0)
    return {name: random.normal(size=6).astype(np.float32) for name in (*NAMES, "new")}


@pytest.fixture
def bank(make_bank, tmp_path):
    own = {name: {"text": text(i)} for i, name in enumerate(NAMES)}
    make_fingerprints(bank := Bank(make_bank(own, tokenizer=True).folder))
    (tmp_path / "new.txt").write_text(text(99))
    return bank


@pytest.fixture(params=["npz", "safetensors"])
def path(request, given, tmp_path):
    path = tmp_path / f"vectors.{request.param}"
    if request.param == "npz":
        np.savez(path, **given)
    else:
        safetensors.numpy.save_file(given, path)
    return path


def test_distances_are_cosines(bank, path, given, tmp_path):
    vectors = Vectors.load([path])
    vectors.give(bank)
    new = tmp_path / "new.txt"
    target = vectors.of(new, token_distribution(new, tokenizer=bank.tokenizer))
    want = [cosine(given[name].astype(np.float64), given["new"]) for name in NAMES]
    ranking = bank.rank(target, metric="vectors")
    np.testing.assert_allclose(ranking.distances, want, rtol=1e-6)
    np.testing.assert_allclose(ranking.similarity, 1 - np.array(want), rtol=1e-6)
    matrix = distance.pairwise("vectors", bank.fingerprints)
    own = [[cosine(given[i].astype(np.float64), given[j]) for j in NAMES] for i in NAMES]
    np.testing.assert_allclose(matrix, own, atol=1e-6)
    both = bank.rank(target, metric="vectors,mmd")
    assert not np.allclose(both.coefficients, ranking.coefficients)


def test_rank_and_merge_take_them(lorameta, bank, path, given, tmp_path):
    new = tmp_path / "new.txt"
    command = ["rank", bank.folder, new, "--metric", "vectors", "--vectors", path]
    status, out, err = lorameta(*command)
    assert status == 0, err
    want = min(NAMES, key=lambda name: cosine(given[name], given["new"]))
    assert out.splitlines()[1].split("\t")[0] == want
    np.savez(tmp_path / "own.npz", **{"new.txt": given["c"]})
    status, out, err = lorameta(*command, "--vectors", tmp_path / "own.npz")
    assert out.splitlines()[1].startswith("c\t0")
    status, _, err = lorameta("merge", *command[1:], "-o", tmp_path / "out")
    assert status == 0, err
    status, _, err = lorameta(*command[:-2])
    advice = "a dataset has no vector; `rank` and `merge` take them by --vectors FILE"
    assert (status, advice in err) == (1, True)
    status, _, err = lorameta("index", bank.folder, "--metric", "vectors")
    assert (status, advice in err) == (1, True)  # it has no such option itself
    status, _, err = lorameta(
        "merge", bank.folder, "--weights", "a=1", "--vectors", path, "-o", tmp_path / "x"
    )
    assert (status, "--vectors has no effect beside --weights" in err) == (2, True)


def test_vectors_that_are_missing_are_named(bank, given, tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, e=given["e"])
    vectors = Vectors.load([path])
    with pytest.raises(InvalidBank, match=r"no vector of `a`, `b`, `c` and 1 other member.* of `"):
        vectors.give(bank)
    with pytest.raises(InvalidDataset, match=r"expected one named `new` or `new\.txt`"):
        vectors.of(tmp_path / "new.txt", bank.fingerprint(bank.members[0]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": np.ones(3), "b": np.ones(4)}, "`b` has 4 numbers, `a` has 3"),
        ({"a": np.ones((2, 3))}, r"`a`, float64 of shape \(2, 3\), is no vector"),
        ({"a": np.array([1.0, np.nan])}, "no vector of finite numbers"),
        ({"a": np.zeros(3)}, "not all 0"),
        ({"a": np.array([])}, "is no vector"),
        ({"a": np.array(["x"])}, "`a`, <U1 of shape"),
        ({"a": np.array([object()])}, "no vectors: Object arrays cannot be loaded"),
    ],
    ids=range(7),
)
def test_what_are_no_vectors(tmp_path, content, message):
    path = tmp_path / "vectors.npz"
    np.savez(path, **content)
    with pytest.raises(InvalidDataset, match=message):
        Vectors.load([path])


@pytest.mark.parametrize("name", ["v.npz", "v.safetensors", "v.txt"])
def test_other_files(tmp_path, name):
    with pytest.raises(MissingFile):
        Vectors.load([tmp_path / name])
    for content in (b"", b"nothing of the kind", b"PK\x03\x04" + b"x" * 40):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidDataset, match=r"no vectors: .*\nexpected `\.npz` of numbers"):
            Vectors.load([tmp_path / name])
