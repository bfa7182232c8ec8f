"""The mixture of adapters under which given answers are likeliest, found by few evaluations.

An evaluation tells the log-probability of every token of the answers under a mixture x, Σ x_k ΔW_k.
Their log-odds z(x) change nearly linearly with x, much more so than the loss, the mean of
−ln p = ln(1 + exp(−z)). So the search keeps a linear model of all the z, whose loss is convex: it
goes to the minimum of that within a radius, looks, and mends the model by what it sees (Broyden's
update); where it stalls, it measures the slopes anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs.errors import InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorameta_rs._metrics import Floats

_RIDGE = 1e-3  # keeps the mixture near where it began, where the answers say nothing
_RADIUS = 0.3
_STEP = 0.15  # for slopes that are measured anew


@dataclass(frozen=True, eq=False)
class Mixture:
    """What a search found."""

    weights: Floats
    """One number for each candidate: any, also negative."""
    loss: float
    """The mean of −ln p over the tokens of the answers, in nats."""
    single: int
    """The candidate that is best alone, where the search began."""
    evaluations: int


def search(
    log_probabilities: Callable[[Floats], Floats],
    candidates: int,
    budget: int = 70,
    alternatives: int = 1,
) -> Mixture:
    """The mixture of candidates that makes the answers likeliest, within a budget.

    Args:
        log_probabilities: Of weights [candidates] the log-probability of each token [tokens].
        candidates: How many adapters there are to be mixed.
        budget: Evaluations at most; the first `candidates` + 1 look at each alone, and at none.
        alternatives: How many of the first candidates are much the same: of these only the first
            and the best alone are mixed with the others.

    Returns:
        The best mixture that was looked at.

    Raises:
        InvalidSetting: The budget is too small to look at each candidate.
    """
    if budget < candidates + 1:
        raise InvalidSetting(
            f"budget {budget}: {candidates} candidates need {candidates + 1} evaluations at least"
        )
    return _Search(log_probabilities, candidates, budget, alternatives).run()


class _Search:
    def __init__(
        self,
        log_probabilities: Callable[[Floats], Floats],
        candidates: int,
        budget: int,
        alternatives: int,
    ) -> None:
        self.look = log_probabilities
        self.budget = budget
        self.used = 0
        units = np.eye(candidates)
        nothing = self.odds(np.zeros(candidates))
        each = np.array([self.odds(unit) for unit in units])
        losses = [_loss(odds) for odds in each]
        self.single = int(np.argmin(losses))
        best = int(np.argmin(losses[:alternatives]))
        self.mixed = sorted({0, best, *range(alternatives, candidates)})
        self.slopes = np.zeros_like(each)  # without one nothing is gained, and no step taken
        self.slopes[self.mixed] = each[self.mixed] - nothing
        self.start = units[self.single]
        self.weights, self.z = self.start, each[self.single]
        self.loss = _loss(self.z)

    def odds(self, weights: Floats) -> Floats:
        """The log-odds of each token."""
        self.used += 1
        logs = np.minimum(np.asarray(self.look(weights), np.float64), -1e-6)
        odds: Floats = logs - np.log(-np.expm1(logs))
        return odds

    def run(self) -> Mixture:
        """Until the budget is used, or nothing gets better."""
        radius, before = _RADIUS, np.inf
        while self.used < self.budget:
            step = self.step(radius)
            if np.linalg.norm(step) < 5e-3 or radius < 0.02:
                room = self.budget - self.used >= len(self.mixed) + 2
                if not room or before - self.loss < 1e-3 * self.loss:
                    break
                before = self.loss
                self.measure()
                radius = _RADIUS / 2
                continue
            z = self.odds(self.weights + step)
            expected = self.loss - _loss(self.z + step @ self.slopes)
            miss = z - self.z - step @ self.slopes
            self.slopes = self.slopes + np.outer(step, miss) / (step @ step)
            gained = self.loss - _loss(z)
            if gained > 0.0:
                radius = min(1.6 * radius, 1.0) if gained > expected / 2 else radius
                self.move(self.weights + step, z)
            else:
                radius *= 0.4
        return Mixture(self.weights, self.loss, self.single, self.used)

    def move(self, weights: Floats, z: Floats) -> None:
        """Go on from there."""
        self.weights, self.z, self.loss = weights, z, _loss(z)

    def measure(self) -> None:
        """Take the slopes anew, and go to the best of the places that were looked at for it."""
        seen = []
        slopes = self.slopes.copy()
        for k in self.mixed:
            weights = self.weights.copy()
            weights[k] += _STEP
            z = self.odds(weights)
            slopes[k] = (z - self.z) / _STEP
            seen.append((weights, z))
        self.slopes = slopes
        best = min(seen, key=lambda place: _loss(place[1]))
        if _loss(best[1]) < self.loss:
            self.move(*best)

    def step(self, radius: float) -> Floats:
        """To the minimum of the linear model's loss within a radius: damped until it is inside."""
        damping = 1e-6
        step = self.newton(damping)
        while np.linalg.norm(step) > radius and damping < 1e3:
            damping *= 3.0
            step = self.newton(damping)
        return step

    def newton(self, damping: float) -> Floats:
        """The minimum of the model's loss plus damping · |step|², by Newton's method."""
        count, tokens = self.slopes.shape
        step = np.zeros(count)
        for _ in range(12):
            wrong = 1.0 / (1.0 + np.exp(np.clip(self.z + step @ self.slopes, -50.0, 50.0)))
            gradient = 2 * _RIDGE * (self.weights + step - self.start) + 2 * damping * step
            gradient -= self.slopes @ wrong / tokens
            curvature = (self.slopes * (wrong * (1.0 - wrong))) @ self.slopes.T / tokens
            curvature += (2 * _RIDGE + 2 * damping + 1e-9) * np.eye(count)
            change = np.linalg.solve(curvature, gradient)
            length = float(np.linalg.norm(change))
            step = step - change * min(1.0, 0.5 / length if length > 0.0 else 1.0)
            if length < 1e-5:
                break
        return step


def _loss(odds: Floats) -> float:
    return float(np.logaddexp(0.0, -odds).mean())
