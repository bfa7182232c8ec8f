"""`rank`: what it prints equals what the library says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import screen

from lorameta_rs import Bank, token_distribution

FULL = Path("/dev/full")
MALFORMED = sorted((Path(__file__).parent / "golden" / "malformed" / "datasets").iterdir())
TEXTS = {
    "hamlet": "to be or not to be that is the question",
    "macbeth": "out out brief candle life is but a walking shadow",
    "richard": "a horse a horse my kingdom for a horse",
}
CHOICES = [
    {},
    {"metric": "kl"},
    {"metric": "wasserstein"},
    {"metric": "mmd"},
    {"metric": "cosine", "min_similarity": 0.01},
    {"pipeline": "attentional"},
    {"pipeline": "nearest"},
    {"pipeline": "uniform"},
    {"temperature": 0.1, "top_k": 2},
    {"mass": 0.5},
]


@pytest.fixture
def bank(make_bank):
    return make_bank({name: {"text": text} for name, text in TEXTS.items()}, tokenizer=True).folder


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "new.txt"
    path.write_text("the question is to be")
    return path


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_json_is_what_the_library_says(bank, dataset, lorameta, chosen):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    status, out, err = lorameta("rank", bank, dataset, *options, "--json")
    assert (status, err) == (0, "")
    opened = Bank(bank)
    target = token_distribution(dataset, tokenizer=opened.tokenizer)
    expected = opened.rank(target, **chosen)
    found = json.loads(out)
    assert [member["name"] for member in found["members"]] == [
        expected.names[i] for i in expected.nearest_first()
    ]
    for member, i in zip(found["members"], expected.nearest_first(), strict=True):
        assert member["distance"] == expected.distances[i]
        assert member["coefficient"] == expected.coefficients[i]
        similarity = None if expected.similarity is None else expected.similarity[i]
        assert member["similarity"] == similarity
    assert found["relevance"]["effective_number"] == expected.relevance.effective_number
    assert chosen.items() <= found["settings"].items()


def test_a_program_reads_columns_and_a_person_the_rest(bank, dataset, lorameta):
    status, out, err = lorameta("rank", bank, dataset)
    header, *rows = [line.split("\t") for line in out.splitlines()]
    assert status == 0
    assert header == ["member", "distance", "similarity", "coefficient"]
    assert [row[0] for row in rows] == ["hamlet", "macbeth", "richard"]
    assert sum(float(row[3]) for row in rows) == pytest.approx(1, abs=2e-4)
    assert "nearest is `hamlet`" in err
    assert "of 3 adapters take part" in err


def test_a_far_dataset_is_warned_about_once(bank, tmp_path, lorameta):
    (tmp_path / "far.txt").write_text("ζ ζ ζ")
    status, _, err = lorameta("rank", bank, tmp_path / "far.txt")
    assert status == 0
    assert err.count("warning: no member of the bank is close") == 1
    assert "nearest is `hamlet` at" not in err.replace("`hamlet` is nearest", "")


def test_a_doubtful_dataset_is_warned_about_once(bank, tmp_path, lorameta):
    path = tmp_path / "twice.jsonl"
    path.write_text('{"text": "a", "text": "to be"}\n' * 3)
    status, _, err = lorameta("rank", bank, path)
    assert status == 0
    assert err.count("field `text` is given twice") == 1


def test_excluded_members_are_not_there(bank, dataset, lorameta):
    _, out, _ = lorameta("rank", bank, dataset, "--exclude", "mac*", "--exclude", "richard")
    assert [line.split("\t")[0] for line in out.splitlines()] == ["member", "hamlet"]


def test_columns_are_those_of_the_new_dataset_alone(bank, tmp_path, lorameta):
    lorameta("index", bank)
    before = {path: path.read_bytes() for path in bank.rglob("fingerprint.safetensors")}
    new = tmp_path / "new.csv"
    new.write_text(f"x,text\n{TEXTS['hamlet']},nothing\n")
    status, out, err = lorameta("rank", bank, new, "--columns", "x", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["members"][0]["distance"] == 0
    assert {path: path.read_bytes() for path in bank.rglob("fingerprint.safetensors")} == before


def test_members_are_compared_by_the_columns_they_were_indexed_with(make_bank, tmp_path, lorameta):
    bank = make_bank(["a", "b"], tokenizer=True).folder
    for name in "ab":
        (bank / name / "train.csv").write_text("x,y,z\none,two,three\n")
    new = tmp_path / "new.csv"
    new.write_text("text,x,y\nnothing,one,two\n")
    status, _, err = lorameta("rank", bank, new, "--columns", "x,y")
    assert status == 1
    assert "for a member of a bank, `index --columns`" in err
    assert lorameta("index", bank, "--columns", "x, y")[0] == 0
    status, out, err = lorameta("rank", bank, new, "--columns", "x,y", "--json")
    assert (status, "be made again" in err) == (0, False)
    assert [member["distance"] for member in json.loads(out)["members"]] == [0, 0]
    (bank / "b" / "train.csv").write_text("x,y,z\none,one,three\n")
    _, out, err = lorameta("rank", bank, new, "--columns", "x,y", "--json")
    assert "1 fingerprint to be made again, of `b`: " in err
    assert [member["distance"] > 0 for member in json.loads(out)["members"]] == [False, True]


@pytest.mark.parametrize("command", ["rank", "merge"])
def test_what_is_made_again_is_said_once_with_a_reason(bank, dataset, tmp_path, lorameta, command):
    options = [] if command == "rank" else ["-o", tmp_path / "out"]
    lorameta("index", bank)
    assert "be made again" not in lorameta(command, bank, dataset, *options)[2]
    (bank / "macbeth" / "train.txt").write_text("tomorrow and tomorrow")
    options += [] if command == "rank" else ["--force"]
    _, _, err = lorameta(command, bank, dataset, *options)
    file = bank / "macbeth" / "fingerprint.safetensors"
    changed = f"its dataset `{bank / 'macbeth' / 'train.txt'}` has changed"
    assert (
        err.splitlines()[0] == f"1 fingerprint to be made again, of `macbeth`: `{file}`: {changed}"
    )
    (bank / "tokenizer.json").write_text((bank / "tokenizer.json").read_text() + "\n")
    _, _, err = lorameta(command, bank, dataset, *options)
    assert err.startswith(
        "3 fingerprints to be made again, of `hamlet`, `macbeth`, `richard`: the first"
    )
    assert f"another tokenizer than `{bank / 'tokenizer.json'}`" in err
    assert "be made again" not in lorameta(command, bank, dataset, *options)[2]


def test_a_bank_of_one_has_no_distances_to_index(make_bank, dataset, lorameta):
    bank = make_bank({"a": {"text": "to be"}}, tokenizer=True).folder
    status, _, err = lorameta("rank", bank, dataset)
    assert (status, "lorameta-rs index" in err) == (0, False)
    assert "nearest is `a` at " in err


def test_what_a_merge_made_is_no_member_of_the_bank(bank, dataset, lorameta):
    assert lorameta("merge", bank, dataset, "-o", bank / "made")[0] == 0
    status, out, err = lorameta("rank", bank, dataset, "--json")
    assert (status, err) == (0, "")
    assert {member["name"] for member in json.loads(out)["members"]} == set(TEXTS)


def test_fingerprints_can_be_kept_elsewhere(bank, dataset, tmp_path, lorameta):
    before = sorted(bank.rglob("*"))
    kept = tmp_path / "kept"
    for _ in range(2):
        assert lorameta("rank", bank, dataset, "--fingerprints", kept)[0] == 0
    assert sorted(bank.rglob("*")) == before
    assert {path.parent.name for path in kept.rglob("fingerprint.safetensors")} == set(TEXTS)


def test_a_bank_that_cannot_be_written_to_is_used_all_the_same(
    bank, dataset, lorameta, monkeypatch
):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(bank))

    monkeypatch.setattr("lorameta_rs.fingerprint.files.write_whole", refuse)
    status, out, err = lorameta("rank", bank, dataset)
    assert (status, len(out.splitlines())) == (0, 4)
    assert err.count("--fingerprints DIR") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-k", "0"], "top-k 0: expected 1 or more"),
        (["--mass", "0"], "mass 0.0"),
        (["--mass", "1.5"], "mass 1.5"),
        (["--min-similarity", "0.99", "--metric", "js"], "the most similar member has"),
        (
            ["--min-similarity", "0.1", "--metric", "kl"],
            "only the metrics js, relations, cosine and vectors",
        ),
        (["--temperature", "0"], "temperature 0.0"),
        (["--temperature", "nan"], "temperature nan"),
        (["--temperature", "2", "--pipeline", "nearest"], "has no temperature"),
        (["--columns", "nope"], "no field `nope`"),
        (["--base-model", "other"], "`base_model_name_or_path` is `base`, the bank's is `other`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit_are_explained(bank, tmp_path, lorameta, options, words):
    (tmp_path / "new.jsonl").write_text('{"text": "the question is to be"}\n')
    status, out, err = lorameta("rank", bank, tmp_path / "new.jsonl", *options)
    assert (status, out) == (1, "")
    assert words in err
    assert "error: " in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["BANK"],
        ["BANK", "NEW", "EXTRA"],
        ["BANK", "NEW", "--metric", "euclid"],
        ["BANK", "NEW", "--top-k", "many"],
        ["BANK", "NEW", "--columns", "a,,b"],
        ["BANK", "NEW", "--nope"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_cannot_be_read_is_status_2(lorameta, arguments):
    status, out, err = lorameta("rank", *arguments)
    assert (status, out) == (2, "")
    assert "Usage: lorameta-rs rank" in err


def test_missing_things_are_named(bank, dataset, tmp_path, lorameta):
    for arguments in ((bank, tmp_path / "nope.txt"), (tmp_path / "nope", dataset)):
        status, _, err = lorameta("rank", *arguments)
        assert status == 1
        assert f"error: `{tmp_path / 'nope'}" in err
        assert "[Errno" not in err


@pytest.mark.parametrize("name", ["a\x1b[31mb", "tab\tnewline\n"])
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_cannot_write_to_the_screen(make_bank, dataset, lorameta, name):
    bank = make_bank({name: {"text": "to be"}, "b": {"text": "or not"}}, tokenizer=True).folder
    _, out, err = lorameta("rank", bank, dataset)
    assert "\x1b" not in out + err
    assert {line.count("\t") for line in out.splitlines()} == {3}
    assert name in {
        m["name"] for m in json.loads(lorameta("rank", bank, dataset, "--json")[1])["members"]
    }


@pytest.mark.parametrize("path", MALFORMED, ids=lambda path: path.name)
def test_a_malformed_dataset_is_read_or_named(bank, lorameta, path):
    status, out, err = lorameta("rank", bank, path)
    assert (status, bool(out)) in ((0, True), (1, False))
    assert status == 0 or f"error: `{path}`" in err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such terminals")
def test_a_terminal_gets_an_aligned_table(bank, dataset):
    import pty

    reader, terminal = pty.openpty()
    done = process("rank", bank, dataset, stdout=terminal, stderr=terminal)
    os.close(terminal)
    text = screen(reader)
    table = [line for line in text.splitlines() if line.startswith(tuple(TEXTS))]
    assert done.returncode == 0
    assert len(table) == 3
    assert len({len(line) for line in table}) == 1
    assert "counting tokens" in text
    assert "counting the new tokens: 1" in text
    assert "\t" not in text


def process(*arguments, **options):
    """The real program, run to its end."""
    command = [sys.executable, "-m", "lorameta_rs", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, check=False, encoding="utf-8", errors="replace", **options)


def test_order_holds_where_both_streams_are_one_file(bank, dataset):
    lines = process("rank", bank, dataset, stderr=subprocess.STDOUT).stdout.splitlines()
    assert lines[0].startswith("member\t")
    assert lines[-1].startswith("in effect ")


def test_a_reader_that_has_seen_enough_is_no_error(bank, dataset):
    read, write = os.pipe()
    os.close(read)
    done = process("rank", bank, dataset, stdout=write)
    os.close(write)
    assert done.returncode == 0
    assert "nearest is" in done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
def test_an_output_that_takes_no_more_is_an_error(bank, dataset):
    with FULL.open("w") as full:
        done = process("rank", bank, dataset, stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_names_that_the_output_cannot_hold_are_escaped(make_bank, dataset):
    bank = make_bank({"a": {"text": "to be"}, "雪": {"text": "or not"}}, tokenizer=True).folder
    done = process("rank", bank, dataset, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0
    assert "\\u96ea\t" in done.stdout


def test_a_dataset_that_is_closed_is_status_1(bank, dataset, as_nobody):
    dataset.chmod(0)
    found = as_nobody(
        "import sys; sys.stderr = sys.stdout\nfrom lorameta_rs.cli import run\n"
        f"print(run(['rank', {str(bank)!r}, {str(dataset)!r}]))"
    )
    assert found.endswith(f"error: `{dataset}`: Permission denied\n1\n")
