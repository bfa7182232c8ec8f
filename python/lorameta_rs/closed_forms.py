"""Coefficients in closed form: those with the least expected error, as distances let one expect it.

A new dataset's X, the ΔW that training would give it, is not known, but its inner products with the
members' X_i can be expected: g(d) is what members at a distance d from each other have on average.
The expected error of a mixture, E‖Σ c_i X_i − X‖² = cᵀGc − 2 cᵀg + const, is then least for

    ridge      c = (G + λI)⁻¹ g: any sign, any sum; λ because g is a guess (kernel ridge regression)
    simplex    the c of all that are not negative and add up to one, by projected gradients

G being the members' own inner products (`gram`). Of one module's G they give that module's c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs.errors import InvalidBank, InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorameta_rs._metrics import Floats

PENALTY = 0.3
"""λ of `ridge`, in units of the members' mean square norm."""

# Pairs are averaged in so many groups at most before their order is looked at.
_BINS = 256
_STEPS = 2000
# How far from the least `simplex` may end, in units of the mean square norm.
_GAP = 1e-7


def expected_products(distances: Floats, gram: Floats, new: Floats) -> Floats:
    """The inner products that a dataset at these distances can be expected to have.

    g is the monotone regression of G_ij on d_ij over all pairs of members (Barlow et al. 1972, by
    pooling adjacent violators): farther never means more alike. In between it is linear.

    Args:
        distances: Between the members [n, n], a row as each of them sees it.
        gram: Their inner products [n, n].
        new: The distances at which to expect them, of any shape.

    Raises:
        InvalidBank: There are fewer than two members, or the shapes differ.

    >>> distances = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [2.0, 2.0, 0.0]])
    >>> gram = np.array([[1.0, 0.6, 0.1], [0.6, 1.0, 0.3], [0.1, 0.3, 1.0]])
    >>> expected_products(distances, gram, np.array([0.5, 1.0, 1.5, 3.0]))
    array([0.6, 0.6, 0.4, 0.2])
    """
    n = len(gram)
    if n < 2 or gram.shape != (n, n) or distances.shape != (n, n):
        raise InvalidBank(
            f"distances of shape {distances.shape}, inner products of {gram.shape}: expected those "
            "of the same two or more members"
        )
    pairs = ~np.eye(n, dtype=bool)
    order = np.argsort(distances[pairs], kind="stable")
    bins = min(len(order), _BINS)
    places, products = (
        np.array([part.mean() for part in np.array_split(values[pairs][order], bins)])
        for values in (distances, gram)
    )
    fitted: Floats = np.interp(new, places, _falling(products))
    return fitted


def ridge(
    gram: Floats, products: Floats, penalty: float = PENALTY, *, leave_one_out: bool = False
) -> Floats:
    """Coefficients (G + λI)⁻¹ g, of any sign and any sum: smaller where little is known.

    Args:
        gram: G, the members' inner products [n, n].
        products: g, those of one dataset [n], or of several [rows, n].
        penalty: λ, in units of the mean of G's diagonal; above 0.
        leave_one_out: Row i is that of member i, which takes no part in it: c_i = 0.

    Returns:
        float64, of the shape of `products`.

    Raises:
        InvalidSetting: `penalty` is not a positive number.
    """
    if not penalty > 0.0:
        raise InvalidSetting(f"penalty {penalty}: expected a number above 0")
    n = len(gram)
    inverse = np.linalg.inv(gram + penalty * np.trace(gram) / n * np.eye(n))
    c: Floats = products @ inverse
    if leave_one_out:
        # The least of those with c_i = 0: a multiple of the inverse's column i takes it there.
        c = c - (np.diag(c) / np.diag(inverse))[:, None] * inverse
        np.fill_diagonal(c, 0.0)
    return c


def simplex(gram: Floats, products: Floats, *, leave_one_out: bool = False) -> Floats:
    """The c with the least cᵀGc − 2 cᵀg of those with c_i ≥ 0 and Σ c_i = 1.

    By accelerated projected gradients (Beck and Teboulle 2009), begun anew where they overshoot
    (O'Donoghue and Candès 2015), until the duality gap is below
    `_GAP`, or for `_STEPS` steps.

    Args:
        gram: G, the members' inner products [n, n].
        products: g, those of one dataset [n], or of several [rows, n].
        leave_one_out: As `ridge`.

    Returns:
        float64, of the shape of `products`; each row sums to one.
    """
    g = np.atleast_2d(products)
    open_to = ~np.eye(len(gram), dtype=bool) if leave_one_out else np.ones(g.shape, dtype=bool)
    unit = max(np.trace(gram) / len(gram), np.finfo(np.float64).tiny)
    length = max(float(np.linalg.eigvalsh(gram)[-1]), unit)
    c: Floats = open_to / open_to.sum(axis=1, keepdims=True)
    ahead, momentum = c, 1.0
    for _ in range(_STEPS):
        following = _on_simplex(ahead - (ahead @ gram - g) / length, open_to)
        if np.sum((ahead - following) * (following - c)) > 0.0:
            ahead, momentum = c, 1.0
            continue
        slope = following @ gram - g
        least = np.where(open_to, slope, np.inf).min(axis=1)
        gap = np.sum(following * slope, axis=1) - least
        after = (1.0 + np.sqrt(1.0 + 4.0 * momentum * momentum)) / 2.0
        ahead = following + (momentum - 1.0) / after * (following - c)
        c, momentum = following, after
        if gap.max() <= _GAP * unit:
            break
    return c.reshape(products.shape)


def unit_gram(modules: Sequence[Floats]) -> Floats:
    """The inner products of members that are brought to norm one in each module.

    Args:
        modules: The Gram matrix of each module [n, n] (`gram.gram_of_modules`).

    Returns:
        float64 [n, n], the mean over modules of the cosines; a member of norm zero in a module, as
        one that lacks it, has 0 there.
    """
    total = np.zeros_like(modules[0])
    for gram in modules:
        norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
        inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0.0)
        total += inverse[:, None] * gram * inverse
    cosines: Floats = total / len(modules)
    return cosines


def _falling(values: Floats) -> Floats:
    """The nearest values, in squares, that never rise: neighbours that do share their mean."""
    means: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] < means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            counts[-1] += count
    return np.repeat(means, counts)


def _on_simplex(values: Floats, open_to: Floats) -> Floats:
    """The nearest row of shares, of those that are open, to each row (Duchi et al. 2008)."""
    values = np.where(open_to, values, -np.inf)
    falling = -np.sort(-values, axis=1)
    excess = np.cumsum(np.where(np.isfinite(falling), falling, 0.0), axis=1) - 1.0
    ranks = np.arange(1, values.shape[1] + 1)
    kept = np.sum(falling * ranks > excess, axis=1)
    above = excess[np.arange(len(values)), kept - 1] / kept
    shares: Floats = np.maximum(values - above[:, None], 0.0)
    return shares
