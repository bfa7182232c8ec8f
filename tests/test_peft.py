"""Every method against what PEFT 0.21.2 computed: its recorded cases, golden/README."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference

from lorameta_rs import Bank
from lorameta_rs.errors import InvalidSetting, LayoutMismatch
from lorameta_rs.member import WEIGHTS
from lorameta_rs.merge import Job, Options, merge

GOLDEN = Path(__file__).parent / "golden" / "peft_combine"
RECORDED = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
CASES = {
    case["id"]: case
    for case in RECORDED
    # A clamp depends on the signs that a library gives to singular vectors; an adapter that is
    # named twice has one name and one weight here.
    if case["combination_type"] in ("cat", "svd")
    and not case.get("svd_clamp")
    and case["id"] != "x__duplicate_adapter"
}


PLAIN = {
    case["id"]: case
    for case in RECORDED
    if case["combination_type"] in ("linear", "ties", "magnitude_prune")
}


@pytest.fixture(scope="module")
def bank(peft_bank):
    return Bank(peft_bank)


def combined(bank, case, out, **options):
    weights = dict(zip(case["adapters"], case["weights"], strict=True))
    row = np.array([weights.get(name, 0.0) for name in bank.names])
    merge(bank, [Job(row, out)], Options(method=case["combination_type"], **options))
    config = json.loads((out / "adapter_config.json").read_text())
    # PEFT copies `use_rslora` of the first adapter, and so acts √r too strongly: not here.
    assert (config["lora_alpha"], config["use_rslora"]) == (config["r"], False)
    return reference.read(out / WEIGHTS)[0]


def products(tensors):
    """B A by module; an embedding's change is its transpose, which both sides leave out."""
    found = {}
    for name, a in tensors.items():
        for factor, other in ((".lora_A.weight", ".lora_B.weight"), ("embedding_A", "embedding_B")):
            if name.endswith(factor):
                module = name.partition(".lora_")[0].removeprefix("base_model.model.")
                b = tensors[name.removesuffix(factor) + other]
                found[module] = np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("cat")])
def test_cat_is_that_of_peft(bank, tmp_path, name):
    case = CASES[name]
    got = combined(bank, case, tmp_path / "out")
    want = reference.read(GOLDEN / case["tensors"])[0]
    assert got.keys() == want.keys()
    for module, product in products(want).items():
        np.testing.assert_allclose(products(got)[module], product, atol=1e-6 * abs(product).max())
    if case["adapters"] == sorted(case["adapters"]) and len(case["adapters"]) > 1:
        for tensor, numbers in want.items():
            np.testing.assert_allclose(got[tensor], numbers, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].get("extra")])
def test_svd_is_that_of_peft(bank, tmp_path, name):
    case = CASES[name]
    members = [bank.members[bank.names.index(adapter)] for adapter in case["adapters"]]
    largest = max(max(member.config.r, *member.ranks) for member in members)
    got = products(combined(bank, case, tmp_path / "out", rank=case.get("svd_rank") or largest))
    extra = reference.read(GOLDEN / case["extra"])[0]
    want = {key.partition("/")[2]: t for key, t in extra.items() if key.startswith("delta_out/")}
    # Where PEFT's own factors do not fit each other there is nothing to compare.
    assert got.keys() == want.keys() or name.startswith("x__svd_rank")
    for module, product in want.items():
        right = product / case["result_scaling"]
        if got[module].shape != right.shape:
            right = right.T  # an embedding's, which PEFT turns around
        np.testing.assert_allclose(got[module], right, atol=1e-5 * abs(right).max())


# In 16 bits many numbers are equally large, and `torch.topk` keeps any of them: the core's own test
# allows for that. A density of 0, which keeps nothing, is refused. A name has one weight.
SAME = [
    name
    for name, case in PLAIN.items()
    if not name.startswith("x__")
    and len(set(case["adapters"])) > 1
    and case.get("density") != 0
    and (case["combination_type"] == "linear" or "h_r8_bf16" not in case["adapters"])
]


@pytest.mark.parametrize("name", SAME)
def test_factors_are_combined_as_peft_does(bank, tmp_path, name):
    case = PLAIN[name]
    options = {"density": case["density"]} if case["combination_type"] != "linear" else {}
    if sign := case.get("majority_sign_method"):
        options["majority_sign"] = sign
    got = products(combined(bank, case, tmp_path / "out", **options))
    want = products(reference.read(GOLDEN / case["tensors"])[0])
    assert got.keys() == want.keys()
    for module, product in want.items():
        np.testing.assert_allclose(got[module], product, atol=2e-6 * max(abs(product).max(), 1e-9))


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "magnitude_prune"])
def test_ranks_that_peft_cannot_stack_are_refused_with_a_way_out(bank, tmp_path, method):
    case = {"adapters": ["a_r8", "e_r16"], "weights": [0.5, 0.5], "combination_type": method}
    options = {} if method == "linear" else {"density": 0.5}
    with pytest.raises(LayoutMismatch, match="sum those by `svd` or `cat`"):
        combined(bank, case, tmp_path / "out", **options)


def test_the_same_seed_gives_the_same_bytes_on_any_threads(bank, tmp_path):
    case = {"adapters": ["a_r8", "b_r8"], "weights": [0.5, 0.5], "combination_type": "dare_ties"}
    found = []
    for i, (seed, threads) in enumerate([(1, 1), (1, 3), (2, 1)]):
        out = tmp_path / str(i)
        combined(bank, case, out, density=0.5, seed=seed, threads=threads)
        found.append((out / WEIGHTS).read_bytes())
    assert found[0] == found[1] != found[2]


def test_dense_forms_say_what_they_take(bank, tmp_path):
    case = {"adapters": ["a_r8", "b_r8"], "weights": [0.5, 0.5], "combination_type": "ties_svd"}
    with pytest.raises(InvalidSetting, match=r"budget is 0 MiB, .* at least \d+ MiB.*--memory"):
        combined(bank, case, tmp_path / "out", density=0.5, memory=1000)


def test_factors_alone_are_taken_of_what_is_more(tmp_path, lorameta, peft_bank):
    weights = ("--weights", "s_dora=0.5", "--weights", "s_head_saved=0.25")
    status, _, err = lorameta("merge", peft_bank, *weights, "-o", tmp_path / "out")
    assert status == 1
    assert "--drop-unsupported takes its factors alone" in err
    status, _, err = lorameta(
        "merge",
        peft_bank,
        *weights,
        "-o",
        tmp_path / "out",
        "--drop-unsupported",
        "--method",
        "cat",
    )
    assert status == 0
    assert "`s_dora`: `use_dora` is true, and is left out" in err
    assert "`s_head_saved`: `modules_to_save` is a list, and is left out" in err
    got = products(reference.read(tmp_path / "out" / WEIGHTS)[0])
    members = {member.name: member for member in Bank(peft_bank, drop_unsupported=True).members}
    for name, weight in (("s_dora", 0.5), ("s_head_saved", 0.25)):
        own = products(
            {n: t for n, t in reference.read(peft_bank / name / WEIGHTS)[0].items() if "lora_" in n}
        )
        for module, product in own.items():
            scaling = dict(
                zip((m.name for m in members[name].modules), members[name].scalings, strict=True)
            )[module]
            got[module] = got[module] - weight * scaling * product
    assert max(abs(rest).max() for rest in got.values()) < 1e-6
    again = tmp_path / "again"
    assert lorameta("merge", "--repeat", tmp_path / "out" / "lorameta.json", "-o", again)[0] == 0
    assert (again / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
