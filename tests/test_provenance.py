"""`lorameta.json`: what an adapter was made of, and that it can be made of it again."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

import numpy as np
import pytest

from lorameta_rs import Bank, generate
from lorameta_rs.errors import InvalidSetting, MissingFile, UnreadableFile
from lorameta_rs.index import hash_adapters
from lorameta_rs.merge import Options, merge
from lorameta_rs.provenance import Provenance
from lorameta_rs.ranking import Settings
from lorameta_rs.repeat import RepeatedJob

FIELDS = ["format", "version", "settings", "target", "method", "relevance", "members"]
OF_A_MEMBER = [
    *("name", "path", "sha256", "config_sha256"),
    *("distance", "similarity", "coefficient"),
]


@pytest.fixture(scope="module")
def folder(make_bank):
    """A bank whose members are not in the order in which they were written."""
    own = {name: {"text": f"{name} where is the window\n" * 3} for name in "cab"}
    return make_bank(own, tokenizer=True).folder


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "new.txt").write_text("a window\nis where?\n")
    return tmp_path / "new.txt"


def test_of_a_dataset(folder, dataset, tmp_path):
    hash_adapters(Bank(folder))
    options = Options(method="soup", dtype="bfloat16", threads=1, memory=8 << 20)
    settings = Settings(metric="cosine", temperature=0.3, top_k=2)
    found = generate(folder, dataset, tmp_path / "out", settings=settings, options=options)
    record = json.loads((tmp_path / "out" / "lorameta.json").read_text(encoding="utf-8"))
    assert list(record) == FIELDS
    assert (record["format"], record["version"]) == (1, version("lorameta-rs"))
    assert record["settings"] == {
        "bank": str(folder),
        "base_model": "base",
        "drop_unsupported": False,
        "dtype": "bfloat16",
        "allow_nan": False,
        "rank": None,
        "energy": None,
        "normalize": "none",
        "density": None,
        "majority_sign": "total",
        "seed": 0,
        "memory": 8 << 20,
        "formats": ["peft"],
        "metric": "cosine",
        "pipeline": "normalized",
        "temperature": 0.3,
        "scale": 1.0,
        "top_k": 2,
        "mass": None,
        "min_similarity": None,
        "compat": None,
        "columns": None,
    }
    digest = hashlib.sha256(dataset.read_bytes()).hexdigest()
    assert record["target"] == {"path": str(dataset), "sha256": digest}
    assert record["method"] == "soup"
    assert record["relevance"] == vars(found.relevance)
    used = np.flatnonzero(found.coefficients)
    assert [member["name"] for member in record["members"]] == [found.names[i] for i in used]
    for i, member in zip(used, record["members"], strict=True):
        assert list(member) == OF_A_MEMBER
        weights = folder / member["name"] / "adapter_model.safetensors"
        assert member["path"] == str(weights.parent)
        assert member["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        config = weights.with_name("adapter_config.json")
        assert member["config_sha256"] == hashlib.sha256(config.read_bytes()).hexdigest()
        # In full precision: read back, they are the same numbers.
        assert member["distance"] == found.distances[i]
        assert member["similarity"] == found.similarity[i]
        assert member["coefficient"] == found.coefficients[i]


def test_of_weights(folder, tmp_path):
    row = np.array([0.1 + 0.2, 0.0, -1 / 3])
    Bank(folder).merge(row, tmp_path / "out", allow_nan=True, method="soup")
    record = Provenance.load(tmp_path / "out" / "lorameta.json")
    assert (record.target, record.relevance) == (None, None)
    assert record.settings == {
        "bank": str(folder),
        "base_model": "base",
        "drop_unsupported": False,
        "dtype": "float32",
        "allow_nan": True,
        "rank": None,
        "energy": None,
        "normalize": "none",
        "density": None,
        "majority_sign": "total",
        "seed": 0,
        "memory": 64 << 20,
        "formats": ["peft"],
    }
    assert record.coefficients == {"a": row[0], "c": row[2]}
    assert all(member["distance"] is None for member in record.members)
    assert record.effective_number == pytest.approx(
        np.exp(-sum(p * np.log(p) for p in abs(row[[0, 2]]) / abs(row).sum()))
    )


def test_hashes_that_nobody_made_are_made_of_those_that_are_used(make_bank, tmp_path):
    bank = Bank(make_bank().folder)
    bank.merge([1.0, 0.0, 1.0], tmp_path / "out", method="soup")
    assert bank.index.adapters.keys() == {"a", "c"}
    for member in Provenance.load(tmp_path / "out" / "lorameta.json").members:
        weights = bank.folder / member["name"] / "adapter_model.safetensors"
        assert member["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_it_is_enough_to_make_the_adapter_again(folder, dataset, tmp_path, dtype):
    generate(folder, dataset, tmp_path / "out", options=Options(method="soup", dtype=dtype))
    record = Provenance.load(tmp_path / "out" / "lorameta.json")
    bank = Bank(record.settings["bank"], base_model=record.settings["base_model"])
    row = [record.coefficients.get(name, 0.0) for name in bank.names]
    bank.merge(row, tmp_path / "again", dtype=record.settings["dtype"], threads=1, method="soup")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_done_again_it_says_the_same(folder, dataset, tmp_path):
    generate(folder, dataset, tmp_path / "out", settings=Settings(temperature=0.01), options=SOUP)
    record = Provenance.load(tmp_path / "out" / "lorameta.json")
    # So small that nobody may give it as a weight; as a record of what was done it is right.
    record.members[-1]["coefficient"] = 1e-50
    bank = Bank(folder)
    merge(bank, [RepeatedJob.of(record, bank, tmp_path / "again")], Options(method="soup"))
    assert Provenance.load(tmp_path / "again" / "lorameta.json") == record
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "by how" not in card
    assert "each weighs the more" in card


def test_done_again_the_least_that_is_a_record_is_completed(folder, tmp_path):
    (tmp_path / "lorameta.json").write_text(json.dumps(RECORD))
    record = Provenance.load(tmp_path / "lorameta.json")
    bank = Bank(folder)
    merge(bank, [RepeatedJob.of(record, bank, tmp_path / "again")], Options(method="soup"))
    found = Provenance.load(tmp_path / "again" / "lorameta.json")
    assert found.version == version("lorameta-rs")
    assert found.settings["bank"] == str(folder)
    (member,) = found.members
    assert list(member) == OF_A_MEMBER
    assert (member["path"], member["distance"]) == (str(folder / "a"), None)
    assert "by coefficients that" in (tmp_path / "again" / "README.md").read_text()


def test_what_is_written_is_what_is_read(folder, dataset, tmp_path):
    generate(folder, dataset, tmp_path / "out")
    path = tmp_path / "out" / "lorameta.json"
    assert Provenance.load(path).as_json() == path.read_text(encoding="utf-8")


SOUP = Options(method="soup")

RECORD = {
    "format": 1,
    "version": "0",
    "settings": {"bank": "bank", "base_model": None, "dtype": "float32", "allow_nan": False},
    "target": None,
    "method": "soup",
    "relevance": None,
    "members": [{"name": "a", "sha256": "0", "coefficient": 1}],
}


def test_the_least_that_is_a_record(tmp_path):
    (tmp_path / "lorameta.json").write_text(json.dumps(RECORD))
    assert Provenance.load(tmp_path / "lorameta.json").coefficients == {"a": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"members": None},
        {"members": [3]},
        {"members": [{"name": "a", "sha256": "0"}]},
        {"members": [{"name": "a", "sha256": None, "coefficient": 1}]},
        {"members": [{"name": "a", "coefficient": 1}]},
        {"settings": {"bank": "bank"}},
        {"settings": RECORD["settings"] | {"bank": "a\0b"}},
        {"settings": RECORD["settings"] | {"allow_nan": "false"}},
        {"members": [{"coefficient": 1}]},
        {"members": [{"name": 3, "sha256": "0", "coefficient": 1}]},
        {"members": [{"name": "a", "sha256": "0", "coefficient": "much"}]},
        {"members": [{"name": "a", "sha256": "0", "coefficient": [1]}]},
        {"members": [{"name": "a", "sha256": "0", "coefficient": 1, "distance": "far"}]},
        {"target": 3},
        {"target": {"path": "new.txt"}},
        {"target": {"path": "new.txt", "sha256": None}},
        {"relevance": {"nearest": "a"}},
        {"relevance": {"nearest": 3, "distance": 0, "percentile": 0, "effective_number": 1}},
        {"members": []},
        {"members": [{"name": "a", "sha256": "0", "coefficient": 0}]},
        {"members": [{"name": "a", "sha256": "0", "coefficient": True}]},
        {"members": [{"name": "a", "sha256": "0", "coefficient": float("nan")}]},
        {"members": [{"name": "a", "sha256": "0", "coefficient": 10**400}]},
        {"members": [{"name": "a", "sha256": "0", "coefficient": 1, "similarity": [1]}]},
        {
            "relevance": {
                "nearest": "a",
                "distance": 0,
                "percentile": 10**400,
                "effective_number": 1,
            }
        },
        *(
            {"settings": RECORD["settings"] | {name: value}}
            for name, value in (
                *(("modules", 5), ("modules", [5]), ("drop_unsupported", "x"), ("seed", True)),
                *(("rank", "x"), ("rank", 1.5), ("memory", "x"), ("memory", 1.5), ("memory", None)),
                *(("seed", "x"), ("energy", "x"), ("normalize", []), ("base_weights", 3)),
                *(("formats", "peft"), ("formats", [3]), ("base", "llama")),
            )
        ),
        {"settings": {}},
        {"settings": {"bank": 3}},
        {"settings": []},
    ],
    ids=json.dumps,
)
def test_what_is_no_record(tmp_path, change):
    path = tmp_path / "lorameta.json"
    path.write_text(json.dumps(RECORD | change))
    with pytest.raises(InvalidSetting, match=r"lorameta\.json`: (not a lorameta|format)"):
        Provenance.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "sup"}, "method `sup`: expected one of auto, soup"),
        ({"settings": RECORD["settings"] | {"normalize": "x"}}, "normalize `x`: expected one of"),
        ({"settings": RECORD["settings"] | {"memory": 0}}, "memory is 0, expected 1 or more"),
        ({"settings": RECORD["settings"] | {"formats": ["x"]}}, "format `x`: expected one of"),
        ({"members": 3}, "not a lorameta.json: its members are no array"),
    ],
)
def test_what_is_wrong_is_said_of_the_file(tmp_path, change, said):
    path = tmp_path / "lorameta.json"
    path.write_text(json.dumps(RECORD | change))
    with pytest.raises(InvalidSetting) as caught:
        Provenance.load(path)
    assert str(caught.value).startswith(f"`{path}`: {said}")


@pytest.mark.parametrize("text", ["", "junk", "[]", "3", "[" * 100_000, "\udcff"])
def test_what_is_no_json_object(tmp_path, text):
    path = tmp_path / "lorameta.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InvalidSetting, match=r"lorameta\.json`: not a lorameta"):
        Provenance.load(path)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(MissingFile):
        Provenance.load(tmp_path / "gone.json")
    with pytest.raises(UnreadableFile):
        Provenance.load(tmp_path)
