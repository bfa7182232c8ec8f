"""A bank: who belongs to it, who is left out and why, and what its owner says in `bank.toml`."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorameta_rs import Bank
from lorameta_rs.errors import (
    InvalidBank,
    InvalidSetting,
    LayoutMismatch,
    MissingFile,
)
from lorameta_rs.index import make_fingerprints
from lorameta_rs.modules import lacking

MALFORMED = Path(__file__).parent / "golden" / "malformed"


@pytest.fixture
def malformed(golden, tmp_path):
    """A function that copies a bank of the malformed ones, with a tokenizer."""

    def malformed(name):
        folder = shutil.copytree(MALFORMED / "banks" / name, tmp_path / name)
        shutil.copy(golden / "paper" / "tokenizer" / "tokenizer.json", folder)
        return folder

    return malformed


# Of each malformed bank: who can be used by name, who can be compared, what is said of whom.
BANKS = {
    "ok": ("ab", "ab", ""),
    "one": ("a", "a", "`a` is the only member: there is nothing to combine"),
    "base_mismatch": ("a", "a", "b.*`base_model_name_or_path` is `other/base`"),
    "shape_mismatch": ("a", "a", "b.*q_proj` changes a matrix of shape"),
    "targets_differ": ("ab", "ab", "`b`: has no `model.layers.0.self_attn.k_proj`"),
    # The manifest accepts these two; but their members have one dataset, which is worth a word.
    "rslora_mixed": ("ab", "ab", "`a`, `b` have the same token counts"),
    "odd_names": (["-rf", ".hidden", "a b", "模型-é"],) * 2 + ("`-rf`, .* have the same token",),
    "identical": ("ab", "ab", "`a`, `b` have the same token counts"),
    "missing_data": ("ab", "a", "b`: it has no fingerprint and no dataset"),
    "missing_adapter": ("a", "a", "b` has no adapter: `adapter_model.safetensors` is missing"),
    "one_broken": ("a", "a", "b.adapter_model.safetensors`: the header claims 57 bytes"),
}


@pytest.mark.parametrize("name", BANKS)
def test_malformed(malformed, tmp_path, name):
    by_name, compared, said = BANKS[name]
    bank = Bank(malformed(name))
    assert bank.names == list(by_name)
    bank.merge(np.ones(len(bank)), tmp_path / "by name")
    assert [name for name, made in make_fingerprints(bank).items() if made] == list(compared)
    assert bank.names == list(compared)
    bank.merge(np.ones(len(bank)), tmp_path / "compared")
    said_of_merges = [odd for odd in [lacking(bank.members)] if odd is not None]
    spoken = "\n".join([*bank.notes, *map(str, bank.left_out.values()), *said_of_merges])
    assert re.search(said, spoken)
    if not said:
        assert spoken == ""


def test_every_malformed_bank_is_tested():
    found = json.loads((MALFORMED / "banks.json").read_text(encoding="utf-8"))["entries"]
    names = {entry["path"].removeprefix("banks/") for entry in found}
    # Its two folders are one on many a system; they are made below.
    assert names == {*BANKS, "case_names"}


def test_names_that_differ_in_case_only(make_bank):
    """Where they are two folders; elsewhere the second is the first, and nothing is odd."""
    written = make_bank(["a", "b"])
    with contextlib.suppress(OSError):
        (written.folder / "b").rename(written.folder / "A")
    bank = Bank(written.folder)
    told = [note for note in bank.notes if "the names `A`, `a` differ in case only" in note]
    assert bool(told) == (bank.names == ["A", "a"])


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
def test_a_bank_is_opened_in_a_forked_process_too(make_bank):
    folder = make_bank(["a", "b", "c"]).folder
    here = Bank(folder).names
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_names, [folder]).get(timeout=60) == here


def _names(folder):
    return Bank(folder).names


def test_members_are_sorted_and_others_no_members(make_bank):
    written = make_bank(["b", "a", "10", "9"])
    (written.folder / "notes").mkdir()
    (written.folder / "notes" / "todo.txt").write_text("buy milk")
    (written.folder / "index.json").write_text("{}")
    bank = Bank(str(written.folder))
    assert bank.names == [member.name for member in bank.members] == ["10", "9", "a", "b"]
    assert (len(bank), bank.left_out, bank.notes) == (4, {}, [])
    assert bank.base_model == "base"


def test_members_are_excluded_by_name_and_pattern(make_bank):
    folder = make_bank(["task1", "task2", "task10", "other", "Task3"]).folder
    assert Bank(folder, exclude=["task1*", "other"]).names == ["Task3", "task2"]
    with pytest.raises(InvalidBank, match="--exclude leaves no member"):
        Bank(folder, exclude=["*"])
    bank = Bank(folder, exclude="task*")
    assert bank.names == ["Task3", "other"]
    with pytest.raises(InvalidSetting, match=r"`task10` is left out by --exclude `task\*`"):
        bank.require(["Task3", "task10"])


@pytest.mark.parametrize("name", ["threads", "memory"])
def test_numbers_below_zero_are_refused_by_name(make_bank, tmp_path, name):
    with pytest.raises(InvalidSetting, match=f"{name} is -1, expected [01] or more"):
        Bank(make_bank().folder).merge(np.ones(3), tmp_path / "out", **{name: -1})


def test_one_column_is_one_and_not_its_letters(make_bank):
    assert Bank(make_bank().folder, columns="input").columns == ("input",)


def test_what_a_merge_has_made_is_a_member_only_with_a_dataset(make_bank, tmp_path):
    written = make_bank(["a", "b"], tokenizer=True, text="one\n")
    for name in ("b made", "data", "named", "printed"):
        Bank(written.folder).merge(
            [1.0, 0.0] + [0.0] * (len(Bank(written.folder)) - 2), written.folder / name
        )
        if name != "b made":
            (written.folder / name / "train.txt").write_text("two\n")
    (written.folder / "named" / "train.txt").rename(written.folder / "elsewhere.txt")
    (written.folder / "bank.toml").write_text('[datasets]\nnamed = "elsewhere.txt"')
    make_fingerprints(Bank(written.folder))
    (written.folder / "printed" / "train.txt").unlink()
    bank = Bank(written.folder)
    assert bank.names == ["a", "b", "data", "named", "printed"]
    assert (bank.generated, bank.left_out) == (["b made"], {})
    assert bank.unfingerprinted() == {}
    with pytest.raises(InvalidSetting, match=r"b made` is no member: a merge has made it"):
        bank.require(["b made"])
    shutil.copytree(written.folder / "b made", tmp_path / "all" / "b made")
    assert Bank(tmp_path / "all").names == ["b made"]


def test_a_bank_without_some_members_stands_on_its_own(make_bank):
    texts = {name: {"text": f"{name} is here"} for name in "abc"}
    bank = Bank(make_bank(texts, tokenizer=True).folder)
    make_fingerprints(bank.without(["a"]))
    rest = bank.without(["a"])
    assert rest.unfingerprinted() == {}
    assert rest.fingerprints.counts is not None
    assert list(bank.unfingerprinted()) == ["a"]
    rest.leave_out({"b": "it is broken"})
    assert (rest.names, bank.names) == (["c"], ["a", "b", "c"])
    assert bank.left_out == {}


def test_a_broken_member_is_excused_until_it_is_asked_for(make_bank):
    written = make_bank()
    written.weights("b").write_bytes(b"junk")
    bank = Bank(written.folder)
    assert bank.names == ["a", "c"]
    bank.require(["a", "c", "somebody else"])
    with pytest.raises(type(bank.left_out["b"]), match=r"b.adapter_model\.safetensors"):
        bank.require(["a", "b"])


def test_links_that_lead_nowhere_are_left_out(make_bank):
    folder = make_bank().folder
    (folder / "b" / "adapter_config.json").unlink()
    (folder / "lost").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / ".#lock").symlink_to("somebody@somewhere")  # an editor's
    (folder / "linked").symlink_to("a")
    bank = Bank(folder)
    assert bank.names == ["a", "c", "linked"]
    assert list(bank.left_out) == ["b", "loop", "lost"]
    for name in ("lost", "loop"):
        assert str(bank.left_out[name]).startswith(f"`{folder / name}`: ")


@pytest.mark.parametrize("mode", [0, 0o444])
def test_folders_that_are_closed_are_left_out(make_bank, as_nobody, mode):
    folder = make_bank().folder
    (folder / "b").chmod(mode)
    try:
        found = as_nobody(
            "from lorameta_rs import Bank\n"
            f"bank = Bank({str(folder)!r})\n"
            "print(bank.names, *bank.left_out, *bank.left_out.values())"
        )
    finally:
        (folder / "b").chmod(0o755)
    assert found.startswith("['a', 'c'] b ")
    assert f"{folder / 'b'}" in found
    assert "Permission denied" in found


@pytest.mark.parametrize("mode", [0, 0o444])
def test_a_bank_that_is_closed_is_named(make_bank, as_nobody, mode):
    folder = make_bank().folder
    folder.chmod(mode)
    try:
        found = as_nobody(
            "from lorameta_rs import Bank\n"
            f"try: Bank({str(folder)!r})\n"
            "except OSError as error: print(error)"
        )
    finally:
        folder.chmod(0o755)
    assert found.startswith(f"`{folder}")
    assert found.endswith("`: Permission denied\n")


def test_no_member_can_be_used(make_bank):
    written = make_bank()
    for name in "abc":
        written.weights(name).write_bytes(b"junk")
    with pytest.raises(InvalidBank, match="none of 3 members can be used") as caught:
        Bank(written.folder)
    assert all(str(written.weights(name)) in str(caught.value) for name in "abc")


def test_what_is_no_bank(make_bank, tmp_path):
    with pytest.raises(MissingFile, match="gone"):
        Bank(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidBank, match="file` is a file; a bank is a folder"):
        Bank(tmp_path / "file")
    with pytest.raises(InvalidBank, match="holds no adapter folder"):
        Bank(tmp_path)
    with pytest.raises(InvalidBank, match="is one adapter; a bank is a folder of adapter folders"):
        Bank(make_bank().folder / "a")


# The base model.


@pytest.fixture
def bases(make_bank):
    """Two members of one base, one of another, one under a path, one that does not say."""
    said = {"a": "org/x", "b": "org/x", "c": "org/y", "d": "/models/x", "e": None}
    own = {name: {"config": {"base_model_name_or_path": base}} for name, base in said.items()}
    return make_bank(own).folder


@pytest.mark.parametrize(
    ("asked", "names"),
    [(None, "abde"), ("org/x", "abde"), ("org/y", "ce"), ("other/y", "ce"), ("any", "abcde")],
)
def test_members_of_other_bases_are_left_out(bases, tmp_path, asked, names):
    bank = Bank(bases, base_model=asked)
    assert bank.names == list(names)
    for name, error in bank.left_out.items():
        assert isinstance(error, LayoutMismatch)
        config = bases / name / "adapter_config.json"
        assert f"`{config}`: `base_model_name_or_path` is" in str(error)
        assert "--base-model" in str(error)
    mixed = "the members are for 2 base models: `/models/x`, `org/y`\n"
    assert any(note.startswith(mixed) for note in bank.notes) == (asked == "any")
    bank.merge(np.ones(len(bank)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ("org/x" if asked in (None, "any") else asked)


def test_a_base_that_nobody_has(bases):
    with pytest.raises(InvalidBank, match="none of 4 members can be used"):
        Bank(bases, base_model="org/z", exclude=["e"])


def test_the_rest_of_a_bank_decides_on_shapes(make_bank):
    wide = {"modules": {"layers.0.q": (24, 32)}}
    folder = make_bank({"a": wide, "b": {}, "c": {}}, modules={"layers.0.q": (24, 24)}).folder
    bank = Bank(folder)
    assert bank.names == ["b", "c"]
    said = r"a.adapter_model\.safetensors`: `layers\.0\.q` changes .* \(32, 24\), .* \(24, 24\)"
    assert re.search(said, str(bank.left_out["a"]))


# bank.toml.


def test_settings_are_honoured(bases, golden):
    paper = golden / "paper"
    data = paper / "datasets"
    (bases / "bank.toml").write_text(
        f"""
        [bank]
        base_model = "org/y"
        tokenizer = '{paper / "tokenizer" / "tokenizer.json"}'
        architecture = "llama"
        [base]
        heads = 4
        size = "7B"
        [datasets]
        c = '{data / "03.jsonl"}'
        e = "elsewhere.txt"
        [families]
        c = "arithmetic"
        """
    )
    (bases / "elsewhere.txt").write_text("one\ntwo\n")
    bank = Bank(bases)
    assert (bank.names, bank.base_model) == (["c", "e"], "org/y")
    assert bank.tokenizer.path == paper / "tokenizer" / "tokenizer.json"
    assert [bank.dataset(m) for m in bank.members] == [data / "03.jsonl", bases / "elsewhere.txt"]
    assert make_fingerprints(bank) == {"c": True, "e": True}
    assert Bank(bases, base_model="org/x").names == ["a", "b", "d", "e"]
    (architecture, base, *others) = bank.notes
    known = (
        "known are `base_model`, `tokenizer` in `[bank]`, `architecture`, `heads`, `kv_heads`, "
        "`config` in `[base]`, `[datasets]` and `[families]`"
    )
    path = bases / "bank.toml"
    assert architecture == f"`{path}`: `architecture` in `[bank]` means nothing; {known}"
    assert base == f"`{path}`: `size` in `[base]` means nothing; {known}"
    assert not any("bank.toml" in note for note in others)


def test_members_in_the_settings_that_are_not_there(bases):
    (bases / "bank.toml").write_text('x = 1\n[datasets]\na = "x"\nz = "x"\n[families]\ny = "x"')
    notes = [note.partition("bank.toml`: ")[2] for note in Bank(bases, exclude="a").notes[:3]]
    assert notes[0].startswith("`x` means nothing; known are")
    assert notes[1] == "`[datasets]` names `z`, which is no member"
    assert notes[2] == "`[families]` names `y`, which is no member"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[bank", "not TOML"),
        ("\xff", "not TOML"),
        ("bank = 3", r"`\[bank\]` has to be a table of texts"),
        ("[bank]\ntokenizer = 3", r"`\[bank\]` has to be a table of texts"),
        ("[datasets]\na = ['x']", r"`\[datasets\]` has to be a table of texts"),
        ("[families]\na = {}", r"`\[families\]` has to be a table of texts"),
    ],
)
def test_faults_of_the_settings_are_named(bases, text, said):
    (bases / "bank.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidBank, match=rf"bank\.toml`: {said}"):
        Bank(bases)


@pytest.mark.parametrize("name", ["cats \U0001f408", "del \x7f", 'quote " back \\', "tab\tnew\n"])
def test_any_text_is_written_so_that_it_is_read_again(make_bank, name):
    folder = make_bank(["a"]).folder
    settings = replace(Bank(folder).settings, families={"a": name}, base_model=name)
    (folder / "bank.toml").write_text(settings.toml, encoding="utf-8")
    assert Bank(folder, base_model="base").settings == settings


def test_settings_that_an_editor_of_windows_wrote(make_bank):
    folder = make_bank().folder
    (folder / "bank.toml").write_bytes(b'\xef\xbb\xbf[bank]\ntokenizer = "nope.json"\n')
    with pytest.raises(MissingFile, match=r"nope.json`: .* which `bank.toml` names"):
        _ = Bank(folder).tokenizer


def test_a_dataset_that_is_not_where_it_is_said_to_be(make_bank):
    written = make_bank(["a", "b"], tokenizer=True, text="one\n")
    (written.folder / "bank.toml").write_text('[datasets]\na = "gone.jsonl"')
    bank = Bank(written.folder)
    assert make_fingerprints(bank) == {"a": False, "b": True}
    assert isinstance(bank.left_out["a"], MissingFile)
    assert bank.left_out["a"].filename == str(written.folder / "gone.jsonl")


# Names.


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not have such names")
def test_a_name_that_is_not_utf_8(make_bank, lorameta):
    written = make_bank()
    odd = os.fsencode(written.folder) + b"/bad_\xff\xfe"
    shutil.copytree(written.folder / "a", os.fsdecode(odd))
    bank = Bank(written.folder)
    assert bank.names == ["a", "b", "c"]
    (name,) = bank.left_out
    assert name == r"bad_\xff\xfe"
    assert r"bad_\xff\xfe`: the folder's name is not UTF-8" in str(bank.left_out[name])
    with io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as screen:
        print(bank.names, bank.left_out, bank.notes, *bank.left_out.values(), file=screen)
    assert Bank(written.folder, exclude=["bad_*"]).left_out == {}
    status, _, err = lorameta("inspect", written.folder)
    assert (status, r"bad_\xff\xfe`: the folder's name is not UTF-8" in err) == (1, True)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not have such names")
def test_a_bank_whose_own_name_is_not_utf_8(make_bank, tmp_path):
    from lorameta_rs.provenance import Provenance

    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bank_\xff"))
    shutil.copytree(make_bank().folder, folder)
    Bank(folder).merge([1.0, 0.0, 0.0], tmp_path / "out")
    record = Provenance.load(tmp_path / "out" / "lorameta.json")
    assert Path(record.settings["bank"]) == folder
