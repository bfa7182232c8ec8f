from __future__ import annotations

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from lorameta_rs import coefficients, paper
from lorameta_rs.errors import InvalidBank, InvalidSetting

finite = st.floats(0.0, 1e6, allow_subnormal=True)
many = stn.arrays(np.float64, st.integers(1, 30), elements=finite)
small = stn.arrays(np.float64, st.integers(1, 30), elements=st.floats(0.0, 30.0))


@pytest.mark.parametrize(
    ("pipeline", "compat", "tolerance"),
    [
        *((pipeline, None, 1e-12) for pipeline in coefficients.PIPELINES),
        *((pipeline, "paper", 1e-5) for pipeline in paper.PIPELINES),
    ],
)
@given(d=many)
def test_sum_to_one_and_the_nearest_has_the_most(pipeline, compat, tolerance, d):
    c = coefficients.from_distances(d, pipeline, compat=compat)
    assert c.sum() == pytest.approx(1.0, abs=tolerance)
    assert c.dtype == np.float64
    assert (c >= 0.0).all()
    assert c[np.argmin(d)] == c.max()


@given(small, st.floats(0.1, 10.0))
def test_equals_the_formula(d, temperature):
    np.testing.assert_allclose(coefficients.attentional(d), reference.softmin(d), rtol=1e-9)
    np.testing.assert_allclose(
        coefficients.normalized(d, temperature), reference.normalized(d, temperature), rtol=1e-9
    )


@given(many, st.floats(0.0, exclude_min=True, allow_infinity=False))
def test_every_temperature_is_safe(d, temperature):
    c = coefficients.normalized(d, temperature)
    assert c.sum() == pytest.approx(1.0, abs=1e-12)


def test_temperature_goes_from_nearest_to_uniform():
    d = np.array([0.3, 0.1, 0.2])
    np.testing.assert_allclose(coefficients.normalized(d, 1e-320), coefficients.nearest(d))
    np.testing.assert_allclose(coefficients.normalized(d, 1e9), coefficients.uniform(d))


def test_controls():
    d = np.array([0.5, 0.2, 0.2])
    assert coefficients.nearest(d).tolist() == [0.0, 1.0, 0.0]
    assert coefficients.uniform(d).tolist() == [1 / 3] * 3


@pytest.mark.parametrize("pipeline", coefficients.PIPELINES)
def test_one_member_has_all(pipeline):
    assert coefficients.from_distances(np.array([0.4]), pipeline).tolist() == [1.0]


def test_distances_that_are_none():
    with pytest.raises(InvalidBank, match="no members"):
        coefficients.uniform(np.empty(0))
    with pytest.raises(InvalidBank, match="distance of member 1 is nan"):
        coefficients.attentional(np.array([0.1, np.nan]))
    with pytest.raises(InvalidBank, match="distance of member 0 is inf"):
        coefficients.from_distances(np.array([np.inf]), compat="paper")


def test_settings_that_cannot_be():
    d = np.array([0.1, 0.2])
    for temperature in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(InvalidSetting, match="expected a finite number above 0"):
            coefficients.from_distances(d, temperature=temperature)
    with pytest.raises(InvalidSetting, match="pipeline `nearest` has no temperature"):
        coefficients.from_distances(d, "nearest", temperature=2.0)
    with pytest.raises(InvalidSetting, match="pipeline `normalized` of the paper has no temp"):
        coefficients.from_distances(d, temperature=2.0, compat="paper")
    with pytest.raises(InvalidSetting, match="pipeline `best`: expected one of attentional"):
        coefficients.from_distances(d, "best")
    with pytest.raises(InvalidSetting, match=r"one of the paper of attentional, normalized$"):
        coefficients.from_distances(d, "nearest", compat="paper")
    with pytest.raises(InvalidSetting, match='compat `peft`: expected "paper"'):
        coefficients.from_distances(d, compat="peft")


def test_top_k():
    c = np.array([0.1, 0.3, 0.3, 0.3])
    assert coefficients.select(c, top_k=2).tolist() == [0.0, 0.5, 0.5, 0.0]
    np.testing.assert_allclose(coefficients.select(c, top_k=9), c)
    np.testing.assert_allclose(coefficients.select(c), c)


@given(many, st.floats(0.0, 1.0, exclude_min=True))
def test_mass_keeps_the_fewest_that_hold_it(d, mass):
    c = coefficients.attentional(d)
    kept = coefficients.select(c, mass=mass)
    chosen = kept > 0.0
    assert kept.sum() == pytest.approx(1.0)
    assert c[chosen].sum() >= mass - 1e-12
    assert c[chosen].sum() - c[chosen].min() < mass + 1e-12
    assert c[~chosen].max(initial=0.0) <= c[chosen].min()


def test_min_similarity_decides_first():
    c, similar = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.9, 0.8, 0.9])
    got = coefficients.select(c, top_k=2, similarity=similar, min_similarity=0.8)
    np.testing.assert_allclose(got, [0.0, 0.6, 0.4, 0.0])
    got = coefficients.select(c, mass=0.4, similarity=similar, min_similarity=0.8)
    np.testing.assert_allclose(got, [0.0, 1.0, 0.0, 0.0])


def test_selections_that_cannot_be():
    c, similar = np.array([1.0, 0.0]), np.array([0.2, 0.25])
    for settings, message in [
        ({"top_k": 0}, "top-k 0: expected 1 or more"),
        ({"mass": 0.0}, "mass 0.0: expected a share above 0"),
        ({"mass": np.nan}, "mass nan"),
        (
            {"min_similarity": 0.5},
            "only the metrics js, relations, cosine and vectors have a similarity",
        ),
        ({"min_similarity": 1.5, "similarity": similar}, "expected a number from 0 to 1"),
        ({"min_similarity": 0.5, "similarity": similar}, "the most similar member has 0.2500"),
        ({"min_similarity": 0.25, "similarity": similar}, "have no coefficient above 0"),
    ]:
        with pytest.raises(InvalidSetting, match=message):
            coefficients.select(c, **settings)


def test_explicit_weights_are_taken_as_they_are():
    got = coefficients.explicit(["a", "b", "c"], {"c": 2, "a": -0.5})
    assert got.tolist() == [-0.5, 0.0, 2.0]
    assert got.dtype == np.float64
    assert coefficients.explicit(["a"], {"a": 1e-45}).tolist() == [1e-45]


def test_weights_that_cannot_be():
    names = ["task001_cats", "task002_dogs"]
    for weights, message in [
        ({"task01_cats": 1.0}, "`task01_cats`: the bank has no such member\ndid you mean `task001"),
        ({"x": 1.0}, "no such member$"),
        ({"task001_cats": np.nan}, "`task001_cats`: nan is not a finite number"),
        ({"task001_cats": 1e39}, "`task001_cats`: 1e\\+39 is out of the range of float32"),
        ({"task001_cats": -1e39}, "`task001_cats`: -1e\\+39 is out of the range of float32"),
        ({"task001_cats": 1e-46}, "`task001_cats`: 1e-46 is out of the range of float32"),
        ({"task001_cats": 0.0}, "at least one that is not 0"),
        ({}, "at least one that is not 0"),
    ]:
        with pytest.raises(InvalidSetting, match=message):
            coefficients.explicit(names, weights)
