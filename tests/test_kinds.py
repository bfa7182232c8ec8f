"""Convolutions, embeddings, transposed weights and old names: their ΔW against NumPy in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import reference
from conftest import write_safetensors

from lorameta_rs import Bank
from lorameta_rs.member import WEIGHTS
from lorameta_rs.merge import Job, Options, merge
from lorameta_rs.shape import delta_norms

PREFIX = "base_model.model."
COEFFICIENTS = np.array([0.6, -0.4, 0.3])
KERNELS = {"linear": (), "conv1d": (3,), "conv2d": (3, 2), "conv3d": (2, 1, 3), "point": (1, 1)}
NAMES = ["embed", *KERNELS]


def names(module):
    if module == "embed":
        return [f"{PREFIX}embed.lora_embedding_{factor}" for factor in "AB"]
    return [f"{PREFIX}{module}.lora_{factor}.weight" for factor in "AB"]


def delta(tensors, module):
    """ΔW before its scaling, as PEFT's `get_delta_weight` has it."""
    a, b = (tensors[name] for name in names(module))
    if module == "embed":
        return (b @ a).T
    return np.einsum("or,ri...->oi...", b.reshape(b.shape[:2]), a)


def write(folder, ranks, renamed=lambda name: name, **fields):
    """A bank of a member of each rank, and the members' numbers."""
    numbers = []
    for i, rank in enumerate(ranks):
        random = np.random.default_rng(i)
        shapes = dict(zip(names("embed"), [(rank, 11), (7, rank)], strict=True))
        for module, kernel in KERNELS.items():
            ones = (1,) * len(kernel)
            shapes |= zip(names(module), [(rank, 5, *kernel), (9, rank, *ones)], strict=True)
        tensors = {name: random.normal(size=shape) for name, shape in shapes.items()}
        path = folder / "bank" / str(i)
        path.mkdir(parents=True)
        write_safetensors(path / WEIGHTS, {renamed(n): (t, "F32") for n, t in tensors.items()})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": NAMES}
        (path / "adapter_config.json").write_text(json.dumps(config | fields))
        numbers.append({name: reference.stored(t, "F32") for name, t in tensors.items()})
    return Bank(folder / "bank"), numbers


def weighted(numbers, ranks, module):
    terms = zip(COEFFICIENTS, numbers, ranks, strict=True)
    return sum(c * 3 / rank * delta(tensors, module) for c, tensors, rank in terms)


def merged(bank, out, **options):
    done = merge(bank, [Job(COEFFICIENTS, out)], Options(**options))
    return done, reference.read(out / WEIGHTS)[0]


def flat(matrix):
    return matrix.reshape(len(matrix), -1)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "cat"},
        {"method": "svd", "rank": 12},
        {"method": "dare_linear_svd", "rank": 12, "density": 1.0},
    ],
)
def test_sums_of_every_kind(tmp_path, options):
    ranks = [2, 3, 4]
    bank, numbers = write(tmp_path, ranks)
    kinds = {module.name: module.kind for module in bank.members[0].modules}
    assert (kinds["embed"], kinds["linear"]) == ("embedding", "linear")
    assert {kinds[name] for name in KERNELS if name != "linear"} == {"conv"}
    _, tensors = merged(bank, tmp_path / "out", **options)
    assert set(tensors) == set(numbers[0])
    for module in NAMES:
        want = weighted(numbers, ranks, module)
        found = delta(tensors, module)
        assert found.shape == want.shape
        assert np.linalg.norm(found - want) <= 1e-5 * np.linalg.norm(want)
        for name in names(module):
            assert tensors[name].ndim == numbers[0][name].ndim
    (again,) = Bank(tmp_path, exclude="bank").members
    assert [module.kind for module in again.modules] == [kinds[m.name] for m in again.modules]


def test_a_low_rank_of_every_kind_is_the_best(tmp_path):
    ranks = [2, 3, 4]
    bank, numbers = write(tmp_path, ranks)
    done, tensors = merged(bank, tmp_path / "out", method="svd", rank=3)
    for module, energy, kept, _ in done.outcomes[0].kept:
        want = flat(weighted(numbers, ranks, module))
        squares = np.linalg.svd(want, compute_uv=False) ** 2
        assert (energy, kept) == pytest.approx((squares.sum(), squares[:3].sum()), rel=1e-5)
        left = np.linalg.norm(flat(delta(tensors, module)) - want) ** 2
        assert left == pytest.approx(energy - kept, rel=1e-4)


def test_factors_of_every_kind(tmp_path):
    bank, numbers = write(tmp_path, [2, 2, 2])
    _, soup = merged(bank, tmp_path / "soup", method="soup")
    _, linear = merged(bank, tmp_path / "linear", method="linear")
    roots = np.sqrt(np.abs(1.5 * COEFFICIENTS))
    for module in NAMES:
        for name, signs in zip(names(module), (np.sign(COEFFICIENTS), 1.0), strict=True):
            own = np.array([tensors[name] for tensors in numbers])
            want = np.tensordot(COEFFICIENTS, own, 1)
            np.testing.assert_allclose(soup[name], want, atol=1e-6)
            np.testing.assert_allclose(linear[name], np.tensordot(roots * signs, own, 1), atol=1e-6)


def test_norms_of_every_kind(tmp_path):
    ranks = [2, 3, 4]
    bank, numbers = write(tmp_path, ranks)
    for norms, tensors, rank in zip(delta_norms(bank.members), numbers, ranks, strict=True):
        for module in NAMES:
            want = 3 / rank * np.linalg.norm(delta(tensors, module))
            assert norms[module] == pytest.approx(want, rel=1e-6)


def old(name):
    """With the adapter's name, as PEFT had it once, and without the prefix, as made by hand."""
    name = name.removeprefix(PREFIX)
    if name.endswith(".weight"):
        return name.removesuffix("weight") + "default.weight"
    return f"{name}.default"


@pytest.mark.parametrize("method", ["soup", "cat", "svd", "linear"])
def test_old_names_are_the_same_adapters(tmp_path, method):
    bank, _ = write(tmp_path / "new", [2, 2, 2])
    again, _ = write(tmp_path / "old", [2, 2, 2], renamed=old)
    _, tensors = merged(bank, tmp_path / "a", method=method)
    _, found = merged(again, tmp_path / "b", method=method)
    assert set(found) == set(tensors)
    for name, numbers in tensors.items():
        np.testing.assert_array_equal(found[name], numbers)


@pytest.mark.filterwarnings("default")
def test_weights_that_are_stored_transposed(tmp_path):
    ranks = [2, 3, 4]
    bank, numbers = write(tmp_path, ranks, fan_in_fan_out=True)
    _, tensors = merged(bank, tmp_path / "out", method="svd", rank=9)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    # What is added to the base's [in, out] is the transpose of s B A, of each and of the sum.
    scaling = config["lora_alpha"] / config["r"]
    want = weighted(numbers, ranks, "linear").T
    assert np.linalg.norm(scaling * delta(tensors, "linear").T - want) <= 1e-5 * np.linalg.norm(
        want
    )
