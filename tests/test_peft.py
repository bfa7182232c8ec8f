"""`cat` and `svd` against what PEFT 0.21.2 computed: its recorded cases, golden/README."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference

from lorameta_rs import Bank
from lorameta_rs.member import WEIGHTS
from lorameta_rs.merge import Job, Options, merge

GOLDEN = Path(__file__).parent / "golden" / "peft_combine"
CASES = {
    case["id"]: case
    for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"]
    # A clamp depends on the signs that a library gives to singular vectors; an adapter that is
    # named twice has one name and one weight here.
    if case["combination_type"] in ("cat", "svd")
    and not case.get("svd_clamp")
    and case["id"] != "x__duplicate_adapter"
}


@pytest.fixture(scope="module")
def bank():
    return Bank(GOLDEN / "adapters")


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
