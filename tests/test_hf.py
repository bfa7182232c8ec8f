"""A Hugging Face folder as the base: what it answers, and what is said where it cannot run."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lorameta_rs import hf
from lorameta_rs.errors import InvalidSetting, MissingExtra, MissingFile
from lorameta_rs.hf import HuggingFace

LACKING = [name for name in ("torch", "transformers", "peft") if not importlib.util.find_spec(name)]
needs_extra = pytest.mark.skipif(
    bool(LACKING), reason=f"{', '.join(LACKING)} of the extra `hf` not installed"
)


@pytest.fixture
def folder(golden):
    return golden / "peft_combine"


@pytest.fixture
def base(folder, tmp_path):
    """The base with a tokenizer that has a word for each of its ids."""
    shutil.copytree(folder / "base", tmp_path / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "base" / "tokenizer.json"))
    return tmp_path / "base"


def test_without_the_extra_the_command_that_installs_it_is_said(
    lorameta, base, folder, monkeypatch
):
    monkeypatch.setattr(hf, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"torch, .*pip install 'lorameta-rs\[hf\]'"):
        HuggingFace(base).__enter__()
    status, _, err = lorameta("try", base, folder / "adapters" / "a_r8", "--prompt", "w5")
    assert (status, "pip install 'lorameta-rs[hf]'" in err) == (1, True)


@needs_extra
def test_answers_are_the_likeliest_tokens_of_the_recorded_logits(folder, base):
    prompts = json.loads((folder / "manifest.json").read_text())["input_ids"]
    logits = load_file(folder / "forward_logits.safetensors")
    names = ["a_r8", "c_r8_rslora_f16", "f_r8_patterns"]
    # Of different lengths, so that a batch has to be filled up.
    asked = [prompts[0], prompts[1][:-3]]
    told = []
    with HuggingFace(base, [folder / "adapters" / name for name in names]) as model:
        for number, name in enumerate(["base", *names]):
            scales = [float(i == number - 1) for i in range(len(names))]
            found = model.answers(asked, scales, 1, told.append)
            firsts = [logits[name][0][-1].argmax(), logits[name][1][-4].argmax()]
            assert found == [(f"w{first}", [int(first)]) for first in firsts]
        assert model.answers(asked, (), 4) == model.answers(asked, (0, 0, 0), 4)
        assert model.answers(asked, (1, 0, 0), 4) != model.answers(asked, (-3, 0, 2), 4)
        with pytest.raises(InvalidSetting, match="1 scales for 3 adapters"):
            model.answers(asked, (1.0,))
        with pytest.raises(InvalidSetting, match="no token"):
            model.answers([[]])
        with pytest.raises(InvalidSetting, match="context"):
            model.answers([[1] * 60], (), 1 << 20)
    assert told == [2] * 4


@needs_extra
def test_what_does_not_load_is_named(base, folder, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(MissingFile, match=r"config\.json"):
        HuggingFace(tmp_path / "none").__enter__()
    (tmp_path / "none" / "config.json").write_text('{"model_type": "tofu"}')
    with pytest.raises(InvalidSetting, match="transformers does not load it"):
        HuggingFace(tmp_path / "none").__enter__()
    with pytest.raises(InvalidSetting, match="none"):
        HuggingFace(base, [tmp_path / "none"]).__enter__()


@needs_extra
@pytest.mark.parametrize("kind", ["peft", "gguf"])
def test_the_answers_are_those_of_llama_cpp(lorameta, base, folder, golden, tmp_path, kind):
    pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel for this platform")
    gguf = golden / "interop" / "gguf"
    adapter = {"peft": folder / "adapters" / "a_r8", "gguf": gguf / "a_r8.folded.gguf"}[kind]
    questions = [f"w{i} w{i + 5} w17" for i in range(5, 15)]
    command = [word for text in questions for word in ("--prompt", text)]
    command += ["--tokenizer", base / "tokenizer.json", "--most-tokens", "6", "--json"]
    said = []
    for model in (base, gguf / "base.gguf"):
        status, out, err = lorameta("try", model, adapter, *command)
        assert (status, err) == (0, "")
        said.append([list(row["answers"].values()) for row in json.loads(out)])
    assert said[0] == said[1]
