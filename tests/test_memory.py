"""Memory is a promise: what a merge takes does not grow with the bank, and heeds `--memory`.

A member's tensors are the same file as the next one's, by hard links: what a process has mapped
counts once for each of them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from lorameta_rs import Fingerprint
from lorameta_rs.files import sha256
from lorameta_rs.parts import Histogram
from lorameta_rs.relations import NAMES

BENCHES = Path(__file__).parents[1] / "benches"
VOCABULARY = 32_000
DEFAULT, SMALL = 120, 64  # MB above Python with numpy and the tokenizer

pytestmark = pytest.mark.skipif(
    not hasattr(os, "wait4"), reason="the system does not tell the peak of a process that ended"
)


def write_bank(folder, members, rank, files=1):
    """A bank whose members' fingerprints have 5,000 of 32,000 tokens each, and a dataset."""
    spec = importlib.util.spec_from_file_location("bank", BENCHES / "bank.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    generator.SHAPES["large"] = 1, {"q_proj": (4096, 4096)}
    generator.write_bank(folder, files, "large", rank, "float32")
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    digest = sha256(folder / "tokenizer.json")
    originals = list((folder / "member000").iterdir())
    for i in range(members):
        member = folder / f"member{i:03d}"
        if not member.exists():
            member.mkdir()
            for file in originals:
                (member / file.name).hardlink_to(file)
        rng = np.random.default_rng(i)
        ids = np.sort(rng.choice(VOCABULARY, 5000, replace=False)).astype(np.uint32)
        # All have as many tokens: what tells equal datasets apart has to look at each.
        counts = rng.permutation(5000).astype(np.uint64) + 1
        Fingerprint(
            *(ids, counts, VOCABULARY, 100, digest),
            relations=rng.integers(1, 100, len(NAMES)).astype(np.uint64),
            parts={name: Histogram(ids, counts) for name in ("definition", "input", "answer")},
        ).save(member / "fingerprint.safetensors")
    rows = np.random.default_rng().integers(0, VOCABULARY, (2000, 50))
    text = "\n".join(" ".join(f"w{i}" for i in row) for row in rows)
    folder.with_suffix(".txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("banks")
    return {
        name: write_bank(folder / name, members, rank)
        for name, members, rank in (("few", 8, 256), ("many", 48, 256), ("502", 502, 1))
    }


def measured(bank, *options):
    """MB that a merge takes above the base."""
    command = [sys.executable, BENCHES / "memory.py", bank, bank.with_suffix(".txt"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[0])


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("name", ["few", "many", "502"])
def test_a_merge_takes_little_memory_whatever_the_bank(banks, name, io):
    assert measured(banks[name], "--io", io) <= DEFAULT


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("name", ["few", "many", "502"])
def test_a_merge_heeds_its_budget(banks, name, io):
    assert measured(banks[name], "--io", io, "--memory", "32") <= SMALL


def test_a_merge_for_many_datasets_heeds_its_budget(tmp_path):
    bank = write_bank(tmp_path / "bank", 48, 16)
    others = [tmp_path / f"{i}.txt" for i in range(15)]
    for i, other in enumerate(others):
        other.write_text(" ".join(f"w{j}" for j in range(i, VOCABULARY, 100)))
    assert measured(bank, *others, "--memory", "32") <= SMALL


@pytest.fixture
def limited():
    """The beginning of a command that runs in 256 MB, page cache included."""
    systemd = ["systemd-run", "--user", "--scope", "--quiet", "-p", "MemoryMax=256M"]
    if shutil.which(systemd[0]) and not subprocess.run([*systemd, "true"], check=False).returncode:
        yield systemd
        return
    for root, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup", root, f"lorameta-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if os.access(group / limit, os.W_OK):
                (group / limit).write_text(str(256 << 20))
                yield ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', group]
                return
        finally:
            group.rmdir()
    pytest.skip("neither systemd nor a control group of our own limits memory here")


def test_a_merge_completes_where_there_is_less_memory_than_bank(tmp_path, limited):
    bank = write_bank(tmp_path / "bank", 48, 256, files=48)
    merge = [sys.executable, "-m", "lorameta_rs", "merge", bank, bank.with_suffix(".txt")]
    subprocess.run([*limited, *merge, "-o", tmp_path / "out"], check=True)
