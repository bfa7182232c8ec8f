"""DoRA with the base's weights: sums against NumPy in float64, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import write_safetensors

from lorameta_rs import Bank
from lorameta_rs.errors import InvalidAdapter, InvalidBank, MissingFile
from lorameta_rs.index import hash_adapters
from lorameta_rs.member import WEIGHTS
from lorameta_rs.merge import Job, Options, merge, plan

GOLDEN = Path(__file__).parent / "golden" / "peft_combine"
PREFIX = "base_model.model."
COEFFICIENTS = np.array([0.6, -0.4, 0.3])


@pytest.fixture(scope="module")
def mixed(make_bank, tmp_path_factory):
    """A bank of two DoRA members and a plain one, the base's shards, and its numbers by module."""
    written = make_bank({"a": {"rank": 3}, "b": {}, "plain": {}})
    random = np.random.default_rng(7)
    for name in "ab":
        config = written.folder / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
        numbers = written.numbers[name]
        for tensor in [tensor for tensor in numbers if "lora_B" in tensor]:
            module = tensor.partition(".lora_")[0]
            size = numbers[tensor].shape[0]
            numbers[f"{module}.lora_magnitude_vector"] = random.uniform(1, 3, size)
        written.edit(name, lambda tensors: None)
        written.numbers[name] = reference.read(written.weights(name))[0]
    folder = tmp_path_factory.mktemp("base")
    base, where = {}, {}
    for tensor, numbers in written.numbers["plain"].items():
        if "lora_B" not in tensor:
            continue
        module = tensor.removeprefix(PREFIX).partition(".lora_")[0]
        inner = written.numbers["plain"][tensor.replace("lora_B", "lora_A")].shape[1]
        base[module] = random.normal(size=(numbers.shape[0], inner)).astype("f4")
        where[f"{module}.weight"] = f"shard{len(where) % 2}.safetensors"
    for shard in sorted(set(where.values())):
        mine = {n: (base[n.removesuffix(".weight")], "F32") for n in where if where[n] == shard}
        write_safetensors(folder / shard, mine)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return written, folder, base


def deltas(mixed, module):
    """Each member's ΔW in float64."""
    written, folder, base = mixed
    found = []
    for member in Bank(written.folder, base_weights=folder).members:
        numbers = written.numbers[member.name]
        names = [one.name for one in member.modules]
        name = f"{PREFIX}{module}.lora_"
        s = member.scalings[names.index(module)]
        delta = s * numbers[f"{name}B.weight"] @ numbers[f"{name}A.weight"]
        if member.config.use_dora:
            w = base[module].astype("f8")
            norm = np.linalg.norm(w + delta, axis=1)
            delta = (numbers[f"{name}magnitude_vector"] / norm)[:, None] * (w + delta) - w
        found.append(delta)
    return found


def want(mixed, module):
    """Σ c ΔW in float64."""
    return sum(c * delta for c, delta in zip(COEFFICIENTS, deltas(mixed, module), strict=True))


@pytest.mark.parametrize("memory", [64 << 20, 200_000])
@pytest.mark.parametrize("rank", [4, 24])
def test_a_sum_with_dora_is_near_the_best_of_its_rank(mixed, tmp_path, rank, memory):
    written, folder, _ = mixed
    bank = Bank(written.folder, base_weights=folder)
    job = Job(COEFFICIENTS, tmp_path / "out")
    done = merge(bank, [job], Options(rank=rank, memory=memory))
    assert (done.method, done.soup_error) == ("svd", None)
    tensors, _ = reference.read(tmp_path / "out" / WEIGHTS)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["lora_alpha"]) == (False, config["r"])
    assert not any("magnitude" in tensor for tensor in tensors)
    for module, energy, kept, exact in done.outcomes[0].kept:
        whole = want(mixed, module)
        found = (
            tensors[f"{PREFIX}{module}.lora_B.weight"] @ tensors[f"{PREFIX}{module}.lora_A.weight"]
        )
        square = np.linalg.norm(whole) ** 2
        left = np.linalg.norm(whole - found) ** 2
        least = np.sum(np.linalg.svd(whole)[1][config["r"] :] ** 2)
        assert math.sqrt(left) <= 1.02 * math.sqrt(least) + 1e-5 * math.sqrt(square)
        assert exact
        assert energy == pytest.approx(square, rel=1e-5)
        assert energy - kept == pytest.approx(left, abs=1e-5 * square)


def test_unit_norms_are_those_of_the_whole_change(mixed, tmp_path):
    written, folder, base = mixed
    bank = Bank(written.folder, base_weights=folder)
    hash_adapters(bank)  # its norms are those of B A, and not to be taken for these
    options = Options(normalize="unit", rank=24)
    done = merge(bank, [Job(COEFFICIENTS, tmp_path / "out")], options)
    assert done.method == "svd"
    tensors, _ = reference.read(tmp_path / "out" / WEIGHTS)
    for module in base:
        own = deltas(mixed, module)
        norms = [np.linalg.norm(delta) for delta in own]
        mean = np.abs(COEFFICIENTS) @ norms / np.abs(COEFFICIENTS).sum()
        whole = sum(c * d / n for c, d, n in zip(COEFFICIENTS, own, norms, strict=True)) * mean
        name = f"{PREFIX}{module}.lora_"
        found = tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]
        assert np.linalg.norm(found - whole) <= 1e-5 * np.linalg.norm(whole)


def test_threads_and_other_targets_do_not_matter(mixed, tmp_path):
    written, folder, _ = mixed
    bank = Bank(written.folder, base_weights=folder)
    outs = [tmp_path / str(i) for i in range(4)]
    for out, threads in zip(outs, (1, 3), strict=False):
        merge(bank, [Job(COEFFICIENTS, out)], Options(threads=threads))
    merge(bank, [Job(COEFFICIENTS, outs[2]), Job(COEFFICIENTS[::-1].copy(), outs[3])])
    first, second, third = ((out / WEIGHTS).read_bytes() for out in outs[:3])
    assert first == second
    together, alone = (reference.read(out / WEIGHTS)[0] for out in (outs[2], outs[0]))
    for tensor, numbers in alone.items():
        np.testing.assert_allclose(together[tensor], numbers, atol=1e-4)
    assert len(third) == len(first)


def test_the_change_is_what_peft_adds_to_the_base(peft_bank, tmp_path):
    base, _ = reference.read(GOLDEN / "base" / "model.safetensors")
    merged, _ = reference.read(GOLDEN / "dora_merged.safetensors")
    bank = Bank(peft_bank, base_weights=GOLDEN / "base", exclude=["*saved*", "*embed*"])
    chosen = np.array([float(name == "s_dora") for name in bank.names])
    merge(bank, [Job(chosen, tmp_path / "out")], Options(rank=32))
    tensors, _ = reference.read(tmp_path / "out" / WEIGHTS)
    assert merged
    for name, weight in merged.items():
        module = name.removeprefix("s_dora/").removesuffix(".weight")
        stem = f"{PREFIX}{module}.lora_"
        want = weight - base[f"{module}.weight"]
        found = tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]
        assert np.linalg.norm(found - want) <= 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("method", ["soup", "cat", "linear", "ties", "ties_svd"])
def test_other_methods_refuse_dora_with_the_reason(make_bank, mixed, tmp_path, method):
    written, folder, _ = mixed
    bank = Bank(written.folder, base_weights=folder)
    options = Options(method=method, density=0.5 if method.startswith("ties") else None)
    job = Job(np.array([0.0, 1.0, 1.0]), tmp_path / "out")
    with pytest.raises(InvalidAdapter, match=r"magnitude_vector.*whole weight.*use `svd`"):
        plan(bank, [job], options)


def test_what_does_not_fit_is_named(make_bank, mixed, tmp_path):
    written, folder, base = mixed
    assert Bank(written.folder).names == ["plain"]
    assert "--base-weights" in str(Bank(written.folder).left_out["a"])
    assert Bank(written.folder, drop_unsupported=True).names == ["a", "b", "plain"]
    job = Job(COEFFICIENTS, tmp_path / "out")
    with pytest.raises(MissingFile, match=r"a folder without `model\.safetensors`"):
        plan(Bank(written.folder, base_weights=written.folder), [job])
    part = tmp_path / "part.safetensors"
    module = next(iter(base))
    for tensors, said in [
        ({"x.weight": (base[module], "F32")}, f"no `{module}.weight`"),
        ({f"{module}.weight": (base[module][:5], "F32")}, r"shape \[5, 24\]"),
    ]:
        write_safetensors(part, tensors)
        with pytest.raises(ValueError, match=said):
            plan(Bank(written.folder, base_weights=part), [job])
    transposed = make_bank({"a": {"config": {"use_dora": True, "fan_in_fan_out": True}}})
    with pytest.raises(InvalidBank, match=r"`use_dora` is true, .*stored \[in, out\]"):
        Bank(transposed.folder, base_weights=folder)
    undeclared = make_bank({"a": {"config": {"use_dora": True}}})
    with pytest.raises(InvalidBank, match=r"`use_dora` is true, .* has no magnitude"):
        Bank(undeclared.folder, base_weights=folder)


def test_on_the_command_line_and_again(mixed, tmp_path, lorameta):
    written, folder, _ = mixed
    weights = ("--weights", "a=0.5", "--weights", "plain=0.5")
    out = tmp_path / "out"
    status, _, err = lorameta("merge", written.folder, *weights, "-o", out)
    assert (status, "--base-weights" in err) == (1, True)
    status, _, err = lorameta(
        "merge", written.folder, *weights, "-o", out, "--base-weights", folder
    )
    assert (status, "rank 5, which keeps " in err or "keeps " in err) == (0, True), err
    again = tmp_path / "again"
    assert lorameta("merge", "--repeat", out / "lorameta.json", "-o", again)[0] == 0
    assert (again / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()


def test_weights_of_another_format_are_named(lorameta, mixed, tmp_path):
    written, *_ = mixed
    given = ["--weights", "a=1", "-o", tmp_path / "out", "--base-weights"]
    base = GOLDEN.parent / "interop" / "gguf" / "base.gguf"
    status, _, err = lorameta("merge", written.folder, *given, base)
    assert status == 1
    assert f"`{base}` is no safetensors file: DoRA members need" in err
    (tmp_path / "x.safetensors").write_bytes(b"junk" * 4)
    status, _, err = lorameta("merge", written.folder, *given, tmp_path / "x.safetensors")
    assert (status, "x.safetensors" in err, "DoRA" in err) == (1, True, False), err
