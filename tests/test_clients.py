"""What the real llama.cpp and mlx-lm make of converted adapters, beside PEFT's recorded logits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from lorameta_rs.cli import commands
from lorameta_rs.llama import Llama

ADAPTERS = (
    *("a_r8", "b_r8", "c_r8_rslora_f16", "d_r4_bf16", "e_r16", "f_r8_patterns", "g_r8_qv_only"),
    *("h_r8_bf16", "i_r8_patterns", "j_r4_pattern_up"),
)


def converted(golden, name, out, to):
    source = golden / "peft_combine" / "adapters" / name
    base = golden / "interop" / "gguf" / "base.gguf"
    arguments = ["convert", source, "-o", out, "--to", to, "--base-config", base]
    done = CliRunner().invoke(commands, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


def recorded(golden):
    ids = json.loads((golden / "peft_combine" / "manifest.json").read_text())["input_ids"]
    return ids, load_file(golden / "peft_combine" / "forward_logits.safetensors")


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_llama_cpp_gives_pefts_logits(golden, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel for this platform")
    ids, logits = recorded(golden)
    files = [converted(golden, name, tmp_path / f"{name}.gguf", "gguf") for name in ADAPTERS]
    base = golden / "interop" / "gguf" / "base.gguf"
    with Llama(base, files, context=64, slots=1) as llama:
        worst = max(
            differences(llama, number, ids, logits[name])
            for number, name in [(None, "base"), *enumerate(ADAPTERS)]
        )
    assert worst < 1e-4


def differences(llama, number, ids, logits):
    """How far the log-probabilities of the whole vocabulary are from PEFT's, at most.

    The server tells those of what it says next: so it is asked at each position.
    """
    worst = 0.0
    places = [(row, place) for row in range(len(ids)) for place in range(len(ids[row]))]
    for row, place in places:
        body = {
            "prompt": ids[row][: place + 1],
            "n_predict": 1,
            "temperature": -1.0,
            "n_probs": 64,
            "cache_prompt": False,
            "lora": [{"id": i, "scale": float(i == number)} for i in range(len(ADAPTERS))],
        }
        (token,) = llama._post("completion", body)["completion_probabilities"]
        got = {one["id"]: one["logprob"] for one in token["top_logprobs"]}
        wanted = log_softmax(logits[row][place].astype(np.float64))
        assert len(got) == 64
        worst = max(worst, *(abs(got[i] - wanted[i]) for i in range(64)))
    return worst


@pytest.mark.parametrize("name", ADAPTERS)
def test_mlx_gives_pefts_logits(golden, tmp_path, name):
    mlx = pytest.importorskip("mlx.core", reason="mlx is not installed, or not for this platform")
    tuner = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    ids, logits = recorded(golden)
    model, _ = tuner.load_model(golden / "peft_combine" / "base")
    folder = converted(golden, name, tmp_path / name, "mlx")
    model = tuner.load_adapters(model, str(folder))
    model.eval()
    got = np.array(model(mlx.array(ids)).astype(mlx.float32))
    np.testing.assert_allclose(got, logits[name], atol=1e-4)
