"""Parquet: what is read of it, in how much memory, and what is said about the bad ones."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys

import pytest

from lorameta_rs.dataset import texts
from lorameta_rs.errors import InvalidDataset

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def write(tmp_path):
    def write(table, **options):
        parquet.write_table(table, tmp_path / "d.parquet", **options)
        return tmp_path / "d.parquet"

    return write


@pytest.fixture
def taken():
    """Reads a file in a new process: how many rows it gave, its error, the memory it took."""
    if sys.platform != "linux":
        pytest.skip("the peak is asked of Linux's /proc")
    program = (
        "import re, sys; from pathlib import Path; import pyarrow.parquet\n"
        "from lorameta_rs.dataset import texts\n"
        "status = Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', status.read_text())[1])\n"
        "before, rows, fault = peak(), 0, ''\n"
        "try:\n"
        "    for _ in texts(sys.argv[1]): rows += 1\n"
        "except Exception as error: fault = str(error)\n"
        "print(rows, (peak() - before) << 10, fault)"
    )

    def taken(path):
        command = [sys.executable, "-c", program, path]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows, peak, fault = done.stdout.rstrip("\n").split(" ", 2)
        return int(rows), fault, int(peak)

    return taken


def test_plain_and_compressed(write, tmp_path):
    rows = 1000
    path = write(pyarrow.table({"x": range(rows), "text": [f"row {i}" for i in range(rows)]}))
    compressed = tmp_path / "d.parquet.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    for one in (path, compressed):
        assert list(texts(one)) == [f"row {i}" for i in range(rows)]
    with pytest.raises(InvalidDataset, match=r"d.parquet`: no field `y`, found `x`, `text`"):
        list(texts(path, columns=["y"]))
    with pytest.raises(InvalidDataset, match=r"row 11: longer than 5 characters"):
        list(texts(path, max_row=5))


def test_all_types_that_texts_are_made_of(write):
    chat = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    for column, expected in (
        (pyarrow.array(["ab"]).dictionary_encode(), "ab"),
        (pyarrow.array(["ab"], pyarrow.large_string()), "ab"),
        (pyarrow.array([["ab", "c"]]), "ab"),
        (pyarrow.array([[1, 2]], pyarrow.list_(pyarrow.uint16())), [1, 2]),
        (pyarrow.array([[1, 2]], pyarrow.list_(pyarrow.int64(), 2)), [1, 2]),
        (pyarrow.array(chat), "a\nb"),
    ):
        assert list(texts(write(pyarrow.table({"c": column})), columns=["c"])) == [expected]


@pytest.mark.parametrize(
    ("kind", "number"),
    [("timestamp[ms]", 2**62), ("date32[day]", 2**30), ("duration[s]", 2**62), ("binary", None)],
)
def test_other_types_are_refused_before_anything_is_read(write, kind, number):
    types = {
        "timestamp[ms]": pyarrow.timestamp("ms"),
        "date32[day]": pyarrow.date32(),
        "duration[s]": pyarrow.duration("s"),
        "binary": pyarrow.binary(),
    }
    column = pyarrow.array([number or b"a"], types[kind])
    # What is not needed may be anything.
    assert list(texts(write(pyarrow.table({"text": ["a"], "t": column})))) == ["a"]
    with pytest.raises(InvalidDataset) as caught:
        list(texts(write(pyarrow.table({"text": column}))))
    assert f"d.parquet`: column `text` is of type {kind}, expected text" in str(caught.value)


def test_values_that_python_has_no_form_for_are_refused(write):
    time = pyarrow.array([2**62], pyarrow.timestamp("ms"))
    column = pyarrow.StructArray.from_arrays([pyarrow.array(["a"]), time], ["content", "at"])
    chat = pyarrow.ListArray.from_arrays([0, 1], column)
    with pytest.raises(InvalidDataset, match="not valid parquet"):
        list(texts(write(pyarrow.table({"messages": chat}))))


def test_a_column_that_is_there_twice_is_refused(write):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text", "text"])
    with pytest.raises(InvalidDataset, match="column `text` is there twice"):
        list(texts(write(table)))


def test_memory_does_not_grow_with_row_groups(write, taken):
    column = pyarrow.array([os.urandom(2048).hex() for _ in range(20_000)])
    path = write(pyarrow.table({"text": column}), row_group_size=20_000)
    rows, fault, peak = taken(path)
    assert (rows, fault) == (20_000, "")
    assert path.stat().st_size > 40_000_000
    assert peak < path.stat().st_size // 2


def test_a_small_file_of_huge_rows_takes_little_memory(write, taken):
    path = write(pyarrow.table({"text": ["a " * 5_000_000] * 64}), compression="zstd")
    assert path.stat().st_size < 4096
    rows, fault, peak = taken(path)
    assert rows == 0
    assert "row 1: longer than 1,048,576 characters" in fault
    assert peak < 200 << 20
