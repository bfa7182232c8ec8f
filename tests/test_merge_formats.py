"""`merge --format`: the same adapter for several runtimes, each folder whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorameta_rs import _core

WEIGHTS = "adapter_model.safetensors"
HALVES = ("a_r8=0.5", "b_r8=0.5")


@pytest.fixture
def merged(lorameta, golden, peft_bank, tmp_path):
    def run(out, *words, base=True):
        options = [word for half in HALVES for word in ("--weights", half)]
        if base:
            options += ["--base-config", golden / "peft_combine" / "base"]
        given = ["--method", "soup", "--base-model", "any", *words]
        return lorameta("merge", peft_bank, "-o", tmp_path / out, *options, *given)

    return run


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_each_format_gets_a_folder(merged, lorameta, tmp_path):
    every = [word for to in ("gguf", "mlx", "peft") for word in ("--format", to)]
    status, said, err = merged("all", *every)
    assert status == 0, err
    assert merged("alone")[0] == 0
    kept = {"README.md", "lorameta.json"}
    assert names(tmp_path / "all") == {"gguf", "mlx", "peft"}
    peft = {"adapter_config.json", WEIGHTS}
    assert names(tmp_path / "all" / "peft") == kept | peft
    assert names(tmp_path / "all" / "gguf") == kept | {"adapter.gguf"}
    assert names(tmp_path / "all" / "mlx") == kept | {"adapter_config.json", "adapters.safetensors"}
    wanted = load_file(tmp_path / "alone" / WEIGHTS)
    for to in ("gguf", "mlx"):
        back = tmp_path / f"back-{to}"
        assert lorameta("convert", tmp_path / "all" / to, "-o", back, "--to", "peft")[0] == 0
        for name, tensor in load_file(back / WEIGHTS).items():
            np.testing.assert_array_equal(tensor, wanted[name], err_msg=f"{to} {name}")
    for runtime in ("transformers", "vLLM", "llama.cpp", "Ollama", "MLX"):
        assert f"{runtime}: " in said + err
    # Each card names this very output, and what is run lies where the card says.
    for to, run in (
        ("peft", 'from_pretrained(model, "all/peft")'),
        ("peft", "--lora-modules all=all/peft"),
        ("gguf", "--lora all/gguf/adapter.gguf"),
        ("gguf", "ollama create all"),
        ("mlx", "--adapter-path all/mlx"),
    ):
        card = (tmp_path / "all" / to / "README.md").read_text()
        assert "\n# all\n" in card
        assert run in card
        assert f"--repeat all/{to}/lorameta.json" in card


@pytest.mark.parametrize(
    ("to", "has", "command"),
    [("gguf", "adapter.gguf", "llama-cli"), ("mlx", "adapters.safetensors", "mlx_lm.chat")],
)
def test_one_format_is_the_folder(merged, tmp_path, to, has, command):
    assert merged("one", "--format", to)[0] == 0
    assert has in names(tmp_path / "one")
    assert WEIGHTS not in names(tmp_path / "one")
    card = (tmp_path / "one" / "README.md").read_text()
    assert command in card
    assert "PeftModel" not in card
    assert str(tmp_path) not in card.split("## Use")[1]  # it holds wherever the folder is moved
    assert merged("one", "--format", to)[0] != 0
    assert merged("one", "--format", to, "--force")[0] == 0


@pytest.mark.parametrize("formats", [("gguf",), ("mlx",), ("gguf", "peft")])
def test_what_the_card_says_makes_the_same_again(merged, lorameta, tmp_path, formats):
    assert merged("once", *(word for to in formats for word in ("--format", to)))[0] == 0
    where = "once" if len(formats) == 1 else "once/gguf"
    repeat = ["merge", "--repeat", tmp_path / where / "lorameta.json", "-o"]
    status, _, err = lorameta(*repeat, tmp_path / "again")
    assert status == 0, err
    for path in (path for path in (tmp_path / "once").rglob("*") if path.is_file()):
        again = tmp_path / "again" / path.relative_to(tmp_path / "once")
        if path.suffix == ".md":
            assert again.exists()
        else:
            assert again.read_bytes() == path.read_bytes(), path.name
    # What is said on the command line is done; the base is still known.
    status, _, err = lorameta(*repeat, tmp_path / "other", "--format", "gguf")
    assert status == 0, err
    assert "adapter.gguf" in names(tmp_path / "other")


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mistral"}, "say how many heads"),
        ({"model_type": "mistral", "num_attention_heads": 7, "num_key_value_heads": 7}, "heads"),
    ],
)
def test_a_base_that_does_not_do_is_refused_before_the_sum(
    merged, tmp_path, monkeypatch, how, config, words
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(_core, "combine", None)  # calling it would be a traceback
    given = ("--format", "gguf", "--base-config", tmp_path / "config.json", *how)
    status, _, err = merged("none", *given, base=False)
    assert (status, words in err) == (1, True), err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_gguf_without_a_base_writes_nothing(merged, tmp_path, how):
    status, _, err = merged("none", "--format", "peft", "--format", "gguf", *how, base=False)
    assert status == 1
    assert "--base-config" in err
    assert not (tmp_path / "none").exists()
