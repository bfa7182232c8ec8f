"""What the real llama.cpp and mlx-lm make of converted adapters, beside PEFT's recorded logits."""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from lorameta_rs.cli import commands

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
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel for this platform")
    ids, logits = recorded(golden)
    parameters = llama.CommonParams()
    parameters.model.path = str(golden / "interop" / "gguf" / "base.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 64, 1, 0
    parameters.warmup = False
    parameters.cache_type_k = parameters.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    disabled = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.flash_attn_type = disabled
    files = [converted(golden, name, tmp_path / f"{name}.gguf", "gguf") for name in ADAPTERS]
    parameters.lora_adapters = [llama.CommonAdapterLoraInfo(str(file), 0.0) for file in files]
    server = llama.Server(parameters)
    worst = 0.0
    for number, name in [(None, "base"), *enumerate(ADAPTERS)]:
        for row, prompt in enumerate(ids):
            body = {
                "prompt": prompt,
                "n_predict": 1,
                "temperature": -1.0,
                "n_probs": 64,
                "cache_prompt": False,
                "post_sampling_probs": False,
                "lora": [{"id": i, "scale": float(i == number)} for i in range(len(ADAPTERS))],
            }
            request = urllib.request.Request(
                f"{server.listening_address}/completion",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                (token,) = json.load(answer)["completion_probabilities"]
            got = {one["id"]: one["logprob"] for one in token["top_logprobs"]}
            wanted = log_softmax(logits[name][row, len(prompt) - 1].astype(np.float64))
            assert len(got) == 64
            worst = max(worst, *(abs(got[i] - wanted[i]) for i in range(64)))
    assert worst < 1e-4


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
