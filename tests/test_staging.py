"""Outputs appear whole or not at all, whatever stops the merge, and nothing is lost by `force`."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lorameta_rs import Bank, files
from lorameta_rs.errors import InvalidSetting, MissingFile, OutputExists, UnreadableFile
from lorameta_rs.member import WEIGHTS
from lorameta_rs.merge import FILES, Job, Options, merge
from lorameta_rs.staging import staged

posix = pytest.mark.skipif(os.name == "nt", reason="there is no such limit, link or signal")


def tree(folder):
    """All below a folder, with the contents of the files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folders_appear_when_the_block_ends(tmp_path):
    outs = [tmp_path / "x" / "deep" / "out", tmp_path / "y"]
    with staged(outs, ["file"], force=False) as stages:
        for i, stage in enumerate(stages):
            (stage / "file").write_text(str(i))
            assert stage.parent == outs[i].parent
        assert not any(out.exists() for out in outs)
    assert [(out / "file").read_text() for out in outs] == ["0", "1"]
    assert names(tmp_path) == ["x", "y"]
    assert names(outs[0].parent) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_nothing_appears_when_it_fails(tmp_path, force):
    old = tmp_path / "old"
    if force:
        old.mkdir()
        (old / "file").write_text("old")
    before = tree(tmp_path)

    def fail():
        with staged([old, tmp_path / "new" / "and" / "deep"], ["file"], force) as stages:
            (stages[0] / "file").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert tree(tmp_path) == before


def test_what_appears_meanwhile_is_kept(tmp_path):
    def fill():
        with staged([tmp_path / "one", tmp_path / "two"], ["file"], force=False):
            (tmp_path / "two").mkdir()
            (tmp_path / "two" / "file").write_text("thesis")

    with pytest.raises(OutputExists, match="two` exists"):
        fill()
    assert tree(tmp_path) == {"two": None, "two/file": b"thesis"}


@pytest.mark.parametrize("fails", range(4))
def test_all_folders_are_placed_or_none(tmp_path, monkeypatch, fails):
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        out.mkdir()
        (out / "file").write_text(out.name)
    before = tree(tmp_path)
    rename, renamed = Path.rename, []

    def fail_once(source, target):
        renamed.append(source)
        if len(renamed) == fails + 1:
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with (
        pytest.raises(UnreadableFile, match="Input/output") as caught,
        staged(outs, ["file"], True),
    ):
        pass
    assert caught.value.filename == str(outs[fails // 2])
    assert tree(tmp_path) == before


def test_no_output_lies_in_another(make_bank, tmp_path):
    jobs = [Job(np.ones(3), tmp_path / "out"), Job(np.ones(3), tmp_path / "out" / "in")]
    with pytest.raises(InvalidSetting, match="in` lies in another output"):
        merge(Bank(make_bank().folder), jobs)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("other", ["out", "./out", "x/../out", "../{}/out"])
def test_one_path_twice(tmp_path, other):
    outs = [tmp_path / "out", tmp_path / other.format(tmp_path.name)]
    with pytest.raises(InvalidSetting, match="same path"), staged(outs, [], force=True):
        pass


def test_an_output_that_exists_is_kept_or_replaced(make_bank, tmp_path):
    bank, out = Bank(make_bank().folder), tmp_path / "out"
    bank.merge([1.0, 0.0, 0.0], out)
    before = tree(tmp_path)
    with pytest.raises(OutputExists, match=r"out` exists\nreplace it with --force"):
        bank.merge([0.0, 1.0, 0.0], out)
    assert tree(tmp_path) == before
    bank.merge([0.0, 1.0, 0.0], out, force=True)
    after = tree(tmp_path)
    assert after.keys() == before.keys()
    assert after["out/adapter_model.safetensors"] != before["out/adapter_model.safetensors"]


@pytest.mark.parametrize("what", ["a file", "a folder with more", "a folder in it"])
def test_force_replaces_only_what_a_merge_has_written(make_bank, tmp_path, what):
    bank, out = Bank(make_bank().folder), tmp_path / "out"
    if what == "a file":
        out.write_text("thesis")
    else:
        bank.merge([1.0, 0.0, 0.0], out)
    if what == "a folder with more":
        (out / "thesis.txt").write_text("thesis")
    elif what == "a folder in it":
        (out / "thesis").mkdir()
    before = tree(tmp_path)
    with pytest.raises(OutputExists, match=r"not replaced.*(thesis|\bout`)|is not a folder"):
        bank.merge([0.0, 1.0, 0.0], out, force=True)
    assert tree(tmp_path) == before


def test_force_takes_an_empty_folder(make_bank, tmp_path):
    (tmp_path / "out").mkdir()
    Bank(make_bank().folder).merge(np.ones(3), tmp_path / "out", force=True)
    assert names(tmp_path / "out") == sorted(FILES)


@posix
def test_force_does_not_follow_a_link(make_bank, tmp_path):
    bank = Bank(make_bank().folder)
    bank.merge([1.0, 0.0, 0.0], tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(OutputExists, match="out` is not a folder"):
        bank.merge([0.0, 1.0, 0.0], tmp_path / "out", force=True)


def test_one_output_that_exists_stops_all(make_bank, tmp_path):
    bank = Bank(make_bank().folder)
    (tmp_path / "old").mkdir()
    with pytest.raises(OutputExists, match="old"):
        merge(bank, [Job(np.ones(3), tmp_path / name) for name in ("new", "old")])
    assert tree(tmp_path) == {"old": None}


def test_a_parent_that_is_a_file(make_bank, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((UnreadableFile, MissingFile)) as caught:
        Bank(make_bank().folder).merge(np.ones(3), tmp_path / "file" / "out")
    assert caught.value.filename == str(tmp_path / "file")
    assert tree(tmp_path) == {"file": b""}


@posix
def test_names_of_any_length_that_a_file_may_have(make_bank, tmp_path):
    bank = Bank(make_bank().folder)
    for name in ("n" * 255, "é" * 127):
        assert (bank.merge(np.ones(3), tmp_path / name) / WEIGHTS).exists()
    with pytest.raises(UnreadableFile, match="too long") as caught:
        bank.merge(np.ones(3), tmp_path / ("n" * 256))
    assert caught.value.filename == str(tmp_path / ("n" * 256))
    assert len(list(tmp_path.iterdir())) == 2


@posix
@pytest.mark.parametrize("room", [0, 100, 4096, 20_000])
def test_a_full_disk(make_bank, tmp_path, room):
    """The limit on the size of files stands for the disk: the system refuses in the same place."""
    import resource

    bank = Bank(make_bank(modules={"layers.0.q": (2000, 2000)}).folder)
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    try:
        with pytest.raises(UnreadableFile) as caught:
            bank.merge(np.ones(3), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "out" / "adapter_model.safetensors")
    assert "too large" in caught.value.strerror
    assert tree(tmp_path) == {}


def test_force_does_not_replace_what_no_merge_has_made(make_bank, tmp_path):
    """A trained adapter has files of the same names; only the record shows who made a folder."""
    folder = make_bank(["a", "b"]).folder
    bank = Bank(folder)
    before = sorted(path.name for path in (folder / "a").iterdir())
    with pytest.raises(OutputExists, match="which lorameta-rs writes"):
        bank.merge(np.array([0.5, 0.5]), folder / "a", force=True)
    assert sorted(path.name for path in (folder / "a").iterdir()) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    bank.merge(np.array([0.5, 0.5]), empty, force=True)
    assert (empty / WEIGHTS).exists()


@pytest.mark.parametrize("name", [name for name in FILES if name != WEIGHTS])
def test_a_disk_that_is_full_at_last(make_bank, tmp_path, monkeypatch, name):
    """Each of the small files after the tensors may be the one that finds no room."""
    write = files.write_whole

    def full(path, content):
        if path.name == name:
            raise UnreadableFile(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(UnreadableFile, match="No space left") as caught:
        Bank(make_bank().folder).merge(np.ones(3), tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out" / name)
    assert tree(tmp_path) == {}


def test_a_disk_that_is_full_is_said_of_the_output(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UnreadableFile) as caught, staged([out]) as (stage,):
        raise UnreadableFile(errno.ENOSPC, "No space left on device", str(stage / "adapter.gguf"))
    assert caught.value.filename == str(out / "adapter.gguf")


def test_what_progress_raises_stops_the_merge(large_bank, tmp_path):
    class StopError(Exception):
        pass

    def stop(done, total):
        raise StopError

    bank = Bank(large_bank)
    with pytest.raises(StopError):
        merge(
            bank,
            [Job(np.ones(len(bank)), tmp_path / "out")],
            Options(method="soup", threads=2),
            stop,
        )
    assert tree(tmp_path) == {}


INTERRUPTED = """
import os, signal, sys, threading
import numpy as np
from pathlib import Path
from lorameta_rs import Bank
from lorameta_rs.merge import Job, Options, merge

begun = threading.Event()

def interrupt():
    begun.wait()
    os.kill(os.getpid(), signal.SIGINT)

bank = Bank(sys.argv[1])
threading.Thread(target=interrupt).start()
job = Job(np.ones(len(bank)), Path(sys.argv[2]))
merge(bank, [job], Options(method="soup", threads=1), lambda done, total: begun.set())
"""


@posix
def test_ctrl_c_leaves_nothing(large_bank, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, large_bank, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert tree(tmp_path) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not have such names")
def test_a_name_that_is_not_utf_8(make_bank, tmp_path):
    out = Path(os.fsdecode(os.fsencode(tmp_path / "out") + b"\xff"))
    written = make_bank()
    Bank(written.folder).merge(np.ones(3), out)
    assert names(out) == sorted(FILES)
