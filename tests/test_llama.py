"""The real llama.cpp behind `Llama`: likelihoods, mixtures, refusals, and that it is gone after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from lorameta_rs.errors import InvalidAdapter, InvalidSetting, MissingFile
from lorameta_rs.llama import Llama

pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel for this platform")


@pytest.fixture(scope="module")
def gguf(golden):
    return golden / "interop" / "gguf"


@pytest.fixture(scope="module")
def recorded(golden):
    folder = golden / "peft_combine"
    ids = json.loads((folder / "manifest.json").read_text())["input_ids"]
    return ids, load_file(folder / "forward_logits.safetensors")


@pytest.fixture(scope="module")
def llama(gguf):
    adapters = [gguf / "a_r8.global.gguf", gguf / "f_r8_patterns.folded.gguf"]
    with Llama(gguf / "base.gguf", adapters, context=64, slots=2) as llama:
        yield llama


def wanted(logits, ids, start):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    table = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return [table[i - 1, ids[i]] for i in range(start, len(ids))]


@pytest.mark.parametrize(
    ("name", "scales"),
    [("base", ()), ("base", (0, 0)), ("a_r8", (1, 0)), ("f_r8_patterns", (0, 1))],
)
def test_likelihoods_are_pefts(llama, recorded, name, scales):
    ids, logits = recorded
    told = []
    found = llama.log_likelihoods([(row[:3], row[3:]) for row in ids], scales, told.append)
    for row, got, table in zip(ids, found, logits[name], strict=True):
        np.testing.assert_allclose(got, wanted(table, row, 3), atol=1e-4)
    assert told == [1, 2]


def test_a_mixture_lies_off_both(llama, recorded):
    rows = [(row[:3], row[3:]) for row in recorded[0]]
    both, half = (llama.log_likelihoods(rows, scales) for scales in ((1, 1), (0.5, -0.5)))
    assert np.abs(np.subtract(both, half)).max() > 0.01


def test_answers_are_the_likeliest_tokens_in_the_order_of_the_prompts(llama, recorded):
    ids, logits = recorded
    prompts = [row for row in ids for _ in range(3)]
    found = llama.answers(prompts, (1, 0), most_tokens=1)
    firsts = [int(table[-1].argmax()) for table in logits["a_r8"] for _ in range(3)]
    assert [tokens for _, tokens in found] == [[first] for first in firsts]


def test_what_cannot_be_is_said(llama, gguf, golden, tmp_path):
    with pytest.raises(InvalidSetting, match="1 scales for 2 adapters"):
        llama.answers([[1]], (1.0,))
    with pytest.raises(InvalidSetting, match="context"):
        llama.answers([[1] * 500])
    with pytest.raises(MissingFile), Llama(tmp_path / "none.gguf"):
        pass
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(InvalidAdapter), Llama(tmp_path / "text.gguf"):
        pass
    with (
        pytest.raises(InvalidSetting, match=r"general\.type"),
        Llama(gguf / "base.gguf", [gguf / "base.gguf"]),
    ):
        pass


def test_a_server_that_has_died_is_named(gguf):
    with Llama(gguf / "base.gguf", [], context=64, slots=1) as llama:
        pass
    with pytest.raises(InvalidSetting, match=r"base.gguf`: llama.cpp has ended: "):
        llama.answers([[5, 6]], (), most_tokens=1)


def test_it_is_gone_after_the_block(gguf, capfd):
    with Llama(gguf / "base.gguf", context=64, slots=1) as llama:
        address = llama._address
        assert address.startswith("http://127.0.0.1:")
        assert llama.answers([[1, 5]], most_tokens=2)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/health", timeout=5)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to whole consoles")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_it_listens_here_alone_and_is_gone_however_the_command_ends(gguf, ending):
    command = [sys.executable, "-m", "lorameta_rs", "try", gguf / "base.gguf"]
    command += [gguf / "a_r8.global.gguf", "--prompt", "x", "--most-tokens", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    own = psutil.Process(process.pid)
    listening = []
    while process.poll() is None and not listening:
        time.sleep(0.01)
        children = own.children(recursive=True)
        listening = [
            place.laddr.ip
            for child in children
            for place in child.net_connections()
            if place.status == psutil.CONN_LISTEN
        ]
    assert set(listening) == {"127.0.0.1"}, process.communicate()
    process.send_signal(ending)
    _, err = process.communicate(timeout=30)
    if ending == signal.SIGINT:
        assert (process.returncode, err.decode().split()) == (130, ["interrupted"])
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []
