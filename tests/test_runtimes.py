"""The commands that run a result: right for its base, its place and its rank."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Adapter

from lorameta_rs.runtimes import (
    commands,
    gguf_commands,
    mlx_command,
    transformers_code,
    vllm_command,
)

MODULES = {f"model.layers.0.self_attn.{name}": (24, 24) for name in ("q_proj", "k_proj", "v_proj")}


@pytest.mark.parametrize(("rank", "most"), [(1, None), (16, None), (17, "32"), (300, "320")])
def test_vllm_is_told_a_rank_over_its_own(rank, most):
    words = shlex.split(vllm_command("org/base", "mine", "a b/mine", rank))
    assert words[:4] == ["vllm", "serve", "org/base", "--enable-lora"]
    assert words[-2:] == ["--lora-modules", "mine=a b/mine"]
    assert words[4:-2] == ([] if most is None else ["--max-lora-rank", most])


def test_what_vllm_does_not_load_has_no_command():
    assert vllm_command("org/base", "mine", "mine", 513) is None
    assert list(commands("peft", "org/base", Path("mine"), 513)) == ["transformers"]


def test_transformers_code_is_python():
    code = transformers_code('a "quoted" base', "c:\\out")
    compile(code, "code", "exec")
    assert '"a \\"quoted\\" base"' in code
    assert '"BASE"' in transformers_code(None, "out")


def test_ollamas_modelfile_is_written_as_it_is(tmp_path):
    base, adapter = tmp_path / "it's a %s base.gguf", tmp_path / "mine.gguf"
    lines = gguf_commands(base, adapter)
    assert shlex.split(lines["llama.cpp"]) == ["llama-cli", "-m", str(base), "--lora", str(adapter)]
    written, create = lines["Ollama"].split(" && ")
    assert create == "ollama create mine"
    subprocess.run(["sh", "-c", written], cwd=tmp_path, check=True)
    assert (tmp_path / "Modelfile").read_text() == f"FROM {base}\nADAPTER {adapter}\n"


def test_a_base_that_is_not_known_is_left_open(tmp_path):
    assert "-m ./BASE.gguf" in gguf_commands(None, tmp_path / "x.gguf")["llama.cpp"]
    assert "--model BASE " in mlx_command(None, tmp_path)["MLX"]


@pytest.mark.parametrize(
    ("to", "expected"),
    [("gguf", "--lora {out}/adapter.gguf"), ("mlx", "--adapter-path {out}"), ("peft", "{out}")],
)
def test_convert_says_how_to_run_its_result(lorameta, golden, tmp_path, to, expected):
    adapter = golden / "peft_combine" / "adapters" / "a_r8"
    base = golden / "interop" / "gguf" / "base.gguf"
    out = tmp_path / "out"
    status, said, err = lorameta("convert", adapter, "-o", out, "--to", to, "--base-config", base)
    assert status == 0
    assert expected.format(out=out) in said + err
    assert (f"-m {base}" in said + err) == (to == "gguf")


def test_merge_says_how_to_run_its_result(lorameta, tmp_path):
    bank = tmp_path / "bank"
    for name in ("x", "y"):
        Adapter(seed=0, modules=MODULES, rank=12).write(bank / name)
    out = tmp_path / "out"
    sum_of = ["--weights", "x=1", "--weights", "y=0.5", "--method"]
    status, said, err = lorameta("merge", bank, *sum_of, "cat", "-o", out)
    assert status == 0
    command = f"--enable-lora --max-lora-rank 32 --lora-modules out={out}"
    assert "vLLM refuses rank 24 unless it is started with --max-lora-rank 32" in err
    assert command in said + err
    assert "PeftModel.from_pretrained(model, " in said + err
    assert f"convert {out} -o {out}.gguf --to gguf --base-config BASE" in said + err
    card = (out / "README.md").read_text()
    assert "--max-lora-rank 32 --lora-modules out=out" in card
    status, said, err = lorameta("merge", bank, *sum_of, "soup", "-o", tmp_path / "small")
    assert status == 0
    assert "vLLM refuses" not in err
    assert "--max-lora-rank" not in said + err


def test_a_command_that_would_be_refused_is_not_said(lorameta, peft_bank, tmp_path):
    given = ["--weights", "s_embed=1", "--method", "soup", "-o", tmp_path / "out"]
    status, said, err = lorameta("merge", peft_bank, *given)
    assert status == 0, err
    assert "vLLM serves linear layers alone" in err
    assert "PeftModel.from_pretrained(model, " in said + err
    for text in (said + err, (tmp_path / "out" / "README.md").read_text()):
        assert "vllm serve" not in text


def test_the_card_has_the_base_that_was_given(lorameta, golden, peft_bank, tmp_path, monkeypatch):
    base = tmp_path / "models" / "base.gguf"
    base.parent.mkdir()
    shutil.copy(golden / "interop" / "gguf" / "base.gguf", base)
    monkeypatch.chdir(tmp_path)
    given = ["--weights", "a_r8=1", "--method", "soup", "--format", "gguf", "--base-config"]
    for out, path, seen in (
        ("out", "models/base.gguf", "./models/base.gguf"),
        ("in/out", "models/base.gguf", "./../models/base.gguf"),
        ("whole", base, base),
    ):
        assert lorameta("merge", peft_bank, *given, path, "-o", out)[0] == 0
        card = (tmp_path / out / "README.md").read_text()
        assert f"llama-cli -m {seen} --lora {Path(out).name}/adapter.gguf" in card
