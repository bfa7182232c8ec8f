from __future__ import annotations

import numpy as np
import pytest

from lorameta_rs.relevance import effective_number, leave_one_out_nearest, percentile, relevance

OWN = np.arange(200) / 200


def of(*distances, own=OWN):
    """The figures of distances by one metric."""
    return relevance(
        [chr(97 + i) for i in range(len(distances))],
        np.array(distances),
        np.ones(len(distances)),
        percentile(np.array([distances]), [own]),
    )


def test_the_nearest_and_its_percentile():
    found = of(0.5, 0.25, own=np.array([0.1, 0.2, 0.3, 0.4]))
    assert (found.nearest, found.distance, found.percentile) == ("b", 0.25, 50.0)
    assert found.warning is None


def test_warns_past_the_99th_percentile():
    assert of(OWN[198]).warning is None
    found = of(OWN[199])
    assert found.warning is not None
    assert "no member of the bank is close: `a` is nearest at 0.995" in found.warning
    assert of(2.0).percentile == 100.0


def test_each_metric_counts_in_its_own_unit():
    own = [np.array([0.1, 0.2]), np.array([10.0, 20.0])]
    assert percentile(np.array([[0.15, 9.0], [30.0, 25.0]]), own) == 75.0
    assert percentile(np.array([[0.05, 9.0], [30.0, 5.0]]), own) == 0.0
    assert percentile(np.array([[1.0], [1.0]]), [own[0], None]) is None


def test_unknown_without_the_banks_own_distances():
    for own in (None, leave_one_out_nearest(np.zeros((1, 1)))):
        found = of(9.0, own=own)
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


def test_whole_numbers_are_coefficients_too():
    assert effective_number(np.array([1, 1, 0, -1])) == pytest.approx(3.0)
