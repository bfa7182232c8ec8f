"""The documents, executed: what README.md and docs/method.md show works, in the order shown."""

from __future__ import annotations

import doctest
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from words import rows_of, write_bank

from lorameta_rs.cli import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHOD = ROOT / "docs" / "method.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLING = "python3 -m venv", ".venv/bin/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def test_the_readme_works_from_top_to_bottom(folder, capsys):
    executed = 0
    for language, block in BLOCK.findall(README):
        if language == "python":
            exec(compile(block, "README.md", "exec"), {})
        elif language == "sh":
            # What is installed is what is tested; of the quick start the program itself is left.
            for line in block.replace(".venv/bin/lorameta-rs", "lorameta-rs").splitlines():
                command = line.rpartition(" && ")[2]
                if command.startswith(INSTALLING):
                    continue
                program, *arguments = shlex.split(command)
                assert (program, run(arguments)) == ("lorameta-rs", 0), capsys.readouterr().err
                executed += 1
    assert executed >= 8
    for out in ("mine", "half", "again", "predicted"):
        assert weights(folder / out)
    assert weights(folder / "again") == weights(folder / "mine")


def test_the_page_of_runtimes_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
    lines = [line for language, block in BLOCK.findall(page) for line in block.splitlines()]
    for line in lines:
        program, *arguments = shlex.split(line)
        assert (program, run(arguments)) == ("lorameta-rs", 0), capsys.readouterr().err
    assert len(lines) == 6
    demo = Path("lorameta-demo", "adapter", "lorameta.json").read_text()
    assert json.loads(demo)["settings"]["base"]["heads"] == 4
    assert (tmp_path / "mine.gguf").read_bytes()[:4] == b"GGUF"


def test_the_page_of_answers_works(golden, tmp_path, monkeypatch, capsys):
    pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel for this platform")
    monkeypatch.chdir(tmp_path)
    write_bank(golden, tmp_path / "bank")
    (tmp_path / "bank" / "bank.toml").write_text('[families]\na_r8 = "x"\nb_r8 = "y"\n')
    shutil.copy(golden / "interop" / "gguf" / "base.gguf", tmp_path)
    for name in ("mine", "half"):
        shutil.copytree(golden / "peft_combine" / "adapters" / "a_r8", tmp_path / name)
    (tmp_path / "new.jsonl").write_text(rows_of(4, 12))
    for test in (tmp_path / "test.jsonl", tmp_path / "bank" / "a_r8" / "test.jsonl"):
        test.write_text(rows_of(2, 4))
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    lines = [line for language, block in BLOCK.findall(page) for line in block.splitlines()]
    for line in lines:
        program, *arguments = shlex.split(line)
        assert (program, run(arguments)) == ("lorameta-rs", 0), capsys.readouterr().err
    assert len(lines) == 6
    assert weights(tmp_path / "better")


def weights(adapter):
    return (adapter / "adapter_model.safetensors").read_bytes()


def test_the_method_page_says_what_is_so(folder, capsys):
    if not (folder / "lorameta-demo").exists():
        run(["demo"])
    failed, tried = doctest.testfile(str(METHOD), module_relative=False, encoding="utf-8")
    assert (failed, tried > 8) == (0, True), capsys.readouterr().out


def test_the_two_commands_of_the_quick_start_are_two_lines():
    commands = [block for language, block in BLOCK.findall(README) if language == "sh"]
    first, second, *_ = commands
    assert first.startswith(INSTALLING[0])
    assert first.endswith("lorameta-rs demo\n")
    assert second.startswith(INSTALLING[1])
    assert second.endswith("pytest\n")
    assert first.count("\n") == second.count("\n") == 1


def test_the_rust_that_is_asked_for_is_the_one_that_is_needed():
    needed = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["rust-version"]
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert f"Rust {needed} or newer" in document


def test_the_readme_is_short_and_its_links_are_there():
    assert len(README.splitlines()) < 150
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
