"""The servers' rules: what breaks each is said, naming the server, and what breaks none is not."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from conftest import ATTENTION, Adapter

from lorameta_rs.member import open_members
from lorameta_rs.servers import RULES, breaches, vllm_rank

FULL = {
    f"model.layers.{layer}.self_attn.{name}": (24, 24)
    for layer in (0, 1)
    for name in ("q_proj", "k_proj", "v_proj")
}


def said(folder, modules=FULL, rank=2, **config):
    Adapter(seed=0, modules=modules, rank=rank, config=config).write(folder / "x")
    (member,) = open_members([folder / "x"])
    return breaches(member)


def test_an_adapter_that_every_server_loads(tmp_path):
    assert said(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rank": 24}, ["vLLM refuses rank 24 unless it is started with --max-lora-rank 32"]),
        ({"rank": 600}, ["vLLM loads no rank over 512: this is 600"]),
        (
            {"alpha_pattern": {"q_proj": 9}},
            [f"{server} does not read `alpha_pattern`" for server in ("vLLM", "SGLang", "LoRAX")]
            + ["Ollama does not read `alpha_pattern`"],
        ),
        ({"use_rslora": True}, ["SGLang does not read `use_rslora`", "Ollama does not read"]),
        ({"lora_alpha": 4.5}, ["Ollama reads no `lora_alpha` but an integer: this is 4.5"]),
        ({"target_modules": None}, ["vLLM requires `target_modules`", "SGLang requires"]),
        (
            {"modules": ATTENTION},
            ["SGLang requires q, k and v of a layer together: `model.layers.0.self_attn` has no"],
        ),
        (
            {"modules": FULL | {"model.layers.1.self_attn.o_proj": (24, 24)}},
            ["LoRAX drops `o_proj` everywhere, because `model.layers.0.self_attn` does not have"],
        ),
    ],
    ids=str,
)
def test_what_breaks_a_rule_is_said(tmp_path, changes, expected):
    found = said(tmp_path, **changes)
    assert len(found) == len(expected)
    for text, begin in zip(found, expected, strict=True):
        assert text.startswith(begin)


def test_the_time_grows_as_the_modules_do():
    """Each block of its own kind: comparing all with all would take minutes."""
    modules = [SimpleNamespace(name=f"layers.{i}.block{i}.q_proj") for i in range(30_000)]
    begun = time.process_time()
    every_layer = next(rule for rule in RULES if rule.breach.__name__ == "_every_layer")
    assert every_layer.of(SimpleNamespace(modules=modules)) is None
    assert time.process_time() - begun < 5


def test_an_embedding_is_named(golden):
    (member,) = open_members([golden / "peft_combine" / "adapters" / "s_embed"])
    kinds = [text for text in breaches(member) if "linear layers alone" in text]
    assert [text.split()[0] for text in kinds] == ["vLLM", "SGLang", "LoRAX"]
    assert "embed_tokens` is embedding" in kinds[0]


def test_patterns_that_change_no_scaling_break_nothing(tmp_path):
    assert said(tmp_path, alpha_pattern={"q_proj": 4}) == []  # as all have


def test_vllm_ranks():
    assert [vllm_rank(rank) for rank in (1, 16, 17, 257, 512, 513)] == [8, 16, 32, 320, 512, None]


def test_inspect_says_the_same(lorameta, tmp_path):
    Adapter(seed=0, modules=FULL, rank=24).write(tmp_path / "bank" / "x")
    status, out, err = lorameta("inspect", tmp_path / "bank" / "x", "--no-data")
    assert status == 0
    assert "vLLM refuses rank 24" in err
    _, out, _ = lorameta("inspect", tmp_path / "bank" / "x", "--no-data", "--json")
    assert json.loads(out)["adapters"][0]["servers"][0].startswith("vLLM refuses rank 24")
    _, _, err = lorameta("inspect", tmp_path / "bank", "--no-data")
    assert "vLLM" not in err  # a bank's members are not served
