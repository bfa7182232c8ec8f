"""The search for a mixture, on answers whose log-odds are known functions of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorameta_rs.errors import InvalidSetting
from lorameta_rs.search import search


def answers(seed, candidates, tokens=60, bend=0.0):
    """Log-probabilities that are best at a mixture that is known, and how often they were asked."""
    random = np.random.default_rng(seed)
    best = random.normal(0.4, 0.4, candidates)
    slopes = random.normal(size=(candidates, tokens))
    asked = []

    def look(weights):
        asked.append(weights)
        off = (weights - best) @ slopes
        return -np.logaddexp(0.0, -(2.0 - off**2 - bend * np.abs(off) ** 3))

    return look, best, asked


def loss(look, weights):
    return -look(weights).mean()


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(0, 40))
def test_it_is_never_worse_than_the_best_alone_and_keeps_to_its_budget(seed, candidates, more):
    look, _, asked = answers(seed, candidates, bend=0.1)
    found = search(look, candidates, candidates + 1 + more)
    assert len(asked) == found.evaluations <= candidates + 1 + more
    alone = [loss(look, unit) for unit in np.eye(candidates)]
    assert found.loss <= min(alone) + 1e-12
    assert found.single == int(np.argmin(alone))
    assert found.loss == pytest.approx(loss(look, found.weights), rel=1e-5)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(0, 5), st.integers(0, 40))
def test_of_alternatives_the_first_and_the_best_are_mixed(seed, alternatives, others, more):
    candidates = alternatives + others
    look, _, asked = answers(seed, candidates, bend=0.1)
    found = search(look, candidates, candidates + 1 + more, alternatives)
    alone = [loss(look, unit) for unit in np.eye(candidates)]
    best = int(np.argmin(alone[:alternatives]))
    worse = [k for k in range(1, alternatives) if k != best]
    asked_later = np.array(asked[candidates + 1 : found.evaluations]).reshape(-1, candidates)
    assert not found.weights[worse].any()
    assert not asked_later[:, worse].any()
    assert found.single == int(np.argmin(alone))
    assert found.loss <= min(alone) + 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_it_comes_near_the_best_mixture(seed):
    look, best, _ = answers(seed, 5)
    found = search(look, 5, 70)
    alone = min(loss(look, unit) for unit in np.eye(5))
    assert loss(look, found.weights) - loss(look, best) < 0.35 * (alone - loss(look, best))


def test_it_is_the_same_each_time():
    first, second = (search(answers(3, 4)[0], 4, 40) for _ in range(2))
    np.testing.assert_array_equal(first.weights, second.weights)


def test_answers_that_say_nothing_leave_a_candidate_as_it_is():
    found = search(lambda _: np.full(20, -1.0), 3, 30)
    np.testing.assert_array_equal(found.weights, [1, 0, 0])


def test_a_certain_or_hopeless_token_does_no_harm():
    def look(weights):
        return np.array([0.0, -1e4, -np.logaddexp(0, -weights[0])])

    assert np.isfinite(search(look, 2, 20).weights).all()


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(InvalidSetting, match="need 4 evaluations"):
        search(lambda _: np.zeros(3), 3, 3)
