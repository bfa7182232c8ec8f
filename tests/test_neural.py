"""The learned pipeline: gradients against finite differences, training against the authors' run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorameta_rs import coefficients, neural
from lorameta_rs.errors import InvalidBank, InvalidSetting

PAPER = Path(__file__).parent / "golden" / "paper"
METRICS = ["WD", "KL", "JS", "MMD"]


@pytest.fixture(scope="module")
def manifest():
    return json.loads((PAPER / "manifest.json").read_text())["mlp"]


@pytest.fixture(scope="module")
def distances():
    return load_file(PAPER / "distances.safetensors")


@pytest.fixture(scope="module")
def adapters():
    flat = load_file(PAPER / "all_adapters_matrix.safetensors")["all_adapters"]
    return flat.astype(np.float64)


def recorded(which):
    stored = load_file(PAPER / "mlp16_weights.safetensors")
    return {name: stored[f"{which}/{name}"] for name in neural.NAMES}


@pytest.fixture(scope="module")
def trained(manifest, distances, adapters):
    """By metric, from the recorded initial weights."""
    return {
        metric: neural.train(
            distances[metric].astype(np.float64),
            adapters @ adapters.T,
            adapters.shape[1],
            recorded("init"),
            manifest["epochs"],
            neural.paper_members(12),
        )
        for metric in METRICS
    }


def test_the_authors_members(manifest):
    assert neural.paper_members(12) == manifest["train_indexes"]


@pytest.mark.parametrize("metric", METRICS)
def test_losses_and_coefficients_are_the_authors(metric, trained, manifest, distances):
    found = trained[metric]
    np.testing.assert_allclose(found.losses, manifest["loss_per_epoch"][metric], rtol=1e-4)
    want = load_file(PAPER / "coefficients.safetensors")[f"{metric}/mlp_version"]
    c = neural.leave_one_out(found.weights, distances[metric].astype(np.float64))
    np.testing.assert_allclose(c, want, atol=1e-4)
    # A dataset that is not in the bank: its own row, without itself, but for the sampled MMD.
    if metric != "MMD":
        row = np.delete(distances[metric][3].astype(np.float64), 3)
        new = neural.coefficients(found.weights, row)
        np.testing.assert_allclose(new, np.delete(want[3], 3), atol=1e-4)


def test_weights_are_the_authors_at_the_end(trained):
    """A bias before a norm has no slope but what rounding gives, and Adam walks along that."""
    stored = load_file(PAPER / "mlp16_weights.safetensors")
    for metric, found in trained.items():
        for name in set(neural.NAMES) - {"mlp.0.bias", "mlp.3.bias", "mlp.6.bias"}:
            want = stored[f"final/{metric}/{name}"]
            np.testing.assert_allclose(found.weights[name], want, atol=2e-3, err_msg=name)


def problem(n, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 40))
    distances = rng.uniform(0.1, 1.0, (n, n))
    np.fill_diagonal(distances, 0.0)
    return distances, x @ x.T, x


@pytest.mark.parametrize("seed", range(5))
def test_gradients_against_finite_differences(seed):
    distances, gram, x = problem(6, seed)
    weights = neural.initial_weights(5, seed)
    rng = np.random.default_rng(seed)
    for name in weights:  # so that no norm is trivial
        weights[name] += rng.normal(scale=0.1, size=weights[name].shape)
    z = neural.standardised(distances)[~np.eye(6, dtype=bool)]
    loss, slopes = neural.loss_and_gradients(weights, z, gram)
    c = neural.leave_one_out(weights, distances)
    assert loss == pytest.approx(np.sum((c @ x - x) ** 2), rel=1e-12)
    assert set(slopes) == set(neural.NAMES)
    step = 1e-6
    for name, tensor in weights.items():
        assert slopes[name].shape == tensor.shape
        for place in np.ndindex(tensor.shape):
            sides = []
            for sign in (1, -1):
                moved = {**weights, name: tensor.copy()}
                moved[name][place] += sign * step
                sides.append(neural.loss_and_gradients(moved, z, gram)[0])
            want = (sides[0] - sides[1]) / (2 * step)
            assert slopes[name][place] == pytest.approx(want, rel=1e-5, abs=1e-6), (name, place)


def test_it_learns_that_near_members_are_alike():
    """Members in pairs: only the nearest is worth anything, which softmin of z does not say."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(6, 50)), 2, axis=0) + 0.05 * rng.normal(size=(12, 50))
    same = np.arange(12) // 2 == np.arange(12)[:, None] // 2
    distances = np.where(same, 0.2, rng.uniform(0.5, 0.6, (12, 12)))
    np.fill_diagonal(distances, 0.0)
    done = neural.train(distances, x @ x.T, 50, neural.initial_weights(32), 300)
    assert done.losses[-1] < 0.1 * done.losses[0]
    row = np.full(12, 0.55)
    row[4] = 0.2
    c = neural.coefficients(done.weights, row)
    assert c[4] > 0.9 > coefficients.normalized(row)[4]
    assert c.sum() == pytest.approx(1.0)


def test_it_starts_as_pytorch_does():
    weights = neural.initial_weights(400, dtype=np.float32)
    assert all(tensor.dtype == np.float32 for tensor in weights.values())
    assert np.abs(weights["mlp.0.weight"]).max() <= 1
    for name in ("mlp.3.weight", "mlp.3.bias", "mlp.6.weight"):
        assert 0.9 / 20 < np.abs(weights[name]).max() <= 1 / 20
    again = neural.initial_weights(400, dtype=np.float32)
    assert all(np.array_equal(weights[name], again[name]) for name in weights)


def test_what_cannot_be_is_refused():
    distances, gram, _ = problem(4, 0)
    weights = neural.initial_weights(3)
    with pytest.raises(InvalidSetting, match="width 0: expected 1 or more"):
        neural.initial_weights(0)
    with pytest.raises(InvalidSetting, match="epochs -1"):
        neural.train(distances, gram, 40, weights, -1)
    with pytest.raises(InvalidBank, match=r"inner products of shape \(3, 3\)"):
        neural.train(distances, gram[:3, :3], 40, weights)
    with pytest.raises(InvalidBank, match="1 members to learn from"):
        neural.train(distances, gram, 40, weights, members=[2])
    with pytest.raises(InvalidBank, match="the bank has no members"):
        neural.coefficients(weights, np.array([]))
    with pytest.raises(InvalidBank, match="not all finite"):
        neural.coefficients(weights, np.array([1.0, np.nan]))
