"""Sums of ΔW: every method against NumPy in float64, on folders that the library wrote."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import reference
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from lorameta_rs import Bank
from lorameta_rs.errors import InvalidSetting, LayoutMismatch
from lorameta_rs.member import WEIGHTS
from lorameta_rs.merge import Job, Options, merge, plan

Q = "model.layers.0.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"
PREFIX = "base_model.model."

# Ranks, alphas, patterns, rsLoRA, types and modules as members of real banks have them.
REAL = {
    "plain": {"rank": 4},
    "strong": {"rank": 2, "config": {"lora_alpha": 16}, "dtypes": "BF16"},
    "rslora": {"rank": 3, "config": {"use_rslora": True, "lora_alpha": 5}, "dtypes": "F16"},
    "alphas": {"rank": 2, "config": {"alpha_pattern": {"layers.1.self_attn.v_proj": 7}}},
    "narrow": {"rank": 5, "modules": {Q: (24, 24)}},
}


@pytest.fixture(scope="module")
def real(make_bank):
    return make_bank(REAL)


@pytest.fixture(scope="module")
def frozen(make_bank):
    """A bank of members that share their A."""
    written = make_bank()
    for name in "abc":
        shared = {n: t for n, t in written.numbers["a"].items() if "lora_A" in n}
        written.edit(name, lambda tensors, shared=shared: tensors.update(shared))
    return written


def scaling(bank, name, module):
    member = bank.members[bank.names.index(name)]
    return member.scalings[[one.name for one in member.modules].index(module)]


def delta(tensors, module, scale=1.0):
    """s B A of one folder's tensors; None where it has no such module."""
    name = f"{PREFIX}{module}.lora_"
    if f"{name}A.weight" not in tensors:
        return None
    a, b = (np.asarray(tensors[f"{name}{factor}.weight"], np.float64) for factor in "AB")
    return scale * b @ a


def exact(written, bank, coefficient, module):
    """Σ c s B A in float64; `coefficient` of a name and a module."""
    parts = [
        coefficient(name, module) * found
        for name in bank.names
        if (
            found := delta(
                written.numbers[name],
                module,
                scaling(bank, name, module)
                if any(m.name == module for m in bank.members[bank.names.index(name)].modules)
                else 0.0,
            )
        )
        is not None
    ]
    return sum(parts)


def modules(bank):
    return sorted({module.name for member in bank.members for module in member.modules})


def result(folder):
    """A folder's tensors, and what its configuration says of its scaling."""
    tensors, _ = reference.read(folder / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == (
        {},
        {},
        False,
    )
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {config["r"]}
    return tensors, config["lora_alpha"] / config["r"]


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


COEFFICIENTS = dict(zip(REAL, (0.5, -0.25, 0.3, 1.5, 0.2), strict=True))


def job(bank, out, weights=COEFFICIENTS):
    return Job(np.array([weights.get(name, 0.0) for name in bank.names]), out)


def test_cat_is_the_exact_sum(real, tmp_path):
    bank = Bank(real.folder)
    merge(bank, [job(bank, tmp_path / "out")], Options(method="cat"))
    tensors, scale = result(tmp_path / "out")
    for module in modules(bank):
        want = exact(real, bank, lambda name, _: COEFFICIENTS[name], module)
        np.testing.assert_allclose(delta(tensors, module, scale), want, atol=2e-6 * abs(want).max())


@pytest.mark.parametrize("rank", [1, 4, 9, 100])
def test_svd_is_the_best_approximation_and_says_what_it_keeps(real, tmp_path, rank):
    bank = Bank(real.folder)
    done = merge(bank, [job(bank, tmp_path / "out")], Options(method="svd", rank=rank))
    tensors, scale = result(tmp_path / "out")
    (outcome,) = done.outcomes
    assert outcome.rank == min(rank, 16)  # the ranks of the first module's members add up to 16
    for (module, energy, kept, is_exact), name in zip(outcome.kept, modules(bank), strict=True):
        want = exact(real, bank, lambda name, _: COEFFICIENTS[name], module)
        assert (module, is_exact) == (name, True)
        found = delta(tensors, module, scale)
        np.testing.assert_allclose(found, best(want, rank), atol=5e-6 * abs(want).max())
        square = np.linalg.norm(want) ** 2
        assert energy == pytest.approx(square, rel=1e-6)
        left = np.linalg.norm(want - found) ** 2
        assert energy - kept == pytest.approx(left, abs=1e-6 * square)


def test_energy_chooses_one_rank(real, tmp_path):
    bank = Bank(real.folder)
    done = merge(bank, [job(bank, tmp_path / "out")], Options(method="svd", energy=0.8))

    def needed(module):
        s = np.linalg.svd(exact(real, bank, lambda name, _: COEFFICIENTS[name], module))[1]
        return int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), 0.8)) + 1

    assert done.outcomes[0].rank == max(map(needed, modules(bank)))


@settings(max_examples=15)
@given(st.lists(st.floats(-3, 3).map(lambda x: round(x, 3)), min_size=5, max_size=5).filter(any))
def test_a_full_rank_is_cat_whatever_the_coefficients(real, tmp_path_factory, row):
    bank = Bank(real.folder)
    folder = tmp_path_factory.mktemp("full")
    found = []
    for method in (Options(method="cat"), Options(method="svd", rank=24)):
        merge(bank, [Job(np.array(row), folder / method.method)], method)
        found.append(result(folder / method.method))
    (cat, _), (svd, _) = found
    for module in {name.removeprefix(PREFIX).partition(".lora_")[0] for name in cat}:
        want = delta(cat, module)
        np.testing.assert_allclose(
            delta(svd, module), want, rtol=0, atol=1e-5 * max(abs(want).max(), 1e-30)
        )


@pytest.mark.parametrize("method", ["cat", "soup", "ties"])
def test_several_targets_are_made_in_one_reading(real, frozen, tmp_path, method):
    """And each is the same as alone, whichever members it takes."""
    written = real if method == "cat" else frozen
    bank, told = Bank(written.folder), []
    options = Options(method=method, density=0.5 if method == "ties" else None, threads=1)
    rows = np.eye(len(bank)) + np.roll(0.5 * np.eye(len(bank)), 1, axis=1)
    jobs = [Job(row, tmp_path / f"{i}") for i, row in enumerate(rows)]
    done = merge(bank, jobs, options, lambda so_far, _: told.append(so_far))
    files = [safetensors.deserialize(one.adapter.path.read_bytes()) for one in bank.members]
    size = sum(len(tensor["data"]) for file in files for _, tensor in file)
    assert told[-1] == done.plan.bytes == size
    for i, one in enumerate(jobs):
        alone = dataclasses.replace(one, out=tmp_path / f"{i} alone")
        merge(bank, [alone], options)
        assert (one.out / WEIGHTS).read_bytes() == (alone.out / WEIGHTS).read_bytes()


def test_a_rank_does_not_depend_on_other_targets(real, tmp_path):
    bank = Bank(real.folder)
    jobs = [
        Job(row, tmp_path / name) for name, row in zip(bank.names, np.eye(len(bank)), strict=True)
    ]
    merge(bank, jobs, Options(method="svd"))
    for name, one in zip(bank.names, jobs, strict=True):
        tensors, scale = result(one.out)
        assert json.loads((one.out / "adapter_config.json").read_text())["r"] == REAL[name]["rank"]
        for module in modules(bank):
            if (want := delta(real.numbers[name], module)) is not None:
                want = scaling(bank, name, module) * want
                found = delta(tensors, module, scale)
                np.testing.assert_allclose(found, want, atol=2e-6 * abs(want).max())


@settings(max_examples=15)
@given(st.permutations(sorted(REAL)), st.sampled_from(["cat", "svd"]))
def test_the_order_of_members_does_not_matter(real, tmp_path_factory, order, method):
    folder = tmp_path_factory.mktemp("order")
    for place, name in enumerate(order):  # members are taken by name
        shutil.copytree(real.folder / name, folder / "bank" / f"{place}")
    bank, again = Bank(real.folder), Bank(folder / "bank")
    weights = {f"{place}": COEFFICIENTS[name] for place, name in enumerate(order)}
    options = Options(method=method, rank=3 if method == "svd" else None)
    merge(bank, [job(bank, folder / "one")], options)
    merge(again, [job(again, folder / "other", weights)], options)
    (one, scale), (other, _) = result(folder / "one"), result(folder / "other")
    for module in modules(bank):
        want = delta(one, module, scale)
        np.testing.assert_allclose(delta(other, module, scale), want, atol=1e-5 * abs(want).max())


@settings(max_examples=15)
@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_a_soup_of_a_shared_a_is_the_exact_sum(frozen, tmp_path_factory, row):
    bank, folder = Bank(frozen.folder), tmp_path_factory.mktemp("frozen")
    coefficients = np.array(row) / sum(row)
    for method in ("soup", "cat"):
        merge(bank, [Job(coefficients, folder / method)], Options(method=method))
    (soup, scale), (cat, _) = result(folder / "soup"), result(folder / "cat")
    for module in modules(bank):
        want = delta(cat, module)
        np.testing.assert_allclose(delta(soup, module, scale), want, atol=1e-5 * abs(want).max())


def test_targets_of_one_pass_are_those_made_alone(real, tmp_path):
    bank = Bank(real.folder)
    other = {"plain": 1.0, "narrow": -2.0}
    for method in ("svd", "cat"):
        options = Options(method=method)
        outs = [tmp_path / f"{method}{i}" for i in range(3)]
        merge(bank, [job(bank, outs[0]), job(bank, outs[1], other)], options)
        merge(bank, [job(bank, outs[2], other)], options)
        together, alone = (result(out)[0] for out in outs[1:])
        for module in ("model.layers.0.self_attn.v_proj", Q):
            want = delta(alone, module)
            np.testing.assert_allclose(delta(together, module), want, atol=1e-6 * abs(want).max())


# Which method.


def test_auto_sums_factors_of_members_that_share_a_frozen_a(frozen, tmp_path):
    bank = Bank(frozen.folder)
    shared = [Job(np.array([0.2, 0.3, 0.5]), tmp_path / "out")]
    done = merge(bank, shared)
    assert (done.method, done.outcomes[0].rank) == ("soup", None)
    assert done.soup_error < 1e-6
    # Coefficients of another sum scale A and B, and so ΔW twice.
    done = plan(bank, [Job(np.array([0.2, 0.3, 0.6]), tmp_path / "out")])
    assert (done.method, done.soup_error) == ("svd", pytest.approx(0.1, rel=1e-4))


def test_auto_says_how_wrong_a_soup_would_be(make_bank, tmp_path):
    written = make_bank("ab")
    bank = Bank(written.folder)
    done = merge(bank, [Job(np.array([0.5, 0.5]), tmp_path / "out")])
    difference = whole = 0.0
    for module in modules(bank):
        want = exact(written, bank, lambda *_: 0.5, module)
        a, b = (
            sum(
                0.5 * written.numbers[name][f"{PREFIX}{module}.lora_{factor}.weight"]
                for name in "ab"
            )
            for factor in "AB"
        )
        difference += np.linalg.norm(2 * b @ a - want) ** 2
        whole += np.linalg.norm(want) ** 2
    assert done.method == "svd"
    assert done.soup_error == pytest.approx(math.sqrt(difference / whole), rel=1e-4)


def test_auto_takes_one_member_as_it_is(real, tmp_path):
    bank = Bank(real.folder)
    done = merge(bank, [job(bank, tmp_path / "out", {"plain": 1.0})])
    assert done.method == "soup"
    tensors, scale = result(tmp_path / "out")
    assert scale == 2.0
    np.testing.assert_array_equal(
        tensors[f"{PREFIX}{Q}.lora_A.weight"], real.numbers["plain"][f"{PREFIX}{Q}.lora_A.weight"]
    )


def test_auto_leaves_a_soup_out_where_ranks_differ(real, tmp_path):
    bank = Bank(real.folder)
    assert plan(bank, [job(bank, tmp_path / "out")]).method == "svd"
    with pytest.raises(LayoutMismatch, match="--method svd"):
        plan(bank, [job(bank, tmp_path / "out")], Options(method="soup"))


def test_auto_says_why(real, frozen, tmp_path, lorameta):
    def said(bank, weights, *more):
        given = [word for pair in weights for word in ("--weights", pair)]
        status, _, err = lorameta("merge", bank, *given, "-o", tmp_path / "out", "--dry-run", *more)
        assert status == 0, err
        return [line for line in err.splitlines() if line.startswith("method ")]

    two = ("a=0.5", "b=0.5")
    (line,) = said(frozen.folder, two, "--normalize", "unit")
    assert line.startswith("method svd: each member's ΔW is brought to one norm")
    (line,) = said(frozen.folder, two)
    assert line.startswith("method soup: summing A and B apart would change ΔW by ")
    (line,) = said(frozen.folder, ("a=2", "b=2"))
    assert line == ("method svd: summing A and B apart would change ΔW by 300 %, and 1 % is let by")
    assert said(frozen.folder, two, "--rank", "2") == ["method svd: --rank was given"]
    assert said(frozen.folder, two, "--energy", "0.5") == ["method svd: --energy was given"]
    (line,) = said(real.folder, ("plain=1", "strong=1"))
    assert line.startswith("method svd: the ranks differ")
    assert said(frozen.folder, two, "--method", "svd") == []


# Norms, and coefficients of modules.


def test_unit_norms_leave_the_weighted_mean_of_the_norms(real, tmp_path):
    bank = Bank(real.folder)
    merge(bank, [job(bank, tmp_path / "out")], Options(method="cat", normalize="unit"))
    tensors, scale = result(tmp_path / "out")
    for module in modules(bank):
        norms = {
            name: np.linalg.norm(found)
            for name in bank.names
            if (found := delta(real.numbers[name], module)) is not None
        }
        norms = {n: abs(scaling(bank, n, module)) * norm for n, norm in norms.items()}
        total = sum(abs(COEFFICIENTS[n]) for n in norms)
        mean = sum(abs(COEFFICIENTS[n]) * norm for n, norm in norms.items()) / total
        want = exact(
            real,
            bank,
            lambda n, _, norms=norms, mean=mean: COEFFICIENTS[n] / norms[n] * mean,
            module,
        )
        np.testing.assert_allclose(delta(tensors, module, scale), want, atol=5e-6 * abs(want).max())


def test_a_member_of_zeros_stays_zero_under_unit_norms(make_bank, tmp_path):
    written = make_bank("ab")
    for name in list(written.numbers["b"]):
        if "lora_B" in name:
            written.edit("b", lambda tensors, name=name: tensors[name].fill(0.0))
    bank = Bank(written.folder)
    merge(bank, [Job(np.array([0.5, 0.5]), tmp_path / "out")], Options(normalize="unit"))
    tensors, scale = result(tmp_path / "out")
    want = 0.5 * delta(written.numbers["a"], Q, 2.0)
    np.testing.assert_allclose(delta(tensors, Q, scale), want, atol=1e-5)


@pytest.mark.parametrize("method", ["auto", "svd", "cat", "linear"])
def test_nothing_but_zeros_stays_zero_under_unit_norms(make_bank, tmp_path, method):
    written = make_bank("ab")
    written.edit(
        "b", lambda tensors: [t.fill(0) for name, t in tensors.items() if "lora_B" in name]
    )
    bank = Bank(written.folder)
    options = Options(method=method, normalize="unit")
    merge(bank, [Job(np.array([0.0, 0.5]), tmp_path / "out")], options)
    tensors, scale = result(tmp_path / "out")
    for module in modules(bank):
        assert not delta(tensors, module, scale).any()


def test_coefficients_of_modules_and_of_layers(real, tmp_path):
    bank = Bank(real.folder)
    patterns = ("0", ".*v_proj")
    matrix = np.arange(10.0).reshape(5, 2) / 7 - 0.5
    merge(bank, [Job(matrix, tmp_path / "out", modules=patterns)], Options(method="cat"))
    tensors, scale = result(tmp_path / "out")

    def coefficient(name, module):
        row = matrix[bank.names.index(name)]
        return row[0] if ".layers.0." in module else row[1] if "v_proj" in module else 0.0

    for module in modules(bank):
        want = exact(real, bank, coefficient, module)
        np.testing.assert_allclose(
            delta(tensors, module, scale), want, atol=5e-6 * max(abs(want).max(), 1e-9)
        )


def test_a_matrix_of_weights_on_the_command_line_can_be_repeated(real, tmp_path, lorameta):
    file = tmp_path / "weights.json"
    file.write_text('{"modules": ["0", ".*"], "weights": {"plain": [1, 0.5], "narrow": 0.25}}')
    out = tmp_path / "out"
    status, _, err = lorameta("merge", real.folder, "--weights", file, "-o", out)
    assert (status, "rank 9" in err) == (0, True)
    again = tmp_path / "again"
    status, _, _ = lorameta("merge", "--repeat", out / "lorameta.json", "-o", again)
    assert status == 0
    for name in (WEIGHTS, "lorameta.json", "README.md", "adapter_config.json"):
        first, second = ((folder / name).read_bytes() for folder in (out, again))
        assert first == second.replace(b"# again", b"# out").replace(b"again/", b"out/") or (
            name == "README.md"
        )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"modules": ["0"], "weights": {"plain": [1, 2]}}', "2 weights for 1 modules"),
        ('{"modules": ["0"], "weights": {"plain": "x"}}', "is not a number"),
        ('{"modules": ["("], "weights": {"plain": 1}}', "is not a regular expression"),
        ('{"modules": ["9"], "weights": {"plain": 1}}', "no module of the bank matches `9`"),
    ],
)
def test_matrices_that_cannot_be(real, tmp_path, lorameta, text, said):
    file = tmp_path / "weights.json"
    file.write_text(text)
    status, _, err = lorameta("merge", real.folder, "--weights", file, "-o", tmp_path / "out")
    assert (status, said in err) == (1, True), err


def test_what_a_rank_keeps_is_said(real, tmp_path, lorameta):
    out = tmp_path / "out"
    weights = [
        word for name in ("plain", "strong", "rslora") for word in ("--weights", f"{name}=1")
    ]
    status, _, err = lorameta("merge", real.folder, *weights, "-o", out, "--rank", 3)
    assert status == 0
    assert "rank 3, which keeps " in err
    assert " % of ‖ΔW‖² (least: " in err
    status, text, _ = lorameta(
        "merge", real.folder, *weights, "-o", out, "--energy", 0.99, "--force", "--json"
    )
    found = json.loads(text)
    assert (status, found["method"], found["soup_error"]) == (0, "svd", None)
    assert all(one["kept"] >= 0.99 * one["energy"] for one in found["jobs"][0]["kept"])


def test_more_than_servers_load_is_warned_about(make_bank, tmp_path, lorameta):
    written = make_bank({"a": {"rank": 12}, "b": {"rank": 12}})
    weights = ("--weights", "a=1", "--weights", "b=1")
    status, _, err = lorameta(
        "merge", written.folder, *weights, "-o", tmp_path / "out", "--method", "cat"
    )
    assert status == 0
    assert "vLLM refuses rank 24 unless it is started with --max-lora-rank 32" in err


def test_a_matrix_of_another_size_is_refused(real, tmp_path):
    bank = Bank(real.folder)
    with pytest.raises(InvalidSetting, match=r"expected \(5, 1\)"):
        plan(bank, [Job(np.ones((5, 2)), tmp_path / "out", modules=("0",))])
