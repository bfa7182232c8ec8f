"""Closed forms against explicit ΔW: least squares, and scipy's minimiser on the simplex."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from lorameta_rs import Bank
from lorameta_rs.closed_forms import PENALTY, expected_products, ridge, simplex, unit_gram
from lorameta_rs.errors import InvalidBank, InvalidSetting
from lorameta_rs.gram import gram_of_modules


def problem(n, numbers, seed):
    """ΔW of n members and of a new one, as rows of numbers."""
    random = np.random.default_rng(seed)
    common = random.normal(size=numbers)
    x = random.normal(size=(n, numbers)) + 0.7 * common
    return x, random.normal(size=numbers) + 0.7 * common


def of_simplex(x, new):
    """What scipy's active sets find, the sum being one as a row of great weight."""
    weight = 1e4
    rows = np.vstack([x.T, np.full(len(x), weight)])
    c, _ = scipy.optimize.nnls(rows, np.append(new, weight))
    return c


@pytest.mark.parametrize("seed", range(5))
def test_ridge_is_the_least_squares_of_the_tensors(seed):
    """With λ as further rows: √λ c is to be zero."""
    x, new = problem(6, 40, seed)
    penalty = PENALTY * np.mean(np.sum(x * x, axis=1))
    rows = np.vstack([x.T, np.sqrt(penalty) * np.eye(6)])
    want = np.linalg.lstsq(rows, np.append(new, np.zeros(6)))[0]
    np.testing.assert_allclose(ridge(x @ x.T, x @ new), want, rtol=1e-9)
    products = np.stack([x @ new, x @ x[0]])
    np.testing.assert_allclose(ridge(x @ x.T, products)[0], want, rtol=1e-9)
    left_out = ridge(x @ x.T, x @ x.T, leave_one_out=True)
    for i in range(6):
        others = np.delete(np.arange(6), i)
        held = np.linalg.lstsq(rows[:, others], np.append(x[i], np.zeros(6)))[0]
        np.testing.assert_allclose(left_out[i, others], held, rtol=1e-9)
        assert left_out[i, i] == 0


@given(n=st.integers(2, 9), numbers=st.integers(2, 40), seed=st.integers(0, 1 << 20))
def test_simplex_is_what_scipy_finds(n, numbers, seed):
    """Also where the members depend on each other linearly: then the error is the same."""
    x, new = problem(n, numbers, seed)
    gram, products = x @ x.T, x @ new
    c = simplex(gram, products)
    assert c.min() >= 0
    assert c.sum() == pytest.approx(1)
    want = of_simplex(x, new)
    error, least = (np.sum((one @ x - new) ** 2) for one in (c, want))
    assert error <= least + 1e-5 * np.mean(np.diag(gram))
    if numbers > 2 * n:
        np.testing.assert_allclose(c, want, atol=2e-3)


def test_simplex_leaves_one_out():
    x, _ = problem(7, 50, 3)
    gram = x @ x.T
    c = simplex(gram, gram, leave_one_out=True)
    for i, row in enumerate(c):
        others = np.delete(np.arange(7), i)
        np.testing.assert_allclose(row[others], of_simplex(x[others], x[i]), atol=1e-3)
        assert row[i] == 0
    np.testing.assert_allclose(simplex(gram, gram), np.eye(7), atol=1e-3)


@given(n=st.integers(2, 8), seed=st.integers(0, 1 << 20))
def test_expected_products_are_the_monotone_regression(n, seed):
    """The least squares of all that never rise, which scipy has too."""
    random = np.random.default_rng(seed)
    distances, gram = random.uniform(size=(2, n, n))
    pairs = ~np.eye(n, dtype=bool)
    order = np.argsort(distances[pairs])
    want = -scipy.optimize.isotonic_regression(-gram[pairs][order]).x
    found = expected_products(distances, gram, distances[pairs][order])
    np.testing.assert_allclose(found, want, atol=1e-12)
    assert expected_products(distances, gram, np.array(9.0)) == pytest.approx(want[-1])


def test_many_pairs_are_averaged_first():
    random = np.random.default_rng(0)
    distances = random.uniform(size=(40, 40))
    gram = np.exp(-3 * distances) + 0.05 * random.normal(size=(40, 40))
    at = np.linspace(0.05, 0.95, 50)
    found = expected_products(distances, gram, at)
    np.testing.assert_allclose(found, np.exp(-3 * at), atol=0.05)
    assert (np.diff(found) <= 0).all()


def test_unit_norms_are_those_of_each_module(make_bank):
    bank = Bank(make_bank(list("abc")).folder)
    modules = gram_of_modules(bank)
    x = np.random.default_rng(0).normal(size=(3, 3, 5))
    given = [one @ one.T for one in x]
    unit = x / np.linalg.norm(x, axis=2, keepdims=True)
    np.testing.assert_allclose(unit_gram(given), np.mean([u @ u.T for u in unit], axis=0))
    np.testing.assert_allclose(np.diag(unit_gram([*modules.values()])), 1)
    given[0][1] = given[0][:, 1] = 0  # a module that the second member lacks
    assert unit_gram(given)[1, 1] == pytest.approx(2 / 3)


def test_what_cannot_be_is_refused():
    gram = np.eye(3)
    with pytest.raises(InvalidSetting, match=r"penalty 0\.0: expected a number above 0"):
        ridge(gram, gram[0], 0.0)
    with pytest.raises(InvalidBank, match="the same two or more members"):
        expected_products(gram[:2], gram, gram[0])
    with pytest.raises(InvalidBank, match="the same two or more members"):
        expected_products(gram[:1, :1], gram[:1, :1], gram[0])
