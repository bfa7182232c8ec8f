"""`inspect`: what adapters are, and what is wrong with them."""

from __future__ import annotations

import json

import numpy as np
import pytest


@pytest.fixture
def written(make_bank):
    return make_bank({"a": {}, "b": {"rank": 4, "dtypes": "F16", "config": {"use_rslora": True}}})


def deltas(written, name, scale=2.0):
    """‖ΔW‖ of each module."""
    tensors = written.numbers[name]
    modules = sorted({tensor.partition(".lora_")[0] for tensor in tensors})
    return {
        module.removeprefix("base_model.model."): scale
        * np.linalg.norm(tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"])
        for module in modules
    }


@pytest.mark.parametrize("options", [[], ["--no-data"]], ids=str)
def test_a_bank_is_all_of_its_members(written, lorameta, options):
    status, out, err = lorameta("inspect", written.folder, "--json", *options)
    a, b = json.loads(out)["adapters"]
    assert (status, err) == (0, "")
    norms = {module: pytest.approx(norm, rel=1e-5) for module, norm in deltas(written, "a").items()}
    measured = {
        "norms": norms,
        "norm": pytest.approx(np.linalg.norm([*deltas(written, "a").values()])),
    }
    assert a == ({} if options else measured) | {
        "adapter": str(written.folder / "a"),
        "usable": True,
        "ranks": [2],
        "scalings": [2.0],
        "modules": 4,
        "dtypes": ["F32"],
        "bytes": written.weights("a").stat().st_size,
        "base_model": "base",
        "servers": a["servers"],
        "faults": [],
    }
    assert (b["ranks"], b["scalings"], b["dtypes"]) == ([4], [4.0], ["F16"])


@pytest.mark.parametrize("name", ["base.gguf", "model.safetensors", "learned.safetensors"])
def test_a_bank_may_have_other_files_beside_its_members(make_bank, lorameta, name):
    folder = make_bank(["a", "b"]).folder
    (folder / name).write_bytes(b"of the base")
    status, out, err = lorameta("inspect", folder, "--json")
    assert (status, len(json.loads(out))) == (0, 2), err


def test_an_adapter_alone_is_a_row(written, lorameta):
    status, out, _ = lorameta("inspect", written.folder / "b", written.folder / "a")
    header, *rows = [line.split("\t") for line in out.splitlines()]
    assert (status, [row[0] for row in rows]) == (
        0,
        [str(written.folder / name) for name in ("b", "a")],
    )
    assert header[:3] == ["adapter", "rank", "scaling"]


def test_what_cannot_be_used_is_said_and_is_status_1(written, lorameta):
    written.weights("a").write_bytes(b"no tensors")
    status, out, err = lorameta("inspect", written.folder)
    assert (status, len(out.splitlines())) == (1, 3)
    assert err.startswith(f"error: `{written.weights('a')}`: ")
    status, out, _ = lorameta("inspect", written.folder, "--json")
    assert (status, [one["usable"] for one in json.loads(out)["adapters"]]) == (1, [False, True])


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [(np.nan, 1, "NaN"), (np.inf, 1, "Inf"), (0.0, 0, "only zeros")],
)
def test_odd_numbers_are_found_in_the_data(written, lorameta, value, status, words):
    written.edit("a", lambda tensors: list(tensors.values())[1].fill(value))
    found, _, err = lorameta("inspect", written.folder)
    assert (found, words in err) == (status, True)
    assert list(written.numbers["a"])[1] in err
    assert lorameta("inspect", written.folder, "--no-data")[::2] == (0, "")


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 2), (["--nope"], 2), (["missing"], 1)], ids=str
)
def test_bad_command_lines(lorameta, arguments, status):
    found, out, err = lorameta("inspect", *arguments)
    assert (found, out) == (status, "")
    assert "rror: " in err


def test_an_empty_folder_has_no_adapter(tmp_path, lorameta):
    status, _, err = lorameta("inspect", tmp_path)
    assert status == 1
    assert f"`{tmp_path}` has no adapter" in err


def test_norms_of_every_module_are_printed(written, lorameta):
    _, out, _ = lorameta("inspect", written.folder / "a", "--norms")
    rows = [line.split("\t") for line in out.splitlines()[3:]]
    assert {module: float(norm) for _, module, norm in rows} == {
        module: pytest.approx(norm, rel=1e-3) for module, norm in deltas(written, "a").items()
    }


def test_members_that_began_from_one_a_are_grouped(make_bank, lorameta):
    written = make_bank("abcde")
    for name, first in (("c", "a"), ("d", "a"), ("e", "b")):
        near = {n: t * 1.5 + 0.01 for n, t in written.numbers[first].items() if "lora_A" in n}
        written.edit(name, lambda tensors, near=near: tensors.update(near))
    _, out, err = lorameta("inspect", written.folder, "--json")
    assert [[path[-1] for path in group] for group in json.loads(out)["shared_a"]] == [
        ["a", "c", "d"],
        ["b", "e"],
    ]
    _, _, err = lorameta("inspect", written.folder)
    assert err.count("began from the same A") == 2


def test_members_of_one_name_keep_their_own_norms(make_bank, lorameta):
    banks = [make_bank({"a": {"seed": seed}}) for seed in (1, 2)]
    _, out, _ = lorameta("inspect", *(bank.folder for bank in banks), "--json")
    for one, bank in zip(json.loads(out)["adapters"], banks, strict=True):
        assert one["norms"] == {
            module: pytest.approx(norm, rel=1e-5) for module, norm in deltas(bank, "a").items()
        }


def test_adapters_of_other_formats_are_rows(golden, lorameta):
    interop = golden / "interop"
    alone = [interop / "gguf" / "a_r8.f16.gguf", interop / "mlx" / "a_r8"]
    status, _, err = lorameta("inspect", alone[0])
    assert (status, "`--base-config`" in err) == (1, True)
    base = ["--base-config", interop / "gguf" / "base.gguf"]
    peft = golden / "peft_combine" / "adapters" / "a_r8"
    status, out, err = lorameta("inspect", *alone, peft, *base, "--json")
    assert status == 0, err
    packed, mlx, known = json.loads(out)["adapters"]
    paths = [str(path) for path in (*alone, peft)]
    assert [one["adapter"] for one in (packed, mlx, known)] == paths
    assert json.loads(out)["shared_a"] == [paths]
    assert packed["scalings"] == known["scalings"] == [2.0]
    assert mlx["norm"] == pytest.approx(known["norm"], rel=1e-6)
    assert packed["norm"] == pytest.approx(known["norm"], rel=1e-3)
