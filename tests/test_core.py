"""The compiled core by itself: headers that are read or refused, patterns, scans and plans."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from lorameta_rs import _core
from lorameta_rs.errors import InvalidAdapter, InvalidSetting, LayoutMismatch, MissingFile
from lorameta_rs.merge import Options
from lorameta_rs.sums import Terms

MALFORMED = Path(__file__).parent / "golden" / "malformed"
WEIGHTS = "adapter_model.safetensors"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def opened(path):
    (answer,) = _core.open_adapters([path])
    return answer


# Headers.

# Sound files that are no adapters. The answer names what they hold instead.
HOLDS = {
    "metadata_only": "holds no tensor",
    "name_empty": "``: is not a LoRA factor",
    "name_nul_newline": r"`a\u{0}b\n\u{1b}[31mred`: is not a LoRA factor",
    "name_unicode": "😀`: is not a LoRA factor",
    "name_long": "xxx…`: is not a LoRA factor",
}


@pytest.mark.parametrize(
    "entry",
    json.loads((MALFORMED / "safetensors.json").read_text(encoding="utf-8"))["entries"],
    ids=lambda entry: Path(entry["path"]).stem,
)
def test_malformed(entry):
    path = MALFORMED / entry["path"]
    answer = opened(path)
    assert isinstance(answer, InvalidAdapter)
    file, said = str(answer).split("`: ", 1)
    assert file == f"`{path}"
    assert "\x1b" not in said
    assert len(said) < 400
    if entry["expect"] == "error":
        for name in entry["message_should_name"]:
            assert (name if len(name) > 1 else f"`{name}`") in said
    else:
        assert HOLDS.get(path.stem, "`a`: is not a LoRA factor") in said


def test_white_space_before_the_header_is_noted(make_bank):
    path = make_bank(["a"]).weights("a")
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", int.from_bytes(data[:8], "little") + 1) + b" " + data[8:])
    (note,) = opened(path).layout.notes
    assert "the header begins with white space" in note


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    """The format allows 100 MB; 64 MiB is room for 600,000 tensors, and a limit on memory."""
    path = tmp_path / WEIGHTS
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(100_000_000)
    assert f"claims 90000000 bytes, at most {64 << 20} are possible" in str(opened(path))


def test_many_files_are_answered_in_their_order(make_bank):
    written = make_bank()
    paths = [written.weights("b"), written.folder, written.weights("a"), written.folder / "gone"]
    b, folder, a, gone = _core.open_adapters(paths)
    assert (a.path, b.path) == (written.weights("a"), written.weights("b"))
    assert isinstance(folder, InvalidAdapter)
    assert "a folder" in str(folder)
    assert isinstance(gone, MissingFile)
    assert os.fspath(gone.filename) == str(written.folder / "gone")


def test_an_adapter_as_python_sees_it(make_bank):
    written = make_bank({"a": {}, "b": {}, "c": {"shift": 1}}, dtypes="BF16 F16")
    a, b, c = _core.open_adapters([written.weights(name) for name in "abc"])
    status = written.weights("a").stat()
    assert (a.size, a.mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert a.layout == b.layout
    assert hash(a.layout) == hash(b.layout)
    assert a.layout != c.layout
    assert a.layout.notes == []
    names = [module.name for module in a.layout.modules]
    assert names == sorted(names)
    module = a.layout.modules[1]
    assert (module.name, module.kind, module.rank) == (names[1], "linear", 2)
    assert (module.a_shape, module.b_shape, module.dtypes) == ([2, 24], [12, 2], ("BF16", "F16"))


MADE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from make_malformed import make
from lorameta_rs import Bank
from lorameta_rs.errors import LoraMetaError
from lorameta_rs.member import open_members

out = Path(sys.argv[2])
make(out)
folders = [folder for folder in sorted(out.iterdir()) if (folder / "adapter_config.json").exists()]
found = {one.name: str(answer) for one, answer in zip(folders, open_members(folders))}
for folder in (out, out / "bank_dir_loop"):
    try:
        Bank(folder)
    except LoraMetaError as error:
        found[f"bank {folder.name}"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="not every system has such files")
def test_files_that_are_no_files(tmp_path):
    """In a process of their own, because opening a pipe could wait for ever."""
    done = subprocess.run(
        [sys.executable, "-c", MADE, MALFORMED, tmp_path / "made"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    for name, said in {
        "sym_outside": "header",
        "sym_loop": "symbolic links",
        "sym_dangling": "No such file",
        "dev_zero": "not a regular file",
        "fifo": "not a regular file",
        "claims_1tb": "`a` ends at byte 1099511627776 of the data, the file has 0",
        "many_tensors": "is not a LoRA factor",
    }.items():
        assert f"{name}/{WEIGHTS}" in found[name]
        assert said in found[name]
    assert f"unreadable/{WEIGHTS}" in found["unreadable"]
    assert "none of 8 members can be used" in found["bank made"]
    assert "holds no adapter folder" in found["bank bank_dir_loop"]


# Patterns.

NAMES = ["q_proj", "model.layers.0.q_proj", "model.layers.10.v_proj", "model.layers.0.xq_proj"]
PIECES = st.sampled_from(["q_proj", "v_proj", "layers", r"\.", ".", "0", "1", ".*", "|", "[0-9]+"])


@given(st.lists(st.lists(PIECES, min_size=1, max_size=5).map("".join), max_size=4))
def test_patterns_match_as_those_of_peft(patterns):
    def matches(pattern, name):
        return re.match(rf"(.*\.)?({pattern})$", name)

    want = [next((i for i, p in enumerate(patterns) if matches(p, n)), None) for n in NAMES]
    assert _core.first_match(patterns, NAMES) == want


def test_a_hostile_pattern_takes_no_time():
    hostile = "(" * 10 + "a+" + ")+" * 10
    assert _core.first_match([hostile], ["a" * 10_000 + "!"]) == [None]


@pytest.mark.parametrize("pattern", ["(q_proj", "a)(b", "*", r"(a)\1", "(?=a)"])
def test_no_pattern(pattern):
    with pytest.raises(InvalidAdapter, match="is not a regular expression") as caught:
        _core.first_match(["q_proj", pattern], NAMES)
    assert pattern in str(caught.value)


# Scans.


@pytest.mark.parametrize(
    ("number", "what"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf"), (None, None)]
)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_scan_finds_what_is_no_number(make_bank, number, what, dtype):
    written = make_bank(["a"])

    def spoil(tensors):
        if number is not None:
            tensors[Q_B][5, 1] = number

    written.edit("a", spoil, dtype)
    assert _core.scan(opened(written.weights("a"))) == ([] if what is None else [(Q_B, what)])


def test_scan_finds_an_untrained_factor():
    adapter = opened(MALFORMED / "adapters" / "zero_B" / WEIGHTS)
    assert (Q_B, "only zeros") in _core.scan(adapter)


# Sums.


# The settings are any object with the attributes of `merge.Options`, which would refuse some here.
SOUP = SimpleNamespace(**vars(Options(method="soup", memory=1 << 24)))


def each(rows):
    """One coefficient for all modules of each adapter."""
    return [[[coefficient] for coefficient in row] for row in rows]


def test_arguments_that_contradict_each_other(make_bank, tmp_path):
    written = make_bank(["a", "b"])
    adapters = _core.open_adapters([written.weights(name) for name in "ab"])
    out = tmp_path / "out"
    for rows, outs, keywords, said in [
        ([], [], {}, "expected a coefficient for each adapter and target"),
        ([[1.0]], [out], {}, "expected a coefficient for each adapter and target"),
        ([[1.0, 1.0]], [], {}, "expected an output for each target"),
        ([[0.0, 0.0]], [out], {}, "all coefficients of a target are zero"),
        ([[1.0, np.nan]], [out], {}, "not a finite number"),
        ([[1.0, 1.0]], [out], {"strengths": [[1.0] * 4]}, "a finite strength for each"),
        ([[1.0, 1.0]], [out], {"strengths": [[1.0] * 4, [1.0] * 3]}, "a finite strength for each"),
        ([[1.0, 1.0]], [out], {"dtype": "float64"}, "expected float32, float16 or bfloat16"),
        ([[1.0, 1.0]], [out], {"io": "pipe"}, "expected read or mmap"),
    ]:
        strengths = keywords.pop("strengths", None)
        settings = SimpleNamespace(**(vars(SOUP) | keywords))
        with pytest.raises(InvalidSetting, match=said):
            _core.combine(Terms(adapters, each(rows), strengths), outs, settings)
    assert not any(tmp_path.iterdir())


def test_a_plan_reads_each_chosen_byte_once(make_bank):
    written = make_bank(modules={"q": (1000, 1000)}, dtypes="F16 F32", rank=3)
    adapters = _core.open_adapters([written.weights(name) for name in "abc"])
    size = 3000 * 2 + 3000 * 4
    for rows, count in [([[1.0, 0.0, 0.0]], 1), ([[1.0, 0, 0], [0, 0, 1.0]], 2), ([[1, 1, 1]], 3)]:
        assert _core.plan(Terms(adapters, each(rows)), SOUP).bytes == count * size
    small = SimpleNamespace(**(vars(SOUP) | {"memory": 1000, "threads": 1}))
    with pytest.raises(InvalidSetting, match=r"budget is 0 MiB, .* at least \d+ MiB.*--memory"):
        _core.plan(Terms(adapters, each([[1, 1, 1]])), small)


def test_shapes_that_differ(make_bank, tmp_path):
    written = make_bank({"a": {}, "b": {"modules": {"model.layers.0.self_attn.q_proj": (24, 25)}}})
    adapters = _core.open_adapters([written.weights(name) for name in "ab"])
    with pytest.raises(LayoutMismatch) as caught:
        _core.combine(Terms(adapters, each([[1.0, 1.0]])), [tmp_path / "out"], SOUP)
    for said in (str(written.weights("b")), Q_B, "[25, 2]", str(written.weights("a")), "[24, 2]"):
        assert said in str(caught.value)


def test_one_file_for_each_target(make_bank, tmp_path):
    written = make_bank()
    adapters = _core.open_adapters([written.weights(name) for name in "abc"])
    outs = [tmp_path / "one", tmp_path / "two"]
    rows = [[0.5, 0.25, 0.0], [0.0, -1.0, 2.0]]
    strengths = [[1.0] * 4, [2.0, 3.0, 4.0, 5.0], [0.5] * 4]
    _core.combine(Terms(adapters, each(rows), strengths), outs, SOUP)
    modules = [module.name for module in adapters[0].layout.modules]

    def strength(i, tensor):
        name = tensor.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        return strengths[i][modules.index(name)] if "lora_B" in tensor else 1.0

    for row, out in zip(rows, outs, strict=True):
        want = reference.soup([*written.numbers.values()], row, strength)
        for name, numbers in reference.read(out)[0].items():
            np.testing.assert_allclose(numbers, want[name], rtol=0, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
