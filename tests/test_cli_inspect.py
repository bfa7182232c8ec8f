"""`inspect`: what adapters are, and what is wrong with them."""

from __future__ import annotations

import json

import numpy as np
import pytest


@pytest.fixture
def written(make_bank):
    return make_bank({"a": {}, "b": {"rank": 4, "dtypes": "F16", "config": {"use_rslora": True}}})


@pytest.mark.parametrize("options", [[], ["--no-data"]], ids=str)
def test_a_bank_is_all_of_its_members(written, lorameta, options):
    status, out, err = lorameta("inspect", written.folder, "--json", *options)
    a, b = json.loads(out)
    assert (status, err) == (0, "")
    assert a == {
        "adapter": str(written.folder / "a"),
        "usable": True,
        "ranks": [2],
        "scalings": [2.0],
        "modules": 4,
        "dtypes": ["F32"],
        "bytes": written.weights("a").stat().st_size,
        "base_model": "base",
        "faults": [],
    }
    assert (b["ranks"], b["scalings"], b["dtypes"]) == ([4], [4.0], ["F16"])


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
    assert err.startswith(f"error: `{written.folder / 'a'}`: ")
    status, out, _ = lorameta("inspect", written.folder, "--json")
    assert (status, [one["usable"] for one in json.loads(out)]) == (1, [False, True])


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
