"""LoRA of experts' parameters: every method against NumPy in float64, and the written adapter."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import reference

from lorameta_rs import Bank
from lorameta_rs.errors import LayoutMismatch
from lorameta_rs.gram import gram_matrix
from lorameta_rs.member import WEIGHTS
from lorameta_rs.merge import Job, Options, merge
from lorameta_rs.shape import delta_norms

PREFIX = "base_model.model."
EXPERTS = 3
PARAMETERS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
MODULES = {
    f"model.layers.{layer}.mlp.experts{base}": shape
    for layer in (0, 1)
    for base, shape in (("", (10, 14)), (".base_layer", (14, 12)))
}
PLAIN = "model.layers.0.self_attn.q_proj"
COEFFICIENTS = np.array([0.6, -0.4, 0.3])


def write(make_bank, ranks, plain=None):
    """A bank of members of these ranks, which also change a plain module by rank `plain`."""
    members = {
        name: {
            "rank": EXPERTS * rank,
            "config": {
                "r": rank,
                "target_modules": ["q_proj"] if plain else [],
                "target_parameters": PARAMETERS,
                "rank_pattern": {"q_proj": plain} if plain else {},
            },
        }
        for name, rank in zip("abc", ranks, strict=True)
    }
    written = make_bank(members, modules=MODULES)
    if plain:
        random = np.random.default_rng(5)
        for name in members:
            stem = f"{PREFIX}{PLAIN}.lora_"
            a, b = random.normal(size=(plain, 8)), random.normal(size=(9, plain))
            written.edit(name, lambda t, a=a, b=b, s=stem: t.update({f"{s}A.weight": a}))
            written.edit(name, lambda t, a=a, b=b, s=stem: t.update({f"{s}B.weight": b}))
            written.numbers[name] = reference.read(written.weights(name))[0]
    return written


def factors(tensors, module):
    """A and B as PEFT's ParamWrapper takes them apart: of each expert."""
    a, b = (tensors[f"{PREFIX}{module}.lora_{factor}.weight"] for factor in "AB")
    return a.reshape(EXPERTS, -1, a.shape[1]), b.reshape(b.shape[0], -1, EXPERTS)


def product(tensors, module):
    a, b = factors(tensors, module)
    return np.einsum("ore,eri->eoi", b, a)


def deltas(bank, written, module):
    """Each member's ΔW of each expert."""
    found = []
    for member in bank.members:
        scaling = member.scalings[[one.name for one in member.modules].index(module)]
        found.append(scaling * product(written.numbers[member.name], module))
    return found


def weighted(bank, written, module):
    pairs = zip(COEFFICIENTS, deltas(bank, written, module), strict=True)
    return sum(c * delta for c, delta in pairs)


def merged(bank, out, **options):
    done = merge(bank, [Job(COEFFICIENTS, out)], Options(**options))
    return done, reference.read(out / WEIGHTS)[0]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        ([2, 3, 4], {"method": "cat"}),
        ([2, 3, 4], {"method": "svd", "rank": 9}),
        ([130, 130, 130], {"method": "svd", "rank": 12}),  # which are sketched
    ],
)
def test_sums_are_those_of_each_expert(make_bank, tmp_path, ranks, options):
    written = write(make_bank, ranks)
    bank = Bank(written.folder)
    assert {module.experts for member in bank.members for module in member.modules} == {EXPERTS}
    _, tensors = merged(bank, tmp_path / "out", **options)
    for module in MODULES:
        want = weighted(bank, written, module)
        error = np.linalg.norm(product(tensors, module) - want)
        assert error <= 1e-5 * np.linalg.norm(want)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    rank = options.get("rank", 9)
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert (config["target_modules"], config["target_parameters"]) == ([], PARAMETERS)
    again = Bank(tmp_path)
    assert [module.rank for module in again.members[0].modules] == [rank] * 4


@pytest.mark.parametrize("members", [["a", "b", "c"], ["a"] * 3])
def test_a_low_rank_is_the_best_for_each_expert(make_bank, tmp_path, members):
    written = write(make_bank, [2, 3, 4])
    bank = Bank(written.folder)
    done, tensors = merged(bank, tmp_path / "out", method="svd", rank=3)
    for module, energy, kept, exact in done.outcomes[0].kept:
        want = weighted(bank, written, module)
        values = np.linalg.svd(want, compute_uv=False)
        assert exact
        assert energy == pytest.approx(np.sum(values**2), rel=1e-6)
        assert kept == pytest.approx(np.sum(values[:, :3] ** 2), rel=1e-6)
        left = np.linalg.norm(product(tensors, module) - want) ** 2
        assert left == pytest.approx(energy - kept, rel=1e-4)


def test_factors_are_summed_number_by_number_and_padded_for_each_expert(make_bank, tmp_path):
    written = write(make_bank, [2, 2, 2], plain=5)
    bank = Bank(written.folder)
    _, tensors = merged(bank, tmp_path / "out", method="linear")
    for module in MODULES:
        a, b = factors(tensors, module)
        assert (a.shape[1], b.shape[1]) == (5, 5)
        want_a = want_b = 0.0
        for c, member in zip(COEFFICIENTS, bank.members, strict=True):
            scaling = member.scalings[[one.name for one in member.modules].index(module)]
            root = math.sqrt(abs(c * scaling))
            own_a, own_b = factors(written.numbers[member.name], module)
            want_a, want_b = want_a + math.copysign(root, c) * own_a, want_b + root * own_b
        np.testing.assert_allclose(a[:, :2], want_a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(b[:, :2], want_b, rtol=1e-5, atol=1e-6)
        assert not a[:, 2:].any()
        assert not b[:, 2:].any()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["r"]) == (["q_proj"], 5)


@pytest.mark.parametrize("method", ["soup", "ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_factors_are_those_of_a_plain_module_of_as_many_rows(make_bank, tmp_path, method):
    written = write(make_bank, [2, 2, 2])
    density = None if method == "soup" else 0.4
    _, tensors = merged(Bank(written.folder), tmp_path / "out", method=method, density=density)
    for name in "abc":
        path = written.folder / name / "adapter_config.json"
        config = json.loads(path.read_text())
        # The same scaling of the same numbers, as if they were not of experts.
        config |= {"target_parameters": None, "r": 6, "lora_alpha": 3 * config["lora_alpha"]}
        path.write_text(json.dumps(config | {"target_modules": ["experts"]}))
    plain, flat = merged(Bank(written.folder), tmp_path / "flat", method=method, density=density)
    assert plain.method == method
    for name, numbers in flat.items():
        np.testing.assert_array_equal(tensors[name], numbers)


@pytest.mark.parametrize("method", ["svd", "cat", "ties_svd"])
def test_threads_and_other_targets_do_not_matter(make_bank, tmp_path, method):
    bank = Bank(write(make_bank, [2, 3, 4]).folder)
    density = 0.3 if method == "ties_svd" else None
    one, other = COEFFICIENTS, np.array([0.2, 1.0, 0.5])
    outs = [tmp_path / str(i) for i in range(4)]
    for out, threads, row in zip(outs, (1, 3), (one, other), strict=False):
        merge(bank, [Job(row, out)], Options(method=method, density=density, threads=threads))
    jobs = [Job(one, outs[2]), Job(other, outs[3])]
    merge(bank, jobs, Options(method=method, density=density))
    first, second, *both = ((out / WEIGHTS).read_bytes() for out in outs)
    assert [first, second] == both


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune"])
def test_each_experts_delta_is_thinned_out_by_itself(make_bank, tmp_path, rule):
    written = write(make_bank, [2, 3, 4])
    bank = Bank(written.folder)
    options = {"method": f"{rule}_svd", "rank": 12, "density": 0.3}
    _, tensors = merged(bank, tmp_path / "out", **options)
    for module in MODULES:
        own = deltas(bank, written, module)
        found = product(tensors, module)
        for expert in range(EXPERTS):
            pruned = []
            for delta in own:
                one = delta[expert]
                least = np.sort(np.abs(one), axis=None)[-int(0.3 * one.size)]
                pruned.append(np.where(np.abs(one) >= least, one, 0.0))
            pruned = np.array(pruned)
            terms = COEFFICIENTS[:, None, None] * pruned
            want = terms.sum(axis=0)
            if rule == "ties":
                elected = np.where(pruned.sum(axis=0) >= 0, 1.0, -1.0)
                agree = np.sign(pruned) == elected
                want = (terms * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
            values = np.linalg.svd(want, compute_uv=False)
            left = np.linalg.norm(found[expert] - want)
            least = np.linalg.norm(values[12:])
            assert left == pytest.approx(least, abs=1e-5 * np.linalg.norm(want))


def test_norms_inner_products_and_the_error_of_a_soup(make_bank, tmp_path):
    written = write(make_bank, [2, 2, 2])
    bank = Bank(written.folder)
    all_deltas = {module: deltas(bank, written, module) for module in MODULES}
    for i, norms in enumerate(delta_norms(bank.members)):
        for module, own in all_deltas.items():
            assert norms[module] == pytest.approx(np.linalg.norm(own[i]), rel=1e-6)
    rows = np.hstack([np.reshape(own, (3, -1)) for own in all_deltas.values()])
    np.testing.assert_allclose(gram_matrix(bank), rows @ rows.T, rtol=1e-5, atol=1e-4)
    done, tensors = merged(bank, tmp_path / "auto", normalize="none")
    difference = whole = 0.0
    for module in MODULES:
        pairs = zip(COEFFICIENTS, bank.members, strict=True)
        own = [(c, m.scalings[0], *factors(written.numbers[m.name], module)) for c, m in pairs]
        a, b = sum(c * a for c, _, a, _ in own), sum(c * s * b for c, s, _, b in own)
        want = weighted(bank, written, module)
        difference += np.linalg.norm(np.einsum("ore,eri->eoi", b, a) - want) ** 2
        whole += np.linalg.norm(want) ** 2
    assert (done.method, done.soup_error_exact) == ("svd", True)
    assert done.soup_error == pytest.approx(math.sqrt(difference / whole), rel=1e-5)
    assert tensors


def test_unit_norms_are_of_all_experts_together(make_bank, tmp_path):
    written = write(make_bank, [2, 3, 4])
    bank = Bank(written.folder)
    _, tensors = merged(bank, tmp_path / "out", method="svd", rank=9, normalize="unit")
    for module in MODULES:
        own = deltas(bank, written, module)
        norms = [np.linalg.norm(delta) for delta in own]
        mean = np.abs(COEFFICIENTS) @ norms / np.abs(COEFFICIENTS).sum()
        want = sum(c * d / n for c, d, n in zip(COEFFICIENTS, own, norms, strict=True)) * mean
        error = np.linalg.norm(product(tensors, module) - want)
        assert error <= 1e-5 * np.linalg.norm(want)


def test_what_does_not_fit_is_named(make_bank, tmp_path, lorameta):
    def changed(**fields):
        written = write(make_bank, [2, 2, 2])
        path = written.folder / "a" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return written.folder

    bank = Bank(changed(target_parameters=["mlp.experts.down_proj"]))
    with pytest.raises(LayoutMismatch, match=r"`target_parameters` is .*down_proj"):
        merge(bank, [Job(COEFFICIENTS, tmp_path / "out")])
    for fields, said in [
        ({"r": 4}, "gives `model.layers.0.mlp.experts` rank 4"),
        ({"rank_pattern": {"down_proj": 3}}, "`rank_pattern` tells .*cannot be known without"),
        ({"target_parameters": "mlp"}, "`target_parameters` is .*expected a list of names"),
    ]:
        folder = changed(**fields)
        assert Bank(folder).names == ["b", "c"]
        with pytest.raises(Exception, match=said):
            raise Bank(folder).left_out["a"]
    folder = changed()
    status, _, err = lorameta("convert", folder / "a", "-o", tmp_path / "mlx", "--to", "mlx")
    assert (status, "not written as mlx" in err) == (1, True), err
    status, _, err = lorameta("convert", folder / "a", "-o", tmp_path / "peft", "--to", "peft")
    assert status == 0, err
    first, again = (reference.read(path / WEIGHTS)[0] for path in (folder / "a", tmp_path / "peft"))
    for name, numbers in first.items():
        np.testing.assert_array_equal(again[name], numbers)
