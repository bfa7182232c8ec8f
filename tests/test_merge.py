"""The weighted sums against float64, each member's strength, and the adapter that is written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import reference
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from lorameta_rs import Bank
from lorameta_rs.errors import (
    FileChanged,
    InvalidSetting,
    LayoutMismatch,
    MissingFile,
    NotFinite,
)
from lorameta_rs.merge import FILES, Job, Options, merge, plan
from lorameta_rs.modules import lacking

ODD = {
    "model.layers.0.q_proj": (517, 301),
    "model.layers.0.v_proj": (129, 1),
    "model.layers.1.q_proj": (1, 4099),
}
STORED = {
    "float32": {"dtypes": "F32"},
    "float16": {"dtypes": "F16"},
    "bfloat16": {"dtypes": "BF16"},
    "float64": {"dtypes": "F64"},
    "mixed within a file": {"dtypes": "BF16 F32 F16"},
    "shuffled": {"shuffled": True},
    "unaligned": {"shift": 3, "dtypes": "F16 F32 F64"},
}
# Half of the distance between neighbouring numbers, relative and around zero.
ROUNDING = {
    "float32": (2**-24, 2**-149),
    "float16": (2**-11, 2**-25),
    "bfloat16": (2**-8, 2**-133),
}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
WEIGHTS = "adapter_model.safetensors"
Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def mixed(make_bank):
    """A member for each way of storing tensors, the same modules in all."""
    return make_bank(STORED, modules=ODD, rank=5)


@pytest.fixture(scope="module")
def bank(make_bank):
    """Three members, of which one is stronger and one is stored in 16 bits."""
    return Bank(
        make_bank({"a": {}, "b": {"config": {"lora_alpha": 3}}, "c": {"dtypes": "F16"}}).folder
    )


def merged(bank, coefficients, out, **options):
    """The numbers that `Bank.merge` writes for coefficients by name, and the configuration."""
    row = np.array([coefficients.get(name, 0.0) for name in bank.names])
    bank.merge(row, out, **({"method": "soup"} | options))
    return reference.read(out / WEIGHTS)[0], json.loads((out / "adapter_config.json").read_text())


def assert_sums(got, members, coefficients, dtype="float32", strength=lambda i, tensor: 1.0):
    """That the numbers are as near to the exact sums as float32 and the output's type allow."""
    want = reference.soup(members, coefficients, strength)
    sizes = reference.soup(
        [{name: abs(x) for name, x in one.items()} for one in members],
        np.abs(coefficients),
        lambda i, tensor: abs(strength(i, tensor)),
    )
    assert got.keys() == want.keys()
    relative, least = ROUNDING[dtype]
    for name, numbers in got.items():
        # A rounding for the coefficient, for the number, and for each member that is added.
        allowed = (len(members) + 3) * 2**-24 * sizes[name] + relative * abs(want[name]) + least
        assert (abs(numbers - want[name]) <= allowed).all(), name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("stored", [*STORED, "all of them"])
def test_sums_equal_those_in_float64(mixed, make_bank, tmp_path, stored, dtype):
    if stored == "all of them":
        written = mixed
    else:
        own = {name: STORED[stored] | {"seed": seed} for seed, name in enumerate("abcde")}
        written = make_bank(own, modules=ODD, rank=5)
    bank = Bank(written.folder)
    coefficients = dict(zip(bank.names, [0.4, -1.7, 0.0, 1e-3, 2.5, 0.3, 0.1], strict=False))
    got, _ = merged(bank, coefficients, tmp_path / "out", dtype=dtype)
    assert reference.read(tmp_path / "out" / WEIGHTS)[1] == {TYPES[dtype]}
    members = [written.numbers[name] for name in bank.names]
    assert_sums(got, members, list(coefficients.values()), dtype)


@pytest.mark.parametrize("io", ["read", "mmap"])
@pytest.mark.parametrize("targets", [1, 2, 5, 40])
def test_every_target_of_a_pass_equals_its_sum(mixed, tmp_path, targets, io):
    bank = Bank(mixed.folder)
    rows = np.random.default_rng(targets).normal(size=(targets, len(bank)))
    rows[:, 1] = 0.0
    jobs = [Job(row, tmp_path / str(i)) for i, row in enumerate(rows)]
    done = merge(bank, jobs, Options(method="soup", io=io))
    for i, row in enumerate(rows):
        got, _ = reference.read(tmp_path / str(i) / WEIGHTS)
        assert_sums(got, [mixed.numbers[name] for name in bank.names], row)
    used = [member for member, column in zip(bank.members, rows.T, strict=True) if column.any()]
    assert done.plan.bytes == sum(data_size(mixed.weights(member.name)) for member in used)


def data_size(path):
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("targets", [1, 6])
def test_the_bits_depend_on_nothing_but_members_and_coefficients(mixed, tmp_path, targets, dtype):
    bank = Bank(mixed.folder)
    rows = np.random.default_rng(0).normal(size=(targets, len(bank)))
    bank.merge(rows[0], tmp_path / "alone", dtype=dtype, method="soup")
    alone = (tmp_path / "alone" / WEIGHTS).read_bytes()
    ways = itertools.product([1, 2, 3], [1 << 20, 64 << 20], ["mmap", "read"])
    for way, (threads, memory, io) in enumerate(ways):
        outs = [tmp_path / f"{way}-{i}" for i in range(targets)]
        options = Options(method="soup", dtype=dtype, threads=threads, memory=memory, io=io)
        done = merge(bank, [Job(*job) for job in zip(rows, outs, strict=True)], options)
        assert (outs[0] / WEIGHTS).read_bytes() == alone
        assert done.plan.memory <= memory
        assert done.plan.threads == threads


def test_modules_past_one_block(make_bank, tmp_path):
    """So many numbers that even a single thread writes them in several turns."""
    written = make_bank(modules={"layers.0.q": (40_001, 30_011)}, rank=7, dtypes="F32 BF16")
    bank = Bank(written.folder)
    outs = [tmp_path / str(threads) for threads in (1, 4)]
    for threads, out in zip((1, 4), outs, strict=True):
        bank.merge([0.5, -0.25, 3.0], out, threads=threads, memory=1 << 20, method="soup")
    assert_sums(reference.read(outs[0] / WEIGHTS)[0], [*written.numbers.values()], [0.5, -0.25, 3])
    assert (outs[0] / WEIGHTS).read_bytes() == (outs[1] / WEIGHTS).read_bytes()


def test_a_module_that_a_member_lacks_counts_as_zero(make_bank, tmp_path):
    every = {f"layers.{i}.q": (5, 7) for i in range(3)}
    own = {name: {"modules": dict(list(every.items())[i:])} for i, name in enumerate("abc")}
    written = make_bank(own, config={"target_modules": ["q"]})
    bank = Bank(written.folder)
    assert lacking(bank.members[:1]) is lacking(bank.members[2:]) is None
    said = lacking(bank.members[:2])
    assert said == "`b`: has no `layers.0.q`, which others have; it counts as zero there"
    assert lacking(bank.members) == (
        "`b`, `c` lack modules that others have, and count as zero there"
    )
    got, _ = merged(bank, {"a": 0.5, "b": 0.25, "c": 2.0}, tmp_path / "out")
    assert_sums(got, [*written.numbers.values()], [0.5, 0.25, 2.0])
    got, config = merged(bank, {"c": 2.0}, tmp_path / "c")
    assert got.keys() == written.numbers["c"].keys()
    assert config["target_modules"] == ["layers.2.q"]


def test_members_without_a_coefficient_are_never_read(make_bank, tmp_path):
    written = make_bank()
    bank = Bank(written.folder)
    written.weights("b").unlink()
    got, _ = merged(bank, {"a": 0.5, "c": 0.5}, tmp_path / "out")
    assert_sums(got, [written.numbers["a"], written.numbers["c"]], [0.5, 0.5])
    with pytest.raises(MissingFile, match=r"b.adapter_model\.safetensors"):
        merged(bank, {"a": 0.5, "b": 0.5}, tmp_path / "missing")


@pytest.mark.skipif(os.name == "nt", reason="there is no such limit")
@pytest.mark.parametrize("io", ["read", "mmap"])
def test_more_members_than_files_may_be_open(make_bank, tmp_path, io):
    """macOS allows a process 256 at first, and many a Linux 1024."""
    import resource

    written = make_bank([f"{i:03}" for i in range(200)])
    bank = Bank(written.folder)
    _, most = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))
    try:
        got, _ = merged(bank, dict.fromkeys(bank.names, 0.125), tmp_path / "out", io=io)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert_sums(got, [*written.numbers.values()], [0.125] * 200)


def test_the_plan_is_what_the_merge_does(mixed, tmp_path):
    bank = Bank(mixed.folder)
    jobs = [Job(np.eye(len(bank))[i], tmp_path / str(i)) for i in (0, 2)]
    options = Options(method="soup", threads=2, memory=1 << 20)
    before, after = plan(bank, jobs, options), merge(bank, jobs, options)
    for name in ("bytes", "memory", "threads"):
        assert getattr(before.plan, name) == getattr(after.plan, name)
    assert before.plan.memory <= 1 << 20


@settings(max_examples=25)
@given(power=st.integers(-20, 20), row=st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_scaling_all_coefficients_scales_both_factors_alike(bank, tmp_path_factory, power, row):
    folder = tmp_path_factory.mktemp("scaled")
    once, _ = merged(bank, dict(zip("abc", row, strict=True)), folder / "once")
    scaled = {name: c * 2.0**power for name, c in zip("abc", row, strict=True)}
    scaled, _ = merged(bank, scaled, folder / "scaled")
    for name, numbers in once.items():
        np.testing.assert_array_equal(scaled[name], numbers * 2.0**power)
    shutil.rmtree(folder)


@settings(max_examples=25)
@given(
    rows=st.lists(st.lists(st.floats(0.01, 4), min_size=3, max_size=3), min_size=2, max_size=2),
)
def test_the_sum_of_two_merges_is_the_merge_of_the_sums(bank, tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("sums")
    rows = np.array([*rows, np.sum(rows, axis=0)])
    merge(bank, [Job(row, folder / str(i)) for i, row in enumerate(rows)], Options(method="soup"))
    one, other, both = (reference.read(folder / str(i) / WEIGHTS)[0] for i in range(3))
    for name, numbers in both.items():
        np.testing.assert_allclose(one[name] + other[name], numbers, rtol=0, atol=2e-5)
    shutil.rmtree(folder)


def test_the_order_of_a_bank_does_not_matter(make_bank, tmp_path):
    own = {name: {"seed": i} for i, name in enumerate("abcd")}
    first = Bank(make_bank(own).folder)
    renamed = dict(zip("cadb", own.values(), strict=True))
    second = Bank(make_bank(renamed).folder)
    row = dict(zip("abcd", [0.1, 0.2, 0.3, 0.4], strict=True))
    one, _ = merged(first, row, tmp_path / "one")
    same = dict(zip("cadb", row.values(), strict=True))
    other, _ = merged(second, same, tmp_path / "other")
    for name, numbers in one.items():
        np.testing.assert_allclose(other[name], numbers, rtol=0, atol=1e-6)


# The strength of the members.

STRENGTHS = {
    "different alphas": [{"lora_alpha": 4}, {"lora_alpha": 1}, {"lora_alpha": 4.5}],
    "rslora beside plain": [{"use_rslora": True}, {}, {"lora_alpha": 8}],
    "rslora alone": [{"use_rslora": True}] * 3,
    "an alpha for some modules": [{"alpha_pattern": {"q_proj": 16, "layers.1.*": 1}}, {}, {}],
    "a negative alpha": [{"lora_alpha": -4}] * 3,
    "alpha zero beside others": [{"lora_alpha": 0}, {}, {}],
    "alpha zero alone": [{"lora_alpha": 0}] * 3,
}


@pytest.mark.parametrize("case", STRENGTHS)
def test_each_member_acts_with_its_own_strength(make_bank, tmp_path, case):
    configs = dict(zip("abc", STRENGTHS[case], strict=True))
    written = make_bank({name: {"config": one} for name, one in configs.items()})
    got, config = merged(Bank(written.folder), {"a": 0.5, "b": -1.0, "c": 0.25}, tmp_path / "out")
    scaling = config["lora_alpha"] / config["r"]
    assert not config["use_rslora"]
    assert config["alpha_pattern"] == {}

    def strength(i, tensor):
        if "lora_A" in tensor:
            return 1.0
        module = tensor.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        own = {"r": 2, "lora_alpha": 4} | configs["abc"[i]]
        return reference.scaling(own, module) / scaling

    assert_sums(got, [*written.numbers.values()], [0.5, -1.0, 0.25], strength=strength)


@pytest.mark.parametrize(
    ("fields", "rank", "alpha"),
    [
        ({"lora_alpha": 32}, 16, 32),
        ({"lora_alpha": 4.5}, 2, 4.5),
        ({"lora_alpha": 8, "use_rslora": True}, 4, 16),
        ({"lora_alpha": 16, "alpha_pattern": {"._proj": 8}}, 4, 8),
    ],
)
def test_one_strength_stays_in_the_configuration(make_bank, tmp_path, fields, rank, alpha):
    written = make_bank(rank=rank, config=fields)
    got, config = merged(Bank(written.folder), {"a": 0.5, "b": 0.25}, tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, alpha, False)
    assert_sums(got, [written.numbers["a"], written.numbers["b"]], [0.5, 0.25])


@pytest.mark.parametrize(
    "fields", [{"lora_alpha": 3, "use_rslora": True}, {"lora_alpha": 0}, {"lora_alpha": -4}]
)
def test_an_alpha_that_clients_read_differently_goes_into_b(make_bank, tmp_path, fields):
    written = make_bank(rank=2, config=fields)
    _, config = merged(Bank(written.folder), {"a": 1.0}, tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 2, False)


def test_other_ranks_are_refused_and_said_how_to_go_on(make_bank, tmp_path):
    written = make_bank({"a": {}, "b": {"rank": 3}, "c": {}})
    bank = Bank(written.folder)
    with pytest.raises(LayoutMismatch) as caught:
        merged(bank, {"a": 0.5, "b": 0.5}, tmp_path / "out")
    for said in (str(written.folder / "a"), str(written.folder / "b"), "rank 3", "--method svd"):
        assert said in str(caught.value)
    assert merged(bank, {"a": 0.5, "c": 0.5}, tmp_path / "out")[1]["r"] == 2
    assert not (tmp_path / "out" / "b").exists()


def test_a_member_of_several_ranks_is_refused(make_bank, tmp_path):
    written = make_bank(["a"], config={"rank_pattern": {"layers.1.*q_proj": 3}})
    wider = {Q_A: np.ones((3, 24)), Q_A.replace("lora_A", "lora_B"): np.ones((24, 3))}
    written.edit("a", lambda tensors: tensors.update(wider))
    with pytest.raises(LayoutMismatch, match="has rank 2, 3: `soup`"):
        merged(Bank(written.folder), {"a": 1.0}, tmp_path / "out")


# What is written.


def test_the_folder_is_read_by_safetensors_and_portable(make_bank, tmp_path):
    written = make_bank(config={"use_rslora": True, "lora_dropout": 0.1, "bias": "none"})
    _, config = merged(Bank(written.folder), {"a": 0.5, "b": 0.5}, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    path = tmp_path / "out" / WEIGHTS
    with safetensors.safe_open(path, "numpy") as content:
        assert content.metadata() == {"format": "pt"}
        for name in content.keys():  # noqa: SIM118  not a mapping
            np.testing.assert_array_equal(content.get_tensor(name), reference.read(path)[0][name])
    assert {name.rpartition(".lora_")[2] for name in reference.read(path)[0]} == {
        "A.weight",
        "B.weight",
    }
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "base"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["bias"] == "none"
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None
    assert (config["use_dora"], config["use_rslora"]) == (False, False)
    assert isinstance(config["target_modules"], list)
    back = Bank(tmp_path).members[0]
    assert back.notes == ()
    assert back.name == "out"


LAYERS = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q", "k", "v")]


@pytest.mark.parametrize(
    ("adapted", "model", "short"),
    [
        ([name for name in LAYERS if name[-1] in "qv"], LAYERS, True),
        (LAYERS[:4], LAYERS, False),
        (LAYERS[3:], LAYERS, False),
        ([*LAYERS, "lm_head"], [*LAYERS, "lm_head"], False),
        (["lm_head"], ["lm_head", "embed"], True),
        (["block.0.mlp.0", "block.1.mlp.0"], ["block.0.mlp.0", "block.1.mlp.0", "x.0"], False),
    ],
    ids=["even", "uneven", "a layer missing", "with a head", "one module", "numbers"],
)
def test_target_modules_are_those_that_the_tensors_change(
    make_bank, tmp_path, adapted, model, short
):
    written = make_bank(["a", "b"], modules=dict.fromkeys(adapted, (3, 4)))
    _, config = merged(Bank(written.folder), {"a": 1.0}, tmp_path / "out")
    targets = config["target_modules"]
    chosen = [m for m in model if any(m == t or m.endswith(f".{t}") for t in targets)]
    assert sorted(chosen) == sorted(adapted)
    assert targets == sorted(targets)
    assert all("." not in target for target in targets) == short


def test_tasks_that_differ_are_not_written(make_bank, tmp_path):
    own = {"a": {}, "b": {"config": {"task_type": None}}}
    bank = Bank(make_bank(own).folder)
    assert merged(bank, {"a": 1.0}, tmp_path / "a")[1]["task_type"] == "CAUSAL_LM"
    assert merged(bank, {"a": 1.0, "b": 1.0}, tmp_path / "ab")[1]["task_type"] is None


@pytest.mark.parametrize(
    ("field", "value"), [("fan_in_fan_out", True), ("layer_replication", [[0, 2], [1, 3]])]
)
def test_what_the_base_has_to_be_must_not_differ(make_bank, tmp_path, field, value):
    bank = Bank(make_bank({"a": {}, "b": {"config": {field: value}}}).folder)
    assert merged(bank, {"b": 1.0}, tmp_path / "b")[1][field] == value
    with pytest.raises(LayoutMismatch, match=rf"b.*`{field}` is .*, in `a` it is") as caught:
        merged(bank, {"a": 1.0, "b": 1.0}, tmp_path / "ab")
    assert "--exclude" in str(caught.value)


# What is refused.


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1.0], r"shape \(1,\), expected \(3,\)"),
        ([0.0, 0.0, 0.0], "all coefficients are zero"),
        ([1.0, np.nan, 1.0], "the coefficient of `b` is not a finite number"),
        ([1.0, np.inf, 1.0], "the coefficient of `b` is not a finite number"),
        ([1.0, 1e39, 1.0], "not a finite number of float32"),
    ],
)
def test_coefficients_that_cannot_be_used(make_bank, tmp_path, row, said):
    with pytest.raises(InvalidSetting, match=said):
        Bank(make_bank().folder).merge(row, tmp_path / "out", method="soup")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "sum"}, "method `sum`: expected one of auto, soup, svd, cat, linear"),
        ({"dtype": "int8"}, "dtype `int8`: expected one of float32, float16, bfloat16"),
        ({"io": "magic"}, "io `magic`: expected one of read, mmap"),
        ({"memory": 1 << 10}, "raise --memory"),
        ({"normalize": "unit"}, "norms are those of ΔW"),
        ({"rank": 4}, "the method `soup` takes none"),
        ({"density": 0.5}, "density: the method `soup` takes none"),
        ({"method": "ties"}, "density: the method `ties` needs it"),
        ({"method": "dare_ties_svd", "density": 0.0}, "density is 0.0, expected a share"),
        ({"method": "ties", "density": 0.5, "majority_sign": "mean"}, "expected one of total"),
        ({"method": "svd", "majority_sign": "frequency"}, "majority_sign: the method `svd` takes"),
        (
            {"method": "dare_linear", "density": 0.5, "majority_sign": "frequency"},
            "majority_sign: the method `dare_linear` takes none",
        ),
        ({"method": "svd", "rank": 0}, "rank is 0, expected 1 or more"),
        ({"method": "svd", "rank": 4, "energy": 0.9}, "give one"),
        ({"method": "svd", "energy": 1.1}, "energy is 1.1, expected a share"),
        ({"method": "svd", "allow_nan": True}, "cannot decompose NaN"),
    ],
)
def test_options_that_cannot_be_used(make_bank, tmp_path, options, said):
    with pytest.raises(InvalidSetting, match=said):
        Bank(make_bank().folder).merge(
            [1.0, 1.0, 1.0], tmp_path / "out", **({"method": "soup"} | options)
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "shown"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "-Inf")])
@pytest.mark.parametrize("targets", [1, 5])
def test_a_number_that_is_none_is_named(make_bank, tmp_path, number, shown, targets):
    written = make_bank()
    written.edit("b", lambda tensors: tensors[Q_A].__setitem__((1, 3), number))
    bank = Bank(written.folder)
    rows = np.eye(3)[[0, 1, 2, 0, 2]][:: -1 if targets > 1 else 1][:targets]
    rows[0, 1] = 0.5
    jobs = [Job(row, tmp_path / str(i)) for i, row in enumerate(rows)]
    with pytest.raises(NotFinite) as caught:
        merge(bank, jobs, Options(method="soup"))
    for said in (str(written.weights("b")), Q_A, f"holds {shown} as a float32\n", "--allow-nan"):
        assert said in str(caught.value)
    assert not any(tmp_path.iterdir())

    merge(bank, jobs, Options(method="soup", allow_nan=True))
    for i, row in enumerate(rows):
        got, _ = reference.read(tmp_path / str(i) / WEIGHTS)
        if row[1]:
            np.testing.assert_equal(got[Q_A][1, 3], number)
            got[Q_A][1, 3] = 0.0
        assert all(np.isfinite(numbers).all() for numbers in got.values())


def test_a_sum_beyond_its_type_is_named(make_bank, tmp_path):
    bank = Bank(make_bank().folder)
    with pytest.raises(NotFinite, match=r"lora_A.weight`: the weighted sum is beyond .*--dtype"):
        bank.merge([1e6, 0.0, 0.0], tmp_path / "out", dtype="float16", method="soup")
    with pytest.raises(NotFinite, match="beyond the range of F32"):
        bank.merge([3e38, 3e38, 3e38], tmp_path / "out", method="soup")
    assert not any(tmp_path.iterdir())
    bank.merge([1e6, 0.0, 0.0], tmp_path / "out", dtype="bfloat16", method="soup")


@pytest.mark.parametrize("change", ["touched", "longer", "replaced"])
def test_a_file_that_changed_since_the_bank_was_read(make_bank, tmp_path, change):
    written = make_bank()
    bank = Bank(written.folder)
    path = written.weights("b")
    if change == "touched":
        os.utime(path, ns=(0, 1))
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b" ")
    else:
        shutil.copy(written.weights("a"), path)
        os.utime(path, ns=(0, 1))
    with pytest.raises(FileChanged, match=r"b.adapter_model\.safetensors` changed"):
        bank.merge([0.5, 0.5, 0.0], tmp_path / "out", method="soup")
    assert not any(tmp_path.iterdir())
    bank.merge([0.5, 0.0, 0.5], tmp_path / "out", method="soup")


def test_a_file_that_changes_meanwhile(large_bank, tmp_path):
    bank = Bank(large_bank)
    path = large_bank / "7" / WEIGHTS
    unfinished = []

    def touch(done, total):
        unfinished.append(done < total)
        os.utime(path, ns=(0, len(unfinished)))

    with pytest.raises(FileChanged, match=WEIGHTS):
        merge(
            bank,
            [Job(np.ones(len(bank)), tmp_path / "out")],
            Options(method="soup", threads=1),
            touch,
        )
    assert unfinished[0]
    assert not any(tmp_path.iterdir())


def test_progress_rises_to_the_end(large_bank, tmp_path):
    bank = Bank(large_bank)
    told = []
    job = Job(np.ones(len(bank)), tmp_path / "out")
    done = merge(bank, [job], Options(method="soup", threads=1), lambda *now: told.append(now))
    assert len(told) > 1
    assert told == sorted(told)
    assert {total for _, total in told} == {done.plan.bytes}
    assert told[-1] == (done.plan.bytes, done.plan.bytes)


def test_verified_hashes(make_bank, tmp_path):
    from lorameta_rs.index import hash_adapters

    written = make_bank()
    bank = Bank(written.folder)
    bank.merge([1.0, 1.0, 0.0], tmp_path / "unindexed", verify=True, method="soup")
    hash_adapters(bank)
    bank.merge([1.0, 1.0, 0.0], tmp_path / "indexed", verify=True, method="soup")
    index = bank.index
    index.adapters["b"] = dataclasses.replace(index.adapters["b"], sha256="0" * 64)
    with pytest.raises(FileChanged, match=r"b.*SHA-256 .*, the index recorded\s+000000000000"):
        bank.merge([1.0, 1.0, 0.0], tmp_path / "changed", verify=True, method="soup")
    bank.merge([1.0, 0.0, 1.0], tmp_path / "changed", verify=True, method="soup")
