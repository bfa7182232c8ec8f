from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import scipy.spatial.distance
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from lorameta_rs import _metrics, coefficients, distance
from lorameta_rs.errors import InvalidBank, InvalidDataset, InvalidSetting
from lorameta_rs.fingerprint import Fingerprint, Fingerprints
from lorameta_rs.relations import NAMES

OF_TOKENS = [name for name in distance.METRICS if name not in ("relations", "vectors")]

GOLDEN = Path(__file__).parent / "golden"
LN2 = np.log(2.0)


def fingerprint(counts, vocab_size):
    ids = np.array(sorted(counts), np.uint32)
    return Fingerprint(ids, np.array([counts[i] for i in sorted(counts)], np.uint64), vocab_size)


def fingerprints(rows, vocab_size):
    rows = [fingerprint(row, vocab_size) for row in rows]
    return Fingerprints(
        np.cumsum([0] + [len(row.ids) for row in rows], dtype=np.int64),
        np.concatenate([np.empty(0, np.uint32), *[row.ids for row in rows]]),
        np.concatenate([np.empty(0, np.uint64), *[row.counts for row in rows]]),
        vocab_size,
    )


def dense(counts, vocab_size):
    return reference.dense(list(counts), list(counts.values()), vocab_size)


@st.composite
def banks(draw, largest=2**50, members=6):
    """A vocabulary's size and the counts of one to `members` datasets, by id."""
    vocab_size = draw(st.sampled_from([1, 2, 3, 7, 40]))
    size = st.one_of(st.integers(1, 5), st.integers(1, largest))
    row = st.dictionaries(st.integers(0, vocab_size - 1), size, min_size=1)
    return vocab_size, draw(st.lists(row, min_size=1, max_size=members))


@pytest.mark.parametrize("metric", reference.METRICS)
@given(banks())
def test_equals_the_dense_formula(metric, bank):
    vocab_size, rows = bank
    got = distance.METRICS[metric](fingerprints(rows, vocab_size), fingerprint(rows[0], vocab_size))
    q = dense(rows[0], vocab_size)
    want = [reference.METRICS[metric](dense(row, vocab_size), q) for row in rows]
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-13)
    assert got.dtype == np.float64


@given(banks())
def test_cosine_equals_the_dense_formula(bank):
    vocab_size, rows = bank
    got = distance.cosine(fingerprints(rows[1:], vocab_size), fingerprint(rows[0], vocab_size))
    members = np.reshape([dense(row, vocab_size) for row in rows[1:]], (-1, vocab_size))
    q = dense(rows[0], vocab_size)
    np.testing.assert_allclose(
        got, [reference.cosine(p, q, members) for p in members], rtol=1e-9, atol=1e-13
    )


@given(banks())
def test_equals_scipy(bank):
    vocab_size, rows = bank
    ids = np.arange(vocab_size)
    p, q = dense(rows[0], vocab_size), dense(rows[-1], vocab_size)
    members, target = fingerprints(rows[:1], vocab_size), fingerprint(rows[-1], vocab_size)
    # SciPy's divergence of all but equal distributions is rounding, and its root need not be real.
    with np.errstate(invalid="ignore"):
        root = scipy.spatial.distance.jensenshannon(p, q)
    for metric, want in {
        "js": np.nan_to_num(root) ** 2,
        "kl": scipy.stats.entropy(q + 1e-10, p + 1e-10),
        "wasserstein": scipy.stats.wasserstein_distance(ids, ids, p, q),
    }.items():
        got = distance.METRICS[metric](members, target)
        np.testing.assert_allclose(got, [want], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("metric", OF_TOKENS)
@given(banks())
def test_equal_distributions_are_at_zero_and_none_is_nearer(metric, bank):
    vocab_size, rows = bank
    twice = {i: 2 * count for i, count in rows[0].items()}
    got = distance.METRICS[metric](
        fingerprints([*rows, twice], vocab_size), fingerprint(rows[0], vocab_size)
    )
    assert got[0] == got[-1] == 0.0
    assert (got >= 0.0).all()


@given(banks())
def test_js_is_symmetric_and_at_most_ln_2(bank):
    matrix = np.array(
        [
            distance.jensen_shannon(fingerprints(bank[1], bank[0]), fingerprint(row, bank[0]))
            for row in bank[1]
        ]
    )
    np.testing.assert_array_equal(matrix, matrix.T)
    assert (matrix <= LN2).all()


@given(banks(largest=2000, members=2))
def test_js_is_zero_only_for_equal(bank):
    vocab_size, rows = bank
    js = distance.jensen_shannon(
        fingerprints(rows[:1], vocab_size), fingerprint(rows[-1], vocab_size)
    )
    total = [sum(row.values()) for row in rows]
    same = rows[0].keys() == rows[-1].keys() and all(
        rows[0][i] * total[-1] == rows[-1][i] * total[0] for i in rows[0]
    )
    assert (js[0] == 0.0) == same


def test_js_of_almost_equal_distributions_keeps_its_digits():
    n, step = 2**40, 2**8  # p and q = ½ ± x: JS = 2x² + O(x⁴) from the even one
    bank = fingerprints([{0: n, 1: n}], 2)
    js = distance.jensen_shannon(bank, fingerprint({0: n + step, 1: n - step}, 2))
    assert js[0] == pytest.approx((step / n / 2) ** 2 / 2, rel=1e-6)


def test_disjoint_and_extreme():
    bank = fingerprints([{0: 2**50, 1: 1}, {2: 1}, {3: 7}], 4)
    target = fingerprint({3: 2**50}, 4)
    assert distance.jensen_shannon(bank, target).tolist() == [LN2, LN2, 0.0]
    assert distance.wasserstein(bank, target).tolist() == pytest.approx([3.0, 1.0, 0.0])
    assert distance.cosine(bank, target).tolist() == [1.0, 1.0, 0.0]
    lopsided = fingerprint({0: 1, 1: 2**50}, 4)
    assert distance.jensen_shannon(bank, lopsided)[0] == pytest.approx(LN2, rel=1e-12)


@pytest.mark.parametrize("metric", OF_TOKENS)
@given(banks())
def test_all_pairs_are_the_rows(metric, bank):
    vocab_size, rows = bank
    some = fingerprints(rows, vocab_size)
    want = [distance.METRICS[metric](some, fingerprint(row, vocab_size)) for row in rows]
    np.testing.assert_allclose(distance.pairwise(metric, some), want, rtol=1e-12, atol=1e-15)


def test_all_pairs_of_more_than_one_block():
    rows = [{i: 1 + i, (5 * i) % 61: 3} for i in range(40)]
    some, done = fingerprints(rows, 61), []
    for metric in OF_TOKENS:
        want = [distance.METRICS[metric](some, fingerprint(row, 61)) for row in rows]
        got = distance.pairwise(metric, some, done.append)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
    assert done == [*[16, 32, 40] * 3, 32, 40, 16, 32, 40]


@given(banks(), st.randoms())
def test_permuting_the_bank_permutes_the_coefficients(bank, random):
    vocab_size, rows = bank
    order = random.sample(range(len(rows)), len(rows))
    target = fingerprint(rows[0], vocab_size)
    for pipeline in ("attentional", "normalized", "uniform"):
        there, here = (
            coefficients.from_distances(
                distance.jensen_shannon(fingerprints(some, vocab_size), target), pipeline
            )
            for some in (rows, [rows[i] for i in order])
        )
        np.testing.assert_allclose(here, there[order], rtol=1e-12)


def test_similarity():
    assert distance.similarity("js", np.array([0.0, LN2])).tolist() == [1.0, 0.0]
    assert distance.similarity("cosine", np.array([0.25])).tolist() == [0.75]
    assert distance.similarity("kl", np.array([0.25])) is None


def test_the_circulant_of_the_mmd_has_a_real_root():
    for vocab_size in [*range(1, 200), 1740, 32000]:
        form = _metrics.MaximumMeanDiscrepancy(fingerprints([{0: 1}], vocab_size))
        eigenvalues = form.weights**2 * form.size
        assert eigenvalues.min() > 1.9


def test_what_cannot_be_compared():
    bank, target = fingerprints([{0: 1}, {1: 1}], 3), fingerprint({0: 1}, 3)
    with pytest.raises(InvalidBank, match="over 3 tokens, the dataset's over 4"):
        distance.jensen_shannon(bank, fingerprint({0: 1}, 4))
    with pytest.raises(InvalidDataset, match="dataset's fingerprint has no tokens"):
        distance.jensen_shannon(bank, fingerprint({}, 3))
    with pytest.raises(InvalidBank, match="fingerprint 1 of the bank has no tokens"):
        distance.jensen_shannon(fingerprints([{0: 1}, {}], 3), target)
    with pytest.raises(InvalidSetting, match="metric `hamming`: expected one of js, kl"):
        distance.distances("hamming", bank, target)
    with pytest.raises(InvalidSetting, match="metric `hamming`: expected one of js, kl"):
        distance.pairwise("hamming", bank)


def lab():
    """The lab bank's fingerprints, as `lab_fingerprints` makes them, and its task families."""
    with safe_open(GOLDEN / "lab_fingerprints.safetensors", "np") as file:
        about = file.metadata()
        tensors = [file.get_tensor(name) for name in ("indptr", "ids", "counts")]
    return Fingerprints(*tensors, int(about["vocab_size"])), json.loads(about["families"])


def test_the_paper_in_miniature():
    """Each lab dataset against the other 47: the oracle's coefficients, and its own family."""
    bank, families = lab()
    rows = [
        dict(zip(bank.ids[a:b].tolist(), bank.counts[a:b].tolist(), strict=True))
        for a, b in zip(bank.indptr, bank.indptr[1:], strict=False)
    ]
    at_home = 0
    for i, row in enumerate(rows):
        rest = [other for j, other in enumerate(rows) if j != i]
        target = fingerprint(row, bank.vocab_size)
        d = distance.jensen_shannon(fingerprints(rest, bank.vocab_size), target)
        q = dense(row, bank.vocab_size)
        want = [reference.jensen_shannon(dense(other, bank.vocab_size), q) for other in rest]
        np.testing.assert_allclose(
            coefficients.normalized(d), reference.normalized(np.array(want)), rtol=1e-10
        )
        at_home += families[i] == (families[:i] + families[i + 1 :])[np.argmin(d)]
    assert (at_home, len(rows)) == (35, 48)


def related(*rows):
    """Fingerprints that have nothing but relations."""
    counts = np.zeros((len(rows), len(NAMES)), np.uint64)
    for row, found in zip(counts, rows, strict=True):
        for name, count in found.items():
            row[NAMES.index(name)] = count
    nothing = np.array([0], np.uint32), np.array([1], np.uint64)
    return [Fingerprint(*nothing, vocab_size=1, relations=row) for row in counts]


def test_relations_are_compared_by_jensen_shannon():
    found = related(
        {"next": 3, "new": 1}, {"back": 4}, {"next": 6, "new": 2}, {"next": 1, "back": 1}
    )
    bank = Fingerprints.stack(found)
    dense_rows = np.array([one.relations / one.relations.sum() for one in found])
    want = [reference.METRICS["js"](p, dense_rows[0]) for p in dense_rows]
    got = distance.relational(bank, found[0])
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
    assert got[0] == got[2] == 0.0
    assert got[1] == pytest.approx(LN2)
    matrix = [distance.relational(bank, one) for one in found]
    np.testing.assert_allclose(distance.pairwise("relations", bank), matrix, atol=1e-15)


def test_what_has_no_answers_has_no_relations():
    with_, without = related({"next": 1}), fingerprint({0: 1}, 1)
    bank = Fingerprints.stack(with_)
    assert distance.applicable("relations, mmd", bank, with_[0]) == ("relations", "mmd")
    assert distance.applicable("relations,mmd", bank, without) == ("mmd",)
    none = Fingerprints.stack([without, without])
    assert distance.applicable("relations,mmd", none, with_[0]) == ("mmd",)
    with pytest.raises(InvalidBank, match="no answers apart"):
        distance.applicable("relations", none)
    with pytest.raises(InvalidDataset, match="no answers"):
        distance.relational(bank, without)
    with pytest.raises(InvalidBank, match="no dataset of the bank has answers"):
        distance.relational(none, with_[0])
    mixed = Fingerprints.stack([*with_, without])
    assert distance.applicable("relations,mmd", mixed, with_[0]) == ("relations", "mmd")
    assert distance.relational(mixed, with_[0]).tolist() == [0.0, LN2]
    np.testing.assert_array_equal(distance.pairwise("relations", mixed), [[0, LN2], [LN2, 0]])
    for metrics, words in (("relation", "metric `relation`"), ("js,js", "named twice")):
        with pytest.raises(InvalidSetting, match=words):
            distance.applicable(metrics, bank)
