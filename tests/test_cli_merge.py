"""`merge`: from a dataset, from weights, once more from a record, and all that can go wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
from conftest import screen

from lorameta_rs import Bank, token_distribution

TEXTS = {
    "hamlet": "to be or not to be that is the question",
    "macbeth": "out out brief candle life is but a walking shadow",
    "richard": "a horse a horse my kingdom for a horse",
}
WEIGHTS = "adapter_model.safetensors"
FILES = {WEIGHTS, "adapter_config.json", "lorameta.json", "README.md"}


@pytest.fixture
def written(make_bank):
    return make_bank({name: {"text": text} for name, text in TEXTS.items()}, tokenizer=True)


@pytest.fixture
def bank(written):
    return written.folder


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "new.txt"
    path.write_text("the question is to be")
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def listed(folder):
    """Every file below a folder with its bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


def tensors(folder):
    return safetensors.numpy.load_file(folder / WEIGHTS)


def test_a_dataset_becomes_an_adapter(written, dataset, out, lorameta):
    status, table, err = lorameta("merge", written.folder, dataset, "-o", out, "--method", "soup")
    assert status == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert [line.split("\t")[0] for line in table.splitlines()] == ["member", *TEXTS]
    assert f"wrote {out}" in err
    bank = Bank(written.folder)
    target = token_distribution(dataset, tokenizer=bank.tokenizer)
    coefficients = bank.rank(target).coefficients
    for name, tensor in tensors(out).items():
        members = [written.numbers[member][name] for member in bank.names]
        np.testing.assert_allclose(tensor, np.tensordot(coefficients, members, 1), rtol=1e-5)


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("memory", [1, 64])
def test_how_it_is_run_does_not_change_the_result(
    bank, dataset, out, lorameta, io, threads, memory
):
    options = ["--io", io, "--threads", threads, "--memory", memory, "--verify"]
    assert lorameta("merge", bank, dataset, "-o", out, *options)[0] == 0
    assert lorameta("merge", bank, dataset, "-o", out.with_name("plain"))[0] == 0
    assert (out / WEIGHTS).read_bytes() == (out.with_name("plain") / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_type_is_the_one_asked_for(bank, dataset, out, lorameta, dtype):
    assert lorameta("merge", bank, dataset, "-o", out, "--dtype", dtype)[0] == 0
    with safetensors.safe_open(out / WEIGHTS, "numpy") as file:
        types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert types == {{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]}


def test_several_datasets_take_one_pass(bank, dataset, out, lorameta):
    other = dataset.with_name("other.txt")
    other.write_text("my kingdom")
    status, _, err = lorameta("merge", bank, dataset, other, "-o", out)
    assert (status, err.count("wrote ")) == (0, 2)
    a, b = out.with_name("a"), out.with_name("b")
    status, text, _ = lorameta("merge", bank, dataset, other, "-o", a, "-o", b, "--json")
    assert [job["out"] for job in json.loads(text)["jobs"]] == [str(a), str(b)]
    assert tensors(a).keys() == tensors(out / "new").keys()
    assert (a / WEIGHTS).read_bytes() == (out / "new" / WEIGHTS).read_bytes()
    assert (b / WEIGHTS).read_bytes() == (out / "other" / WEIGHTS).read_bytes()
    alone = out.with_name("alone")
    lorameta("merge", bank, other, "-o", alone)
    assert (b / WEIGHTS).read_bytes() == (alone / WEIGHTS).read_bytes()


def test_weights_are_taken_as_they_are(written, tmp_path, out, lorameta):
    file = tmp_path / "weights.json"
    file.write_text('{"hamlet": 2}')
    options = ["--weights", file, "--weights", "macbeth=-1e-1", "--json", "--method", "soup"]
    status, text, _ = lorameta("merge", written.folder, *options, "-o", out)
    assert status == 0
    assert json.loads(text)["jobs"][0]["members"] == [
        {"name": "hamlet", "coefficient": 2.0},
        {"name": "macbeth", "coefficient": -0.1},
    ]
    for name, tensor in tensors(out).items():
        hamlet, macbeth = (written.numbers[member][name] for member in ("hamlet", "macbeth"))
        np.testing.assert_allclose(tensor, 2 * hamlet - 0.1 * macbeth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (["hamlt=1"], "weight of `hamlt`: the bank has no such member\ndid you mean `hamlet`?"),
        (["hamlet=much"], "the weight of `hamlet` is not a number"),
        (["hamlet=nan"], "not a finite number"),
        (["hamlet=1e300"], "weight of `hamlet`: 1e+300 is out of the range of float32"),
        (["hamlet=1e39"], "weight of `hamlet`: 1e+39 is out of the range of float32"),
        (["hamlet=1", "macbeth=1e-46"], "weight of `macbeth`: 1e-46 is out of the range"),
        (["hamlet=1", "hamlet=2"], "`hamlet=2`: the weight of `hamlet` is given twice"),
        (['{"hamlet": 1, "macbeth": 2, "hamlet": 3}'], "w.json`: `hamlet` is there twice"),
        (['{"hamlet": 1}', "hamlet=1"], "the weight of `hamlet` is given twice"),
        (["hamlet=0"], "at least one that is not 0"),
        (["hamlet"], "`hamlet`: No such file"),
        (["[1]"], "expected an object of names and numbers"),
        (["{"], "not JSON"),
        (["[" * 100_000], "not JSON"),
        (['{"hamlet": "1"}'], "the weight of `hamlet` is not a number"),
        (['{"hamlet": true}'], "the weight of `hamlet` is not a number"),
        (['{"hamlet": 1' + "0" * 5000 + "}"], "not a finite number"),
        (["n" * 300 + "=1"], f"weight of `{'n' * 300}`: the bank has no such member"),
        (["a\0b=1"], "the bank has no such member"),
        (['{"modules": ["("], "weights": {"hamlet": [1]}}'], "w.json`: the pattern `(` is not a"),
        (['{"modules": ["9"], "weights": {"hamlet": [1]}}'], "w.json`: no module of the bank ma"),
    ],
    ids=lambda value: value[0][:20] if isinstance(value, list) else "",
)
def test_bad_weights_are_explained(bank, tmp_path, out, lorameta, weights, words):
    for i, word in enumerate(weights):
        if word[0] in "[{":
            (tmp_path / "w.json").write_text(word)
            weights[i] = tmp_path / "w.json"
    options = [part for word in weights for part in ("--weights", word)]
    status, _, err = lorameta("merge", bank, *options, "-o", out)
    assert status == 1
    assert words in err
    assert not out.exists()


def test_weights_of_members_that_are_kept_out_say_why(bank, out, lorameta):
    weights = ["merge", bank, "-o", out, "--weights"]
    status, _, err = lorameta(*weights, "hamlet=1", "--exclude", "x", "--exclude", "ham*")
    assert status == 1
    assert err.endswith("error: `hamlet` is left out by --exclude `ham*`\n")
    assert lorameta("merge", bank, "-o", bank / "made", "--weights", "hamlet=1")[0] == 0
    status, _, err = lorameta(*weights, "made=1")
    assert status == 1
    assert f"`{bank / 'made'}` is no member: a merge has made it, and it has no dataset" in err


def test_what_merges_made_can_be_combined_in_a_folder_of_its_own(bank, tmp_path, out, lorameta):
    for name in ("hamlet", "macbeth"):
        made = tmp_path / "made" / name
        assert lorameta("merge", bank, "-o", made, "--weights", f"{name}=1")[0] == 0
    weights = ["--weights", "hamlet=0.5", "--weights", "macbeth=0.5", "--json"]
    status, text, _ = lorameta("merge", tmp_path / "made", "-o", out, *weights)
    names = [member["name"] for member in json.loads(text)["jobs"][0]["members"]]
    assert (status, names) == (0, ["hamlet", "macbeth"])


def test_a_member_that_is_left_out_is_an_error_where_it_was_named(bank, dataset, out, lorameta):
    (bank / "macbeth" / WEIGHTS).write_bytes(b"nothing")
    status, _, err = lorameta("merge", bank, dataset, "-o", out)
    assert (status, err.count("warning: `macbeth` is left out")) == (0, 1)
    arguments = ["--weights", "hamlet=1", "--weights", "macbeth=1", "-o", out.with_name("b")]
    status, _, err = lorameta("merge", bank, *arguments)
    assert (status, out.with_name("b").exists()) == (1, False)
    assert err.startswith(f"error: `{bank / 'macbeth' / WEIGHTS}`")
    arguments = ["--repeat", out / "lorameta.json", "-o", out.with_name("c"), "--force"]
    assert lorameta("merge", *arguments)[0] == 0


@pytest.mark.parametrize("base_model", [None, "other", "any"])
def test_members_of_another_base_are_refused_unless_asked_for(
    make_bank, dataset, out, lorameta, base_model
):
    other = {"text": "to be", "config": {"base_model_name_or_path": "other"}}
    bank = make_bank(
        {"a": {"text": "to be"}, "b": {"text": "or not"}, "c": other}, tokenizer=True
    ).folder
    options = [] if base_model is None else ["--base-model", base_model]
    status, text, err = lorameta("merge", bank, dataset, "-o", out, "--json", *options)
    names = sorted(member["name"] for member in json.loads(text)["jobs"][0]["members"])
    assert status == 0
    assert names == {None: ["a", "b"], "other": ["c"], "any": ["a", "b", "c"]}[base_model]
    assert ("is left out" in err) == (base_model != "any")
    again = out.with_name("again")
    assert lorameta("merge", "--repeat", out / "lorameta.json", "-o", again)[0] == 0
    assert (again / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()


def test_a_record_makes_the_same_adapter_again(bank, dataset, out, lorameta, tmp_path):
    lorameta("index", bank)
    options = ["--top-k", "2", "--dtype", "bfloat16"]
    assert lorameta("merge", bank, dataset, "-o", out, *options)[0] == 0
    again = out.with_name("again")
    status, _, err = lorameta("merge", "--repeat", out / "lorameta.json", "-o", again)
    assert (status, "warning" in err) == (0, False)
    assert (again / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    assert (again / "lorameta.json").read_bytes() == (out / "lorameta.json").read_bytes()
    card = (out / "README.md").read_text()
    assert "# out\n" in card
    assert (again / "README.md").read_text() == re.sub(r"\bout\b", "again", card)
    # A copy has other times than the index says, and another place than the record.
    shutil.copytree(bank, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(bank)
    copied = ["merge", tmp_path / "copy", "--repeat", out / "lorameta.json", "--force"]
    assert lorameta(*copied, "-o", again)[0] == 0
    assert (again / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    said = (again / "lorameta.json").read_text().replace(str(tmp_path / "copy"), str(bank))
    assert said == (out / "lorameta.json").read_text()


def test_a_record_is_refused_where_a_member_has_changed(written, dataset, out, lorameta):
    lorameta("index", written.folder)
    lorameta("merge", written.folder, dataset, "-o", out)
    repeat = ["merge", "--repeat", out / "lorameta.json", "-o", out.with_name("again")]
    written.edit("macbeth", lambda tensors: next(iter(tensors.values())).fill(1))
    status, _, err = lorameta(*repeat)
    assert status == 1
    assert f"`{written.weights('macbeth')}` is not the file that" in err
    shutil.rmtree(written.folder / "macbeth")
    status, _, err = lorameta(*repeat)
    assert status == 1
    assert "has no member `macbeth`, which" in err
    assert not out.with_name("again").exists()


def test_a_bank_that_was_never_indexed_is_known_again(bank, dataset, out, lorameta):
    assert lorameta("merge", bank, dataset, "-o", out)[0] == 0
    assert (bank / "index.json").exists()
    repeat = ["merge", "--repeat", out / "lorameta.json", "-o", out.with_name("b")]
    assert lorameta(*repeat)[0] == 0
    assert (out / WEIGHTS).read_bytes() == (out.with_name("b") / WEIGHTS).read_bytes()
    shutil.copy(bank / "macbeth" / WEIGHTS, bank / "hamlet" / WEIGHTS)
    status, _, err = lorameta(*repeat, "--force")
    assert (status, "is not the file that" in err) == (1, True)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"format": 2}', '{"format": 1}'])
def test_a_broken_record_is_refused(tmp_path, out, lorameta, text):
    (tmp_path / "lorameta.json").write_text(text)
    status, _, err = lorameta("merge", "--repeat", tmp_path / "lorameta.json", "-o", out)
    assert status == 1
    assert f"`{tmp_path / 'lorameta.json'}`" in err


def test_verify_finds_a_file_that_was_changed_in_secret(bank, dataset, out, lorameta):
    lorameta("index", bank)
    file = bank / "hamlet" / WEIGHTS
    stat = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    status, _, err = lorameta("merge", bank, dataset, "-o", out, "--verify")
    assert (status, out.exists()) == (1, False)
    assert f"`{file}` has SHA-256" in err


def test_a_dry_run_writes_nothing_at_all(bank, dataset, out, lorameta):
    before = listed(bank)
    status, table, err = lorameta("merge", bank, dataset, "-o", out, "--dry-run")
    assert (status, len(table.splitlines())) == (0, 4)
    assert "would read" in err
    status, text, _ = lorameta("merge", bank, dataset, "-o", out, "--dry-run", "--json")
    plan = json.loads(text)["plan"]
    assert plan["bytes"] == sum(
        tensor.nbytes for name in TEXTS for tensor in tensors(bank / name).values()
    )
    assert plan["index_bytes"] == sum((bank / name / WEIGHTS).stat().st_size for name in TEXTS)
    assert listed(bank) == before
    assert not out.exists()
    assert lorameta("index", bank)[0] == 0
    _, text, _ = lorameta("merge", bank, dataset, "-o", out, "--dry-run", "--json")
    assert json.loads(text)["plan"]["index_bytes"] == 0


def test_what_a_dense_sum_takes_is_said_before_it_begins(written, out, lorameta):
    dense = ["--method", "ties_svd", "--density", "0.5"]
    command = ["merge", written.folder, "--weights", "hamlet=1", "-o", out]
    status, _, err = lorameta(*command, *dense)
    first, *_ = err.splitlines()
    assert (status, re.match(r"ties_svd takes [\d.]+ [kM]B of buffers", first) is not None) == (
        0,
        True,
    )
    status, _, err = lorameta(*command, "--method", "svd", "--force")
    assert (status, " takes " in err) == (0, False)


def test_only_members_that_take_part_are_said_to_lack_modules(make_bank, out, lorameta):
    every = {f"layers.{i}.q": (5, 7) for i in range(2)}
    own = {f"m{i}": {"modules": dict(list(every.items())[i > 1 :])} for i in range(6)}
    folder = make_bank(own).folder

    def warned(*names):
        weights = [word for name in names for word in ("--weights", f"{name}=0.5")]
        status, _, err = lorameta("merge", folder, *weights, "-o", out, "--dry-run")
        return status, [line for line in err.splitlines() if line.startswith("warning")]

    assert warned("m0", "m1") == (0, [])
    assert warned("m4", "m5") == (0, [])
    one = "warning: `m2`: has no `layers.0.q`, which others have; it counts as zero there"
    assert warned("m0", "m2") == (0, [one])
    (line,) = warned(*own)[1]
    assert line.startswith("warning: `m2`, `m3`, `m4` and 1 other member lack modules that others")
    assert warned("m0", "nobody") == (1, [])


def test_the_paper_is_not_told_of_methods_that_it_refuses(make_bank, dataset, out, lorameta):
    texts = {name: {"text": text, "rank": i + 2} for i, (name, text) in enumerate(TEXTS.items())}
    folder = make_bank(texts, tokenizer=True).folder
    command = ["merge", folder, dataset, "-o", out, "--paper"]
    status, _, err = lorameta(*command)
    assert (status, "`--method svd` and `--method cat` take any ranks" in err) == (1, True), err
    status, _, err = lorameta(*command, "--method", "svd")
    assert (status, "--method has no effect beside --paper" in err) == (2, True)
    status, _, err = lorameta(*command, "--refine", "base.gguf")
    assert (status, "--refine has no effect beside --paper" in err) == (2, True)
    assert lorameta(*command[:-1], "--method", "svd")[0] == 0


def test_an_output_is_replaced_only_by_force_and_only_if_it_is_ours(bank, dataset, out, lorameta):
    merge = ["merge", bank, dataset, "-o", out]
    assert lorameta(*merge)[0] == 0
    before = listed(out)
    status, _, err = lorameta(*merge)
    assert (status, listed(out)) == (1, before)
    assert f"error: `{out}` exists" in err
    assert lorameta(*merge, "--force", "--top-k", "1")[0] == 0
    assert listed(out) != before
    (out / "mine.txt").touch()
    assert lorameta(*merge, "--force")[0] == 1
    assert (out / "mine.txt").exists()


def spoil(written, *names, number=np.nan):
    """Put a number that is none into members' first tensors."""
    for name in names:
        written.edit(name, lambda tensors: next(iter(tensors.values())).fill(number))


def left_out(err):
    """The members that are said to be left out, as often as that is said."""
    return re.findall(r"^warning: `(\w+)` is left out", err, re.MULTILINE)


@pytest.mark.parametrize("number", [np.nan, -np.inf])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--method", "soup"),
        ("--method", "svd", "--normalize", "none"),
        ("--method", "cat"),
        ("--method", "ties_svd", "--density", "0.5"),
        ("--normalize", "none"),
        ("--format", "peft", "--format", "mlx"),
        ("--io", "mmap", "--dtype", "float16"),
    ],
    ids=" ".join,
)
def test_one_bad_member_is_left_out_of_a_bank_that_was_never_indexed(
    written, dataset, out, lorameta, options, number
):
    spoil(written, "hamlet", number=number)
    merge = ["merge", written.folder, dataset, *options, "-o"]
    status, table, err = lorameta(*merge, out)
    assert status == 0, err
    assert [line.split("\t")[0] for line in table.splitlines()] == ["member", "macbeth", "richard"]
    # As if it had not been there, and in the words of `index`.
    status, _, _ = lorameta(*merge, out.with_name("without"), "--exclude", "hamlet")
    assert status == 0
    got, want = listed(out), listed(out.with_name("without"))
    assert got.keys() == want.keys()
    weights = [path for path in got if path.suffix == ".safetensors"]
    assert [got[path] for path in weights] == [want[path] for path in weights] != []
    assert left_out(err) == ["hamlet"]
    (line,) = (line for line in err.splitlines() if line.startswith("warning: `hamlet`"))
    assert f"{written.weights('hamlet')}`: `{next(iter(written.numbers['hamlet']))}` holds" in line
    assert line in lorameta("index", written.folder)[2]
    assert sorted(path.name for path in out.parent.iterdir()) == ["new.txt", "out", "without"]


def test_all_bad_members_are_found_at_once(written, dataset, out, lorameta):
    spoil(written, "hamlet", "richard")
    status, table, err = lorameta("merge", written.folder, dataset, "-o", out)
    assert (status, len(table.splitlines()), left_out(err)) == (0, 2, ["hamlet", "richard"]), err
    again = ["merge", "--repeat", out / "lorameta.json", "-o", out.with_name("again")]
    assert lorameta(*again)[0] == 0
    assert (out / WEIGHTS).read_bytes() == (out.with_name("again") / WEIGHTS).read_bytes()


def test_a_bank_of_bad_members_is_refused(written, dataset, out, lorameta):
    spoil(written, *TEXTS)
    status, table, err = lorameta("merge", written.folder, dataset, "-o", out)
    assert (status, table, list(out.parent.iterdir())) == (1, "", [dataset])
    assert "none of 3 members can be used" in err
    assert str(written.weights("hamlet")) in err


def test_a_bad_member_that_is_not_chosen_does_not_matter(written, dataset, out, lorameta):
    merge = ["merge", written.folder, dataset, "--top-k", "1", "--json", "-o"]

    def chosen(name):
        status, text, err = lorameta(*merge, out.with_name(name))
        (job,) = json.loads(text)["jobs"]
        used = [one["name"] for one in job["members"] if one["coefficient"]]
        return status, used, left_out(err)

    first, second, third = (one["name"] for one in ranked(lorameta, written.folder, dataset))
    spoil(written, third)
    assert chosen("a") == (0, [first], [])
    spoil(written, first)
    assert chosen("b") == (0, [second], [first])
    spoil(written, second)
    assert lorameta(*merge, out)[0] == 1


def ranked(lorameta, bank, dataset):
    """The members of a bank as `rank` has them."""
    return json.loads(lorameta("rank", bank, dataset, "--json")[1])["members"]


def test_a_bad_member_is_left_out_of_several_merges(written, dataset, out, lorameta):
    spoil(written, "richard")
    other = dataset.with_name("other.txt")
    other.write_text("my kingdom")
    merge = ["merge", written.folder, dataset, other, "--json", "-o"]
    status, text, err = lorameta(*merge, out)
    assert (status, left_out(err)) == (0, ["richard"]), err
    for job in json.loads(text)["jobs"]:
        assert sorted(one["name"] for one in job["members"]) == ["hamlet", "macbeth"]
    assert lorameta(*merge, out.with_name("without"), "--exclude", "richard")[0] == 0
    for name in ("new", "other"):
        want = out.with_name("without") / name / WEIGHTS
        assert (out / name / WEIGHTS).read_bytes() == want.read_bytes()


def test_a_bad_member_is_left_out_of_a_dry_run_that_has_to_read(written, dataset, out, lorameta):
    """Whether `soup` would do; fingerprints that are not kept are made once more then."""
    spoil(written, "hamlet")
    before = listed(written.folder)
    merge = ["merge", written.folder, dataset, "-o", out, "--dry-run"]
    status, table, err = lorameta(*merge, "--normalize", "none")
    assert (status, len(table.splitlines()), left_out(err)) == (0, 3, ["hamlet"]), err
    status, table, err = lorameta(*merge)
    assert (status, len(table.splitlines()), left_out(err)) == (0, 4, []), err
    assert listed(written.folder) == before


def test_vectors_are_given_to_the_members_that_remain(written, dataset, out, lorameta):
    spoil(written, "macbeth")
    vectors = out.with_name("vectors.npz")
    np.savez(vectors, **{name: np.eye(4)[i] + 0.1 for i, name in enumerate([*TEXTS, "new"])})
    merge = ["merge", written.folder, dataset, "-o", out, "--vectors", vectors]
    status, table, err = lorameta(*merge, "--metric", "vectors")
    assert (status, len(table.splitlines()), left_out(err)) == (0, 3, ["macbeth"]), err


def test_bad_members_that_were_named_are_refused(written, dataset, out, lorameta):
    assert lorameta("merge", written.folder, dataset, "-o", out)[0] == 0
    spoil(written, "hamlet")
    again = out.with_name("again")
    tensor = next(iter(written.numbers["hamlet"]))
    for named, why in (
        (["--weights", "hamlet=1"], f"`{tensor}` holds NaN"),
        (["--repeat", out / "lorameta.json"], "is not the file"),
    ):
        status, _, err = lorameta("merge", written.folder, *named, "-o", again)
        assert (status, again.exists(), left_out(err)) == (1, False, [])
        assert f"`{written.weights('hamlet')}`" in err
        assert why in err


def test_nan_is_let_by_where_that_is_asked_for(written, dataset, out, lorameta):
    spoil(written, "hamlet")
    status, _, err = lorameta("merge", written.folder, dataset, "-o", out, "--allow-nan")
    assert (status, left_out(err)) == (0, []), err
    tensor = next(iter(written.numbers["hamlet"]))
    assert re.search(f"warning: `hamlet` is used all the same: .*`{re.escape(tensor)}` holds", err)
    assert any(np.isnan(tensor).any() for tensor in tensors(out).values())


def test_a_member_that_adds_nothing_is_said(written, dataset, out, lorameta):
    def silence(tensors):
        for name, numbers in tensors.items():
            numbers *= "lora_B" not in name

    written.edit("hamlet", silence)
    said = "warning: `hamlet` changes nothing in `model.layers.0.self_attn.q_proj`, `"
    for named in ([dataset], ["--weights", "hamlet=1"]):
        status, _, err = lorameta("merge", written.folder, *named, "-o", out, "--force")
        assert status == 0
        assert said in err
        assert "`base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight`" in err


def test_a_sum_out_of_range_is_no_fault_of_a_member(bank, dataset, out, lorameta):
    merge = ["merge", bank, dataset, "-o", out, "--scale", "1e9", "--dtype", "float16"]
    status, table, err = lorameta(*merge)
    assert (status, table, left_out(err), out.exists()) == (1, "", [], False)
    assert "the weighted sum is beyond the range of F16" in err


def test_nan_may_be_let_by_where_there_is_none(bank, dataset, out, lorameta):
    status, _, err = lorameta("merge", bank, dataset, "-o", out, "--allow-nan")
    assert (status, "`svd` could not decompose the NaN" in err) == (0, True), err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing option '-o'"),
        (["-o", "OUT"], "give one of: a DATASET, --weights, --repeat"),
        (["BANK", "-o", "OUT"], "give one of: a DATASET, --weights, --repeat"),
        (["BANK", "NEW", "--weights", "a=1", "-o", "OUT"], "give one of"),
        (["--weights", "a=1", "-o", "OUT"], "Missing argument 'BANK'"),
        (["BANK", "--weights", "a=1", "-o", "OUT", "-o", "B"], "give one -o"),
        (["BANK", "A", "B", "C", "-o", "OUT", "-o", "B"], "3 datasets, 2 -o"),
        (["BANK", "--weights", "a=1", "--top-k", "1", "-o", "OUT"], "--top-k has no effect"),
        (["BANK", "--weights", "a=1", "--no-calibration", "-o", "OUT"], "--calibration has no eff"),
        (["--repeat", "R", "--dtype", "float16", "-o", "OUT"], "--dtype has no effect"),
        (["--repeat", "R", "--drop-unsupported", "-o", "OUT"], "--drop-unsupported has no effect"),
        (["BANK", "NEW", "-o", "OUT", "--memory", "0"], "--memory"),
        (["BANK", "NEW", "-o", "OUT", "--memory", "9" * 30], "--memory"),
        (["BANK", "NEW", "-o", "OUT", "--threads", "-1"], "--threads"),
        (["BANK", "NEW", "-o", "OUT", "--io", "tape"], "--io"),
        (["BANK", "NEW", "-o", "OUT", "--dtype", "int8"], "--dtype"),
        (["BANK", "NEW", "-o", "OUT", "--method", "stew"], "--method"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_status_2(lorameta, arguments, words):
    status, out, err = lorameta("merge", *arguments)
    assert (status, out) == (2, "")
    assert words in err


def test_two_outputs_cannot_be_one(bank, dataset, out, lorameta):
    status, _, err = lorameta("merge", bank, dataset, dataset, "-o", out)
    assert (status, out.exists()) == (1, False)
    assert f"two outputs have the same path, `{out / 'new'}`\ngive each its own" in err


@pytest.mark.parametrize(
    "words", [["{bank}", "-o", ""], ["{bank}", "{new}", "-o", ""], ["", "{new}"]]
)
def test_a_path_that_is_empty_is_none(bank, dataset, lorameta, words):
    status, _, err = lorameta("merge", *(word.format(bank=bank, new=dataset) for word in words))
    assert (status, "it is empty" in err) == (2, True)


def test_arguments_in_the_wrong_order(bank, dataset, out, lorameta):
    status, _, err = lorameta("merge", dataset, bank, "-o", out)
    assert (status, f"`{dataset}` is a file; a bank is a folder" in err) == (1, True)


def test_a_record_knows_the_configurations(bank, dataset, out, lorameta):
    assert lorameta("merge", bank, dataset, "-o", out)[0] == 0
    config = bank / "hamlet" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 99}))
    status, _, err = lorameta("merge", "--repeat", out, "-o", out.with_name("again"))
    assert (status, f"`{config}` is not the file that" in err) == (1, True)


def test_a_record_of_a_bank_that_has_moved(bank, dataset, out, lorameta):
    assert lorameta("merge", bank, dataset, "-o", out)[0] == 0
    moved = bank.rename(bank.with_name("moved"))
    again = ["--repeat", out, "-o", out.with_name("again")]
    status, _, err = lorameta("merge", *again)
    assert (status, f"`{bank}`: there is no such bank any more\nsay where" in err) == (1, True)
    assert lorameta("merge", moved, *again)[0] == 0
    moved.rename(bank)
    assert (out / WEIGHTS).read_bytes() == (out.with_name("again") / WEIGHTS).read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to whole consoles")
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [("SIGINT", 130, ["interrupted"]), ("SIGTERM", 143, []), ("SIGHUP", 129, [])],
)
def test_an_interrupt_leaves_nothing(large_bank, tmp_path, number, status, said):
    out = tmp_path / "out"
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({str(i): 1 for i in range(800)}))
    command = [sys.executable, "-m", "lorameta_rs", "merge", large_bank, "--weights", weights]
    process = subprocess.Popen(
        [*command, "-o", out, "--threads", "1", "--method", "soup"], stderr=subprocess.PIPE
    )
    while process.poll() is None and not any(tmp_path.glob(".out.*/*")):
        time.sleep(0.001)
    process.send_signal(getattr(signal, number))
    _, err = process.communicate()
    assert process.returncode == status
    assert err.decode().split() == said
    assert list(tmp_path.iterdir()) == [weights]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such terminals")
def test_a_terminal_gets_the_progress(bank, dataset, out):
    import pty

    reader, terminal = pty.openpty()
    command = [sys.executable, "-m", "lorameta_rs", "merge", bank, dataset, "-o", out]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    text = screen(reader)
    assert done.returncode == 0
    for what in ("counting tokens", "counting the new tokens: 1", "merging"):
        assert what in text
    assert f"wrote {out}" in text
