"""One adapter folder: the answer to every malformed one, and what a usable one gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference

from lorameta_rs import Bank
from lorameta_rs.errors import (
    InvalidAdapter,
    LayoutMismatch,
    LoraMetaError,
    MissingFile,
    NotFinite,
)
from lorameta_rs.member import Member, open_members
from lorameta_rs.merge import Job, Options, merge

MALFORMED = Path(__file__).parent / "golden" / "malformed"
WEIGHTS = "adapter_model.safetensors"

# Faults of the numbers and of the company are seen when they matter, not when a folder is opened.
SEEN_LATER = {"inf_in_A", "zero_B", "config_base_other", "config_base_same_other_spelling"}

# Where our message names something else than the manifest asks for, and why.
NAMED_OTHERWISE = {
    # All modules have the wrong rank; the first by name is named.
    "rank_file_vs_config": ["k_proj", "r", "4", "2"],
}


def entries(*, usable):
    text = (MALFORMED / "adapters.json").read_text(encoding="utf-8")
    named = [(Path(entry["path"]).name, entry) for entry in json.loads(text)["entries"]]
    return [
        pytest.param(name, entry, id=name)
        for name, entry in named
        if usable == (entry["expect"] != "error" or name in SEEN_LATER)
    ]


def opened(folder):
    (answer,) = open_members([folder])
    return answer


@pytest.mark.parametrize(("name", "entry"), entries(usable=False))
def test_malformed_is_refused(name, entry):
    folder = MALFORMED / entry["path"]
    error = opened(folder)
    assert isinstance(error, LoraMetaError)
    assert str(error).startswith(f"`{folder}")
    said = str(error).replace(str(folder), "")
    for expected in NAMED_OTHERWISE.get(name, entry["message_should_name"]):
        assert expected in said


@pytest.mark.parametrize(("name", "entry"), entries(usable=True))
def test_malformed_is_usable(name, entry, tmp_path):
    member = opened(MALFORMED / entry["path"])
    assert isinstance(member, Member)
    notes = "\n".join(member.notes)
    assert bool(notes) == (entry["expect"] == "warn" and name not in SEEN_LATER)
    # And it is what a merge of nothing else gives.
    shutil.copytree(MALFORMED / entry["path"], tmp_path / "bank" / name)
    bank = Bank(tmp_path / "bank")
    bank.merge([1.0], tmp_path / "out", allow_nan=name == "inf_in_A")
    said = "\n".join(bank.notes)
    if not name.startswith("config_base"):  # which are odd beside others alone
        for expected in entry["message_should_name"]:
            assert expected in said
    got, _ = reference.read(tmp_path / "out" / WEIGHTS)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    stored, _ = reference.read(MALFORMED / entry["path"] / WEIGHTS)
    scalings = dict(zip([one.name for one in member.modules], member.scalings, strict=True))
    assert len(got) == len(stored)
    for tensor, numbers in stored.items():
        written = tensor.replace(".default", "")
        module = written.removeprefix("base_model.model.").partition(".lora_")[0]
        strength = scalings[module] / scaling if "_B" in tensor else 1.0
        found = got[f"base_model.model.{written.removeprefix('base_model.model.')}"]
        np.testing.assert_allclose(found, numbers * strength, rtol=2**-22)


def test_infinity_is_named_when_it_is_summed(tmp_path):
    shutil.copytree(MALFORMED / "adapters" / "inf_in_A", tmp_path / "bank" / "inf_in_A")
    with pytest.raises(NotFinite) as caught:
        Bank(tmp_path / "bank").merge([1.0], tmp_path / "out")
    tensor = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for said in (str(tmp_path / "bank" / "inf_in_A" / WEIGHTS), tensor, "Inf as a float32"):
        assert said in str(caught.value)


def test_what_is_wrong_comes_with_what_to_do(make_bank):
    written = make_bank(["a", "b"])
    config = written.folder / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 3'))
    written.weights("b").write_bytes(written.weights("b").read_bytes()[:-4])
    a, b = open_members([written.folder / "a", written.folder / "b"])
    assert str(a).endswith("have rank 2\ntake both files from where one adapter was saved")
    assert str(b).endswith("cut short?\ncopy the file again, or save it again")


def test_the_base_model_is_judged_in_company(tmp_path):
    for name in ("ok", "config_crlf", "config_base_other", "config_base_same_other_spelling"):
        shutil.copytree(MALFORMED / "adapters" / name, tmp_path / name)
    bank = Bank(tmp_path)
    assert bank.names == ["config_base_same_other_spelling", "config_crlf", "ok"]
    error = bank.left_out["config_base_other"]
    assert isinstance(error, LayoutMismatch)
    config = tmp_path / "config_base_other" / "adapter_config.json"
    assert str(error).startswith(f"`{config}`: `base_model_name_or_path` is")
    (note,) = bank.notes
    assert "`config_base_same_other_spelling`: `base_model_name_or_path` is" in note


def test_a_member(make_bank):
    patterns = {"alpha_pattern": {"v_proj": 6}, "use_rslora": True, "lora_alpha": 8}
    written = make_bank(["a"], rank=4, config=patterns)
    member = opened(written.folder / "a")
    assert (member.name, member.folder) == ("a", written.folder / "a")
    assert [module.name for module in member.modules] == [
        f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"
    ]
    assert member.ranks == {4}
    assert member.scalings == [4.0, 3.0, 4.0, 3.0]
    assert member.notes == ()


def test_folders_are_answered_in_their_order(make_bank, tmp_path):
    written = make_bank()
    (written.folder / "b" / "adapter_config.json").unlink()
    written.weights("c").write_bytes(b"PK\x03\x04 and so on")
    a, b, c, gone = open_members([*(written.folder / name for name in "abc"), tmp_path / "gone"])
    assert isinstance(a, Member)
    assert isinstance(b, MissingFile)
    assert b.filename == str(written.folder / "b" / "adapter_config.json")
    assert isinstance(c, InvalidAdapter)
    assert "a torch archive (a pickle, which is never opened)" in str(c)
    assert isinstance(gone, MissingFile)
    assert gone.filename == str(tmp_path / "gone")


def test_a_pickle_is_never_opened(make_bank, tmp_path):
    """Neither alone, nor under the other name; opening it would leave a trace."""
    trace = tmp_path / "trace"
    pickle = f"cos\nsystem\n(S'touch {trace}'\ntR.".encode()
    written = make_bank(["a", "b"])
    written.weights("a").rename(written.folder / "a" / "adapter_model.bin")
    (written.folder / "a" / "adapter_model.bin").write_bytes(pickle)
    written.weights("b").write_bytes(pickle)
    a, b = open_members([written.folder / "a", written.folder / "b"])
    assert "holds only `adapter_model.bin`, a pickle, which is never opened" in str(a)
    assert isinstance(b, InvalidAdapter)
    assert not trace.exists()


def mixed_bank(golden, folder):
    """Members of PEFT and of llama.cpp's converter; their A and s B, in float64, by module.

    The converter's files do not say how many heads there are: `bank.toml` does.
    """
    interop, peft = golden / "interop" / "gguf", golden / "peft_combine" / "adapters"
    wanted = {}
    for name, file, dtype, scaling in (
        ("alpha", "a_r8.f16.gguf", "F16", 16 / 8),
        ("coarse", "a_r8.BF16.gguf", "BF16", 16 / 8),
        ("folded", "c_r8_rslora_f16.folded.gguf", "F32", 16 / 8**0.5),
        ("peft", None, "F32", 8 / 8),
    ):
        source = peft / {"coarse": "a_r8", "peft": "b_r8"}.get(name, (file or "").partition(".")[0])
        if file is None:
            shutil.copytree(source, folder / name)
        else:
            (folder / name).mkdir(parents=True)
            shutil.copy(interop / file, folder / name)
        tensors, _ = reference.read(source / WEIGHTS)
        config = json.loads((source / "adapter_config.json").read_text())
        assert config["r"] == 8
        assert reference.scaling(config, "model.layers.0.self_attn.q_proj") == scaling
        wanted[name] = {
            tensor: reference.stored(numbers, dtype) * (scaling if "lora_B" in tensor else 1.0)
            for tensor, numbers in tensors.items()
        }
    (folder / "bank.toml").write_text('[base]\nconfig = "base"\n')
    shutil.copytree(golden / "peft_combine" / "base", folder / "base")
    return wanted


def products(factors, scaling=1.0):
    return {
        tensor: scaling * factors[tensor.replace("lora_A", "lora_B")] @ a
        for tensor, a in factors.items()
        if "lora_A" in tensor
    }


@pytest.mark.parametrize("method", ["soup", "cat", "svd"])
def test_members_of_both_formats_are_summed(golden, tmp_path, method):
    wanted = mixed_bank(golden, tmp_path / "bank")
    bank = Bank(tmp_path / "bank")
    assert bank.names == ["alpha", "coarse", "folded", "peft"]
    coefficients = np.array([0.5, -0.2, 0.3, 0.9])
    whole = Options(method=method, rank=32 if method == "svd" else None)
    merge(bank, [Job(coefficients, tmp_path / "out")], whole)
    made, _ = reference.read(tmp_path / "out" / WEIGHTS)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    found = products(made, config["lora_alpha"] / config["r"])
    if method == "soup":
        expected = products(reference.soup(wanted.values(), coefficients))
    else:
        expected = reference.soup(map(products, wanted.values()), coefficients)
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        np.testing.assert_allclose(found[module], delta, rtol=1e-5, atol=1e-5)


def test_a_gguf_member_that_cannot_be_read_is_left_out(golden, tmp_path):
    folder = tmp_path / "bank"
    mixed_bank(golden, folder)
    file = folder / "alpha" / "a_r8.f16.gguf"
    file.write_bytes(file.read_bytes()[:-100])
    shutil.copy(golden / "interop" / "gguf" / "base.gguf", folder / "folded")
    (folder / "bank.toml").unlink()
    bank = Bank(folder)
    assert bank.names == ["peft"]
    said = {name: str(error) for name, error in bank.left_out.items()}
    assert "cut short?" in said["alpha"]
    assert "regroups these rows by heads" in said["coarse"]
    assert "`--base-config`" in said["coarse"]
    assert "holds 2 GGUF files (`base.gguf`, `c_r8_rslora_f16.folded.gguf`)" in said["folded"]
