"""GGUF headers: what is read of a sound one, and what is said of those that lie."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from lorameta_rs import _core
from lorameta_rs.errors import InvalidAdapter, LoraMetaError, MissingFile

TEXT, U32, F32, LIST = 8, 4, 6, 9
KEYS = {
    "general.architecture": (TEXT, "qwen2"),
    "general.type": (TEXT, "adapter"),
    "adapter.type": (TEXT, "lora"),
    "adapter.lora.alpha": (F32, 4.0),
}
TENSORS = {
    "blk.0.attn_q.weight.lora_a": ([32, 2], 0, None),
    "blk.0.attn_q.weight.lora_b": ([2, 8], 0, None),
}
SIZES = {0: 4, 1: 2, 28: 8}


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key, kind, value):
    packed = {
        TEXT: lambda: text(value),
        U32: lambda: struct.pack("<I", value),
        F32: lambda: struct.pack("<f", value),
    }
    return text(key) + struct.pack("<I", kind) + packed.get(kind, lambda: value)()


def gguf(keys=KEYS, tensors=TENSORS, magic=b"GGUF", version=3, counts=None, tail=b"", pairs=None):
    """A file, with what the arguments change."""
    pairs = list(keys.items()) if pairs is None else pairs
    n_tensors, n_keys = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys)
    head += b"".join(entry(key, kind, value) for key, (kind, value) in pairs)
    offset, data = 0, b""
    for name, (shape, kind, given) in tensors.items():
        place = offset if given is None else given
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, place)
        size = int(np.prod(shape, dtype=object)) * SIZES.get(kind, 1)
        if size < 1 << 20:
            data += np.arange(size // 4, dtype="<f4").tobytes().ljust(size, b"\0")
            data += b"\0" * (-len(data) % 32)
        offset = len(data)
    return head + b"\0" * (-len(head) % 32) + data + tail


def opened(tmp_path, content):
    path = tmp_path / "adapter.gguf"
    path.write_bytes(content)
    (answer,) = _core.open_adapters([str(path)])
    return answer


def test_a_sound_file_is_read(tmp_path):
    adapter = opened(tmp_path, gguf())
    assert adapter.container == "gguf"
    assert adapter.metadata["adapter.lora.alpha"] == 4.0
    (module,) = adapter.layout.modules
    assert (module.name, module.rank) == ("model.layers.0.self_attn.q_proj", 2)
    assert (module.a_shape, module.b_shape) == ([2, 32], [8, 2])


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    content = gguf()
    for end in range(0, len(content), 5):
        answer = opened(tmp_path, content[:end])
        assert isinstance(answer, InvalidAdapter), end
        assert "adapter.gguf" in str(answer)


def changed(name, **changes):
    shape, kind, place = TENSORS[name]
    return TENSORS | {
        name: (
            changes.get("shape", shape),
            changes.get("kind", kind),
            changes.get("place", place),
        )
    }


A, B = TENSORS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gguf(version=1), "GGUF version 1"),
        (gguf(version=3 << 24), "big-endian"),
        (gguf(counts=(2**60, 4)), "claims 1152921504606846976 tensors"),
        (gguf(counts=(2, 2**60)), "claims 1152921504606846976 keys"),
        (gguf(pairs=[*KEYS.items(), ("adapter.type", (TEXT, "lora"))]), "stands there twice"),
        (gguf(KEYS | {"x": (13, b"")}), "unknown type 13"),
        (gguf(KEYS | {"x": (LIST, struct.pack("<IQ", LIST, 1))}), "list of lists"),
        (gguf(KEYS | {"x": (LIST, struct.pack("<IQ", U32, 2**62))}), "the header ends early"),
        (gguf(KEYS | {"x": (LIST, struct.pack("<IQ", 99, 1))}), "list of the unknown type 99"),
        (gguf(KEYS | {"x": (7, b"\2")}), "expected 0 or 1"),
        (gguf(KEYS | {"general.architecture": (U32, 3)}), "`general.architecture` is missing"),
        (gguf(KEYS | {"general.type": (TEXT, "model")}), "general.type is `model`"),
        (gguf(KEYS | {"adapter.type": (TEXT, "loha")}), "adapter.type is `loha`"),
        (gguf(KEYS | {"adapter.lora.alpha": (F32, float("nan"))}), "not a finite number"),
        (gguf(KEYS | {"general.architecture": (TEXT, b"\xff")}), "not UTF-8"),
        (gguf(KEYS | {"general.alignment": (U32, 3)}), "not a power of two"),
        (gguf(tensors=changed(A, kind=2)), "2 (Q4_0), expected F32"),
        (gguf(tensors=changed(B, kind=8)), "rows of 2 numbers in blocks of 32"),
        (gguf(tensors=changed(A, shape=[2**62, 2**62])), "is too large"),
        (gguf(tensors=changed(A, shape=[2**40, 2])), "cut short?"),
        (gguf(tensors=changed(B, place=2**64 - 8)), "is too large"),
        (gguf(tensors=changed(A, shape=[])), "0 dimensions"),
        (gguf(tensors=changed(A, shape=[1] * 5)), "5 dimensions"),
        (gguf(tensors=changed(B, place=0)), "an overlap"),
        (gguf(tensors=changed(B, place=2**63)), "cut short?"),
        (gguf(tensors=TENSORS | {"blk.0.attn_k.weight.lora_a": ([32, 2], 0, None)}), "no lora_B"),
        (gguf(tensors=TENSORS | {"blk.0.attn_q.weight": ([32, 2], 0, None)}), "not a LoRA factor"),
        (gguf(tensors=TENSORS | {"blk.0.odd.weight.lora_a": ([32, 2], 0, None)}), "no module of"),
        (gguf(tail=b"\0" * 64), "64 bytes after the last tensor"),
        (gguf(tensors={}), "no tensor"),
    ],
)
def test_lies_are_named(tmp_path, content, words):
    answer = opened(tmp_path, content)
    assert isinstance(answer, LoraMetaError)
    assert words in str(answer)


def test_keys_of_any_gguf_can_be_asked_for(golden, tmp_path):
    base = golden / "interop" / "gguf" / "base.gguf"
    found = _core.gguf_metadata(str(base))
    assert found["general.architecture"] == "llama"
    assert (found["llama.attention.head_count"], found["llama.attention.head_count_kv"]) == (4, 2)
    with pytest.raises(MissingFile):
        _core.gguf_metadata(str(tmp_path / "none"))
    (tmp_path / "x").write_bytes(b"GGUX" + bytes(40))
    with pytest.raises(InvalidAdapter, match="not GGUF"):
        _core.gguf_metadata(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("module", "architecture", "tensor"),
    [
        ("model.layers.3.self_attn.q_proj", "llama", "blk.3.attn_q"),
        ("model.layers.30.mlp.down_proj", "qwen2", "blk.30.ffn_down"),
        ("model.layers.0.self_attn.qkv_proj", "phi3", "blk.0.attn_qkv"),
        ("model.embed_tokens", "gemma2", "token_embd"),
        ("lm_head", "llama", "output"),
    ],
)
def test_names_go_both_ways(module, architecture, tensor):
    assert _core.gguf_tensor_name(module) == tensor
    assert _core.peft_module_name(tensor, architecture) == module
    assert _core.gguf_tensor_name(f"{module}.odd") is None
