from __future__ import annotations

import numpy as np
import pytest

from lorameta_rs.relevance import effective_number, leave_one_out_nearest, relevance


def test_the_nearest_and_its_percentile():
    own = np.array([0.1, 0.2, 0.3, 0.4])
    found = relevance(["a", "b"], np.array([0.5, 0.25]), np.array([0.1, 0.9]), own)
    assert (found.nearest, found.distance, found.percentile) == ("b", 0.25, 50.0)
    assert found.warning is None


def test_warns_past_the_99th_percentile():
    own = np.arange(200) / 200
    even = np.array([1.0])
    assert relevance(["a"], np.array([own[198]]), even, own).warning is None
    found = relevance(["a"], np.array([own[199]]), even, own)
    assert found.warning is not None
    assert "no member of the bank is close: `a` is nearest at 0.995" in found.warning
    assert relevance(["a"], np.array([2.0]), even, own).percentile == 100.0


def test_unknown_without_the_banks_own_distances():
    for own in (None, leave_one_out_nearest(np.zeros((1, 1)))):
        found = relevance(["a"], np.array([9.0]), np.array([1.0]), own)
        assert (found.percentile, found.warning) == (None, None)


@pytest.mark.parametrize(
    ("coefficients", "number"),
    [([1.0, 0.0], 1.0), ([0.25] * 4, 4.0), ([-2.0, 2.0], 2.0), ([1e-300, 1.0], 1.0)],
)
def test_effective_number(coefficients, number):
    assert effective_number(np.array(coefficients)) == pytest.approx(number, rel=1e-12)


def test_leave_one_out_nearest_reads_rows():
    matrix = np.array([[0.0, 3.0, 2.0], [1.0, 0.0, 4.0], [5.0, 6.0, 0.0]])
    assert leave_one_out_nearest(matrix).tolist() == [2.0, 1.0, 5.0]
