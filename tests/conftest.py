"""Tiny banks, written without the library's own writer, and the numbers that are in them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import reference

from lorameta_rs.cli import run

hypothesis.settings.register_profile("lorameta", deadline=None)
hypothesis.settings.load_profile("lorameta")

# A shell starts what it puts into the background deaf to Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"
ATTENTION = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in (0, 1)
    for name, shape in (("q_proj", (24, 24)), ("v_proj", (24, 12)))
}


@dataclass(frozen=True)
class Adapter:
    """What is to be written of one adapter; its numbers are drawn from its `seed`."""

    seed: int
    modules: dict = field(default_factory=lambda: ATTENTION)
    """Of each module, the size of its input and of its output."""
    rank: int = 2
    dtypes: str = "F32"
    """The types of the tensors, which take turns."""
    shuffled: bool = False
    """Whether the tensors lie in another order than that of their names."""
    shift: int = 0
    """How many bytes the data begins after a multiple of eight."""
    config: dict = field(default_factory=dict)
    """Fields of `adapter_config.json` beside the usual ones."""
    text: str | None = None
    """The dataset, a row a line."""

    def tensors(self):
        """The numbers by tensor name, and the type that each is stored in."""
        random = np.random.default_rng(self.seed)
        shapes = {}
        for module, (inner, outer) in self.modules.items():
            shapes[f"base_model.model.{module}.lora_A.weight"] = (self.rank, inner)
            shapes[f"base_model.model.{module}.lora_B.weight"] = (outer, self.rank)
        dtypes = self.dtypes.split()
        return {
            name: (random.normal(size=shape), dtypes[i % len(dtypes)])
            for i, (name, shape) in enumerate(shapes.items())
        }

    def write(self, folder):
        """Make the folder; answers the numbers as they were stored."""
        folder.mkdir(parents=True)
        tensors = self.tensors()
        names = list(tensors)
        if self.shuffled:
            np.random.default_rng(self.seed).shuffle(names)
        write_safetensors(
            folder / "adapter_model.safetensors", {n: tensors[n] for n in names}, self.shift
        )
        config = {
            "base_model_name_or_path": "base",
            "bias": "none",
            "lora_alpha": 2 * self.rank,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": sorted({name.rpartition(".")[2] for name in self.modules}),
            "task_type": "CAUSAL_LM",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config | self.config))
        if self.text is not None:
            (folder / "train.txt").write_text(self.text)
        return {name: reference.stored(*tensor) for name, tensor in tensors.items()}


def write_safetensors(path, tensors, shift=0):
    """Write (numbers, type) pairs in their order."""
    header, data = {}, b""
    for name, (numbers, dtype) in tensors.items():
        piece = reference.to_bits(numbers, dtype).tobytes()
        offsets = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": dtype, "shape": list(numbers.shape), "data_offsets": offsets}
        data += piece
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + shift)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@dataclass(frozen=True)
class Written:
    """A bank on disk, and the numbers that its members hold, by name."""

    folder: Path
    numbers: dict

    def weights(self, name):
        """The path of a member's tensors."""
        return self.folder / name / "adapter_model.safetensors"

    def edit(self, name, change, dtype="F32"):
        """Write a member's tensors again after `change` was done to their numbers."""
        change(tensors := self.numbers[name])
        typed = {tensor: (numbers, dtype) for tensor, numbers in tensors.items()}
        write_safetensors(self.weights(name), typed)


@pytest.fixture(scope="session")
def make_bank(tmp_path_factory):
    """A function that writes a bank: what all members have as keywords, each one's own by name."""

    def make_bank(members=("a", "b", "c"), *, tokenizer=False, **common):
        folder = tmp_path_factory.mktemp("bank")
        if not isinstance(members, dict):
            members = {name: {} for name in members}
        numbers = {
            name: Adapter(**{"seed": i, **common, **own}).write(folder / name)
            for i, (name, own) in enumerate(members.items())
        }
        if tokenizer:
            shutil.copy(GOLDEN / "paper" / "tokenizer" / "tokenizer.json", folder)
        return Written(folder, numbers)

    return make_bank


@pytest.fixture
def as_nobody():
    """Runs a program without the right to open what is closed, and answers what it prints."""

    def as_nobody(program):
        prefix = []
        if os.name == "nt":
            pytest.skip("Windows has no such modes")
        if os.geteuid() == 0:
            if shutil.which("setpriv") is None:
                pytest.skip("root can open everything, and there is no setpriv to give that up")
            rights = "-dac_override,-dac_read_search"
            prefix = ["setpriv", f"--bounding-set={rights}", "--inh-caps=-all"]
        command = [*prefix, sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return as_nobody


@pytest.fixture
def large_bank(make_bank):
    """A bank's folder, whose merge takes many times the 40 ms between two signs of progress."""
    folder = make_bank(["0"], modules={"layers.0.q": (200_003, 200_003)}, rank=8).folder
    for i in range(1, 800):
        (folder / str(i)).mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / str(i) / name).hardlink_to(folder / "0" / name)
    return folder


@pytest.fixture
def lorameta(capsys):
    """A function that runs a command line: its status, what is on stdout, what on stderr."""

    def lorameta(*arguments):
        status = run([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return lorameta


@pytest.fixture(scope="session")
def golden():
    """The folder of the test vectors."""
    return GOLDEN


@pytest.fixture(scope="session")
def peft_bank(golden, tmp_path_factory):
    """The bank of the adapters that PEFT has combined: a copy, because merges index it."""
    return shutil.copytree(
        golden / "peft_combine" / "adapters", tmp_path_factory.mktemp("peft") / "adapters"
    )


def screen(reader):
    """What was written to a terminal whose programs have ended."""
    written = b""
    with contextlib.suppress(OSError), os.fdopen(reader, "rb", buffering=0) as file:
        while piece := file.read(65536):
            written += piece
    return written.decode()
