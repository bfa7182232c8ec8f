"""`convert`: there and back, whole banks, and what cannot be converted."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorameta_rs import Bank, _core
from lorameta_rs.index import make_fingerprints
from lorameta_rs.member import open_members
from lorameta_rs.merge import Job, Options, merge

LINEAR = (
    *("a_r8", "b_r8", "c_r8_rslora_f16", "d_r4_bf16", "e_r16", "f_r8_patterns", "g_r8_qv_only"),
    *("h_r8_bf16", "i_r8_patterns", "j_r4_pattern_up"),
)


@pytest.fixture
def base(golden):
    return golden / "peft_combine" / "base"


@pytest.fixture
def adapters(golden):
    return golden / "peft_combine" / "adapters"


def deltas(folder):
    """ΔW of each module of a PEFT folder, in float64."""
    (member,) = open_members([folder])
    return dict(zip_deltas(member, folder))


def zip_deltas(member, folder):
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        for module, scaling in zip(member.modules, member.scalings, strict=True):
            stem = f"base_model.model.{module.name}"
            a, b = (
                file.get_tensor(f"{stem}.lora_{factor}.weight").astype(np.float64)
                for factor in "AB"
            )
            yield module.name, scaling * b @ a


@pytest.mark.parametrize("to", ["gguf", "mlx"])
@pytest.mark.parametrize("name", [n for n in LINEAR if "bf16" not in n])
def test_there_and_back_the_product_is_the_same(lorameta, adapters, base, tmp_path, name, to):
    there, back = tmp_path / "there", tmp_path / "back"
    options = ["--base-config", base] if to == "gguf" else []
    assert lorameta("convert", adapters / name, "-o", there, "--to", to, *options)[0] == 0
    assert lorameta("convert", there, "-o", back, "--to", "peft")[0] == 0
    found = deltas(back)
    wanted = deltas(adapters / name)
    assert found.keys() == wanted.keys()
    for module, delta in wanted.items():
        np.testing.assert_allclose(found[module], delta, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_plain_float32_comes_back_bit_for_bit(lorameta, adapters, base, tmp_path, to):
    there, back = tmp_path / "there", tmp_path / "back"
    lorameta("convert", adapters / "a_r8", "-o", there, "--to", to, "--base-config", base)
    lorameta("convert", there, "-o", back, "--to", "peft")
    found = load_file(back / "adapter_model.safetensors")
    wanted = load_file(adapters / "a_r8" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    config = json.loads((back / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)


def test_the_golden_files_are_read(lorameta, golden, adapters, tmp_path):
    interop = golden / "interop"
    for number, (source, name) in enumerate(
        [
            (interop / "gguf" / "a_r8.global.gguf", "a_r8"),
            (interop / "gguf" / "a_r8.folded.gguf", "a_r8"),
            (interop / "gguf" / "c_r8_rslora_f16.folded.gguf", "c_r8_rslora_f16"),
            (interop / "gguf" / "f_r8_patterns.folded.gguf", "f_r8_patterns"),
            (interop / "gguf" / "g_r8_qv_only.global.gguf", "g_r8_qv_only"),
            *((interop / "mlx" / n, n) for n in ("a_r8", "c_r8_rslora_f16", "f_r8_patterns")),
        ]
    ):
        out = tmp_path / str(number)
        # Written by others, which say nothing of heads.
        given = ["--base-config", interop / "gguf" / "base.gguf"]
        status, _, err = lorameta("convert", source, "-o", out, "--to", "peft", *given)
        assert status == 0, err
        found, wanted = deltas(out), deltas(adapters / name)
        assert found.keys() == wanted.keys()
        for module, delta in wanted.items():
            np.testing.assert_allclose(found[module], delta, rtol=3e-6, atol=1e-6)


def test_what_a_gguf_file_needs_is_asked_for(lorameta, golden, adapters, tmp_path):
    out = tmp_path / "out"
    status, _, err = lorameta("convert", adapters / "a_r8", "-o", out, "--to", "gguf")
    assert status == 1
    assert "--base-config" in err
    source = golden / "interop" / "gguf" / "a_r8.global.gguf"
    status, _, err = lorameta("convert", source, "-o", out, "--to", "peft")
    assert status == 1
    assert "regroups these rows by heads" in err
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    given = ["--base-config", tmp_path / "config.json"]
    status, _, err = lorameta("convert", adapters / "a_r8", "-o", out, "--to", "gguf", *given)
    assert status == 1
    assert "heads" in err
    (tmp_path / "config.json").write_text('{"model_type": "tofu"}')
    status, _, err = lorameta("convert", adapters / "a_r8", "-o", out, "--to", "gguf", *given)
    assert status == 1
    assert "`model_type`" in err
    assert not out.exists()


def test_architectures_without_permuted_rows_need_no_heads(lorameta, adapters, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    given = ["--base-config", tmp_path / "config.json"]
    out = tmp_path / "out.gguf"
    assert lorameta("convert", adapters / "a_r8", "-o", out, "--to", "gguf", *given)[0] == 0
    assert _core.gguf_metadata(str(out))["general.architecture"] == "qwen2"
    (adapter,) = _core.open_adapters([str(out)])
    assert [module.name for module in adapter.layout.modules] == sorted(deltas(adapters / "a_r8"))


FITS = {
    "model_type": "mistral",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"hidden_size": 64}, "A of q_proj is 32 wide, expected the hidden size, 64"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, None),
        ({"head_dim": 16}, "q has 32 rows, expected 64, 4 heads of 16"),
        ({"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}, None),
        ({"head_dim": 16, "hidden_size": None}, "q has 32 rows"),
        ({"head_dim": None}, None),
        ({"hidden_size": None, "num_attention_heads": 8, "num_key_value_heads": 4}, None),
        ({"model_type": "qwen3", "head_dim": 4}, "q has 32 rows, expected 16"),
        ({"hidden_size": "32"}, "no hidden size"),
    ],
)
def test_a_base_of_another_size_is_refused(lorameta, adapters, tmp_path, changes, words):
    (tmp_path / "config.json").write_text(json.dumps(FITS | changes))
    out = tmp_path / "out.gguf"
    given = ["--base-config", tmp_path / "config.json"]
    status, _, err = lorameta("convert", adapters / "a_r8", "-o", out, "--to", "gguf", *given)
    assert (status, out.exists()) == ((0, True) if words is None else (1, False)), err
    assert (words or "") in err
    if words is not None and "size" not in words:
        assert str(adapters / "a_r8") in err


@pytest.mark.parametrize("model_type", ["gemma", "qwen3"])
def test_heads_that_are_larger_than_their_share_are_no_other_base(
    lorameta, make_bank, tmp_path, model_type
):
    modules = {
        f"model.layers.0.self_attn.{name}": shape
        for name, shape in (("q_proj", (32, 64)), ("k_proj", (32, 32)))
    }
    bank = make_bank(["a"], modules=modules).folder
    config = FITS | {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = ["--to", "gguf", "--base-config", tmp_path / "config.json"]
    status, _, err = lorameta("convert", bank / "a", "-o", tmp_path / "out.gguf", *given)
    assert status == 0, err


def test_a_gguf_base_of_another_size_is_refused(lorameta, golden, make_bank, tmp_path):
    modules = {"model.layers.0.self_attn.q_proj": (32, 48)}
    bank = make_bank({"rows": {"modules": modules}, "width": {}}).folder
    base = golden / "interop" / "gguf" / "base.gguf"
    for name, words in (("rows", "q has 48 rows, expected 32"), ("width", "q_proj is 24 wide")):
        command = ["convert", bank / name, "-o", tmp_path / name, "--to", "gguf"]
        status, _, err = lorameta(*command, "--base-config", base)
        assert (status, words in err) == (1, True), err


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("s_dora", "mlx", "use_dora"),
        ("s_head_saved", "gguf", "modules_to_save"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused(
    lorameta, adapters, base, tmp_path, name, to, words
):
    given = ["--base-config", base]
    status, _, err = lorameta(
        "convert", adapters / name, "-o", tmp_path / "out", "--to", to, *given
    )
    assert status == 1
    assert words in err
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_replaced_on_demand_alone(lorameta, adapters, base, tmp_path):
    for out in (tmp_path / "folder", tmp_path / "file.gguf"):
        command = ["convert", adapters / "a_r8", "-o", out, "--to", "gguf", "--base-config", base]
        assert lorameta(*command)[0] == 0
        status, _, err = lorameta(*command)
        assert (status, "exists" in err) == (1, True)
        assert lorameta(*command, "--force")[0] == 0
    command = ["convert", adapters / "a_r8", "-o", tmp_path / "x", "--to", "mlx"]
    status, _, err = lorameta(*command, "--dtype", "q8_0")
    assert (status, "only GGUF has it" in err) == (1, True)


def test_what_is_no_adapter_is_not_replaced(lorameta, golden, adapters, base, tmp_path):
    model, text = tmp_path / "model.gguf", tmp_path / "text.gguf"
    shutil.copy(golden / "interop" / "gguf" / "base.gguf", model)
    text.write_text("my notes")
    for out, words in ((model, "it is no adapter"), (text, "GGUF")):
        before = out.read_bytes()
        status, _, err = lorameta(
            *("convert", adapters / "a_r8", "-o", out, "--to", "gguf", "--base-config", base),
            "--force",
        )
        assert (status, words in err) == (1, True), err
        assert out.read_bytes() == before
    status, _, err = lorameta("convert", adapters, "-o", tmp_path / "b", "--to", "peft", "--force")
    assert (status, "not a bank" in err) == (2, True), err


def test_diffusers_and_kohya_names(lorameta, golden, base, tmp_path):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 6), (8, 4)))
    stem = "unet.down_blocks.0.attentions.0.to_q"
    tensors = {f"{stem}.lora.down.weight": a, f"{stem}.lora.up.weight": b}
    save_file(tensors, tmp_path / "diffusers.safetensors")
    out = tmp_path / "out"
    status, _, err = lorameta(
        "convert", tmp_path / "diffusers.safetensors", "-o", out, "--to", "peft"
    )
    assert status == 0, err
    found = deltas(out)
    np.testing.assert_allclose(found["down_blocks.0.attentions.0.to_q"], b @ a, rtol=1e-6)
    stem = "lora_unet_down_blocks_0_attentions_0_to_q"
    kohya = {
        f"{stem}.lora_down.weight": a,
        f"{stem}.lora_up.weight": b,
        f"{stem}.alpha": np.array(2.0, np.float32),
    }
    save_file(kohya, tmp_path / "kohya.safetensors")
    command = ["convert", tmp_path / "kohya.safetensors", "-o", tmp_path / "two", "--to", "peft"]
    status, _, err = lorameta(*command)
    assert status == 1
    assert "kohya's names" in err
    for given in (base / "config.json", golden / "interop" / "gguf" / "base.gguf"):
        status, _, err = lorameta(*command, "--base-config", given)
        assert status == 1
        assert f"`{given}` is no safetensors file: kohya's names need" in err


def test_folders_above_a_file_are_made_once_it_can_be_written(lorameta, adapters, base, tmp_path):
    out = tmp_path / "some" / "where" / "a.gguf"
    given = ["-o", out, "--to", "gguf", "--base-config", base]
    assert lorameta("convert", adapters / "s_head_saved", *given)[0] == 1
    assert not (tmp_path / "some").exists()
    status, _, err = lorameta("convert", adapters / "a_r8", *given)
    assert (status, out.is_file()) == (0, True), err


def write_bank(golden, base, folder):
    """Members that can be summed, as a bank with data."""
    for name in ("a_r8", "b_r8", "e_r16"):
        shutil.copytree(golden / "peft_combine" / "adapters" / name, folder / name)
        text = "\n".join(f"{name} says {i} things" for i in range(9))
        (folder / name / "train.txt").write_text(text)
    shutil.copy(golden / "paper" / "tokenizer" / "tokenizer.json", folder)
    return folder


def test_a_packed_bank_stands_on_its_own(lorameta, golden, base, tmp_path):
    bank = write_bank(golden, base, tmp_path / "bank")
    families = {"a_r8": 'so "called"', "e_r16": "größer"}
    lines = [f"{name} = {family!r}" for name, family in families.items()]
    text = "\n".join(["[families]", *lines, "[datasets]", "b_r8 = 'b_r8/train.txt'"])
    (bank / "bank.toml").write_text(text, encoding="utf-8")
    packed = tmp_path / "packed"
    command = ["convert", bank, "-o", packed, "--to", "gguf", "--base-config", base]
    status, _, err = lorameta(*command)
    assert status == 0, err
    assert sorted(path.name for path in packed.iterdir()) == [
        *("a_r8", "b_r8", "bank.toml", "e_r16", "tokenizer.json"),
    ]
    assert sorted(path.name for path in (packed / "a_r8").iterdir()) == [
        *("adapter.gguf", "fingerprint.safetensors"),
    ]
    here, there = Bank(bank), Bank(packed)
    make_fingerprints(here)
    assert here.names == there.names
    assert there.unfingerprinted() == {}
    assert there.base_model == here.base_model
    # The datasets stayed where they were, and the base is known from now on.
    assert (there.families, there.settings.datasets) == (families, {})
    assert there.base == {"architecture": "llama", "heads": 4, "kv_heads": 2}
    np.testing.assert_array_equal(here.fingerprints.counts, there.fingerprints.counts)
    status, _, err = lorameta("merge", packed, bank / "a_r8" / "train.txt", "-o", tmp_path / "out")
    assert status == 0, err
    assert lorameta("inspect", packed)[0] == 0


def test_a_bank_of_adapters_alone_is_packed_too(lorameta, golden, base, tmp_path):
    bank, packed = write_bank(golden, base, tmp_path / "bank"), tmp_path / "packed"
    for text in bank.glob("*/train.txt"):
        text.unlink()
    status, _, err = lorameta(
        *("convert", bank, "-o", packed, "--to", "gguf", "--base-config", base)
    )
    assert status == 0, err
    assert [path.name for path in (packed / "a_r8").iterdir()] == ["adapter.gguf"]
    command = ["merge", packed, "--weights", "a_r8=1", "-o", tmp_path / "out"]
    assert lorameta(*command)[0] == 0
    # Where others can be compared, one that cannot is left out, and named.
    (bank / "a_r8" / "train.txt").write_text("to be or not to be")
    again = tmp_path / "again"
    status, _, err = lorameta(
        *("convert", bank, "-o", again, "--to", "gguf", "--base-config", base)
    )
    assert (status, "b_r8" in err) == (0, True), err
    assert sorted(path.name for path in again.iterdir()) == ["a_r8", "bank.toml", "tokenizer.json"]


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_members_of_both_kinds_are_summed_alike(golden, base, tmp_path, lorameta, method):
    bank = write_bank(golden, base, tmp_path / "bank")
    mixed = tmp_path / "mixed"
    shutil.copytree(bank, mixed)
    shutil.rmtree(mixed / "b_r8")
    status, _, err = lorameta(
        *("convert", bank / "b_r8", "-o", mixed / "b_r8", "--to", "gguf", "--base-config", base)
    )
    assert status == 0, err
    coefficients = np.array([0.5, -0.3, 0.8])
    found = []
    for folder in (bank, mixed):
        out = tmp_path / f"{folder.name}-out"
        merge(Bank(folder), [Job(coefficients, out)], Options(method=method))
        found.append(deltas(out))
    assert found[0].keys() == found[1].keys()
    for module, delta in found[0].items():
        np.testing.assert_allclose(found[1][module], delta, rtol=1e-5, atol=1e-6)


def test_a_bank_of_q8_0_is_close(lorameta, golden, base, tmp_path):
    bank = write_bank(golden, base, tmp_path / "bank")
    packed = tmp_path / "packed"
    command = ["convert", bank, "-o", packed, "--to", "gguf", "--dtype", "q8_0"]
    assert lorameta(*command, "--base-config", base)[0] == 0
    dtypes = {module.dtypes for member in Bank(packed).members for module in member.modules}
    assert dtypes == {("Q8_0", "F16")}
    for name in ("a_r8", "e_r16"):
        back = tmp_path / f"{name}-back"
        assert lorameta("convert", packed / name, "-o", back, "--to", "peft")[0] == 0
        wanted = deltas(bank / name)
        for module, delta in deltas(back).items():
            error = np.linalg.norm(delta - wanted[module]) / np.linalg.norm(wanted[module])
            assert error < 0.01
