"""The demo: small, honest, and explained in less than a screen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import safetensors.numpy

from lorameta_rs import Bank
from lorameta_rs.cli import run
from lorameta_rs.demo import copy_out
from lorameta_rs.errors import OutputExists


@pytest.fixture(scope="module")
def data():
    with as_file(files("lorameta_rs.demo")) as folder:
        yield folder


def test_the_package_carries_less_than_3_mb(data):
    assert sum(path.stat().st_size for path in data.rglob("*") if path.is_file()) < 3_000_000


def test_the_new_dataset_is_in_no_member(data):
    new = set((data / "new.jsonl").read_text().splitlines())
    assert len(new) == 100
    for member in Bank(data / "bank").members:
        assert new.isdisjoint((member.folder / "train.jsonl").read_text().splitlines())


def test_the_bank_has_a_dozen_members_of_several_families(data):
    names = Bank(data / "bank").names
    assert len(names) == 12
    assert len({name.split("_")[1] for name in names}) == 4
    assert not any((data / "bank").rglob("fingerprint.safetensors"))


def test_the_whole_flow_ends_in_an_adapter(tmp_path, capsys):
    out = tmp_path / "demo" / "adapter"
    assert run(["demo", str(tmp_path / "demo")]) == 0
    table, words = capsys.readouterr()
    nearest = [line.split("\t")[0] for line in table.splitlines()[1:4]]
    assert all("topic" in name for name in nearest)
    assert "warning" not in words
    tensors = safetensors.numpy.load_file(out / "adapter_model.safetensors")
    member = Bank(tmp_path / "demo" / "bank").members[0]
    expected = safetensors.numpy.load_file(member.adapter.path)
    assert set(tensors) == set(expected)
    assert {min(tensor.shape) for tensor in tensors.values()} == {16}


def test_a_program_gets_the_ranking_and_the_paths(tmp_path, lorameta):
    status, out, err = lorameta("demo", tmp_path / "demo", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert Bank(found["bank"]).names == sorted(member["name"] for member in found["members"])
    assert Path(found["dataset"]) == tmp_path / "demo" / "new.jsonl"
    assert (Path(found["out"]) / "adapter_config.json").exists()
    assert found["relevance"]["nearest"] == found["members"][0]["name"]


def test_it_is_explained_in_less_than_a_screen(tmp_path):
    command = [sys.executable, "-m", "lorameta_rs", "demo"]
    done = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
    )
    lines = done.stdout.decode().expandtabs().splitlines()
    assert sum(1 + (len(line) - 1) // 80 for line in lines) <= 24
    assert (tmp_path / "lorameta-demo" / "adapter" / "adapter_config.json").exists()


def test_the_command_that_it_ends_with_works(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["demo", "a b"]) == 0
    import shlex

    program, *arguments = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert (program, run(arguments)) == ("lorameta-rs", 0)
    assert (tmp_path / "a b" / "mine" / "adapter_model.safetensors").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path, capsys):
    assert run(["demo", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: `{tmp_path}` exists\nchoose another folder\n"
    with pytest.raises(OutputExists):
        copy_out(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_a_full_disk_is_said_once(tmp_path, capsys):
    import resource

    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
    try:
        assert run(["demo", str(tmp_path / "demo")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == f"error: `{tmp_path / 'demo'}`: File too large\n"
    assert not any(tmp_path.iterdir())
