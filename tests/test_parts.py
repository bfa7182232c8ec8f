"""Histograms of a dataset's parts: counted, kept, compared; against plain counting."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from words import rows_of, write_bank

from lorameta_rs import Bank, distance, jensen_shannon, token_distribution
from lorameta_rs.errors import InvalidBank, InvalidSetting
from lorameta_rs.fingerprint import Fingerprint, Fingerprints
from lorameta_rs.index import make_fingerprints
from lorameta_rs.parts import BUCKETS, PARTS, Histogram, Parts

IDS = st.integers(0, 19)


def counted(histogram):
    return dict(zip(histogram.ids.tolist(), histogram.counts.tolist(), strict=True))


def bucket(one, other):
    return ((one * 0x9E3779B1 + other) * 0x85EBCA6B % 2**32) >> 20


@given(
    definition=st.lists(IDS, min_size=1, max_size=3),
    batches=st.lists(
        st.lists(st.tuples(st.lists(IDS, max_size=4), st.lists(IDS, max_size=3)), max_size=4),
        max_size=3,
    ),
)
def test_parts_are_those_of_plain_counting(definition, batches):
    parts = Parts(20)
    inputs, answers, bigrams = Counter(), Counter(), Counter()
    for batch in batches:
        rows = []
        for rest, answer in batch:
            ids = [*definition, *rest, *answer]
            rows.append((ids, len(definition) + len(rest)))
            bigrams.update(bucket(*pair) for pair in pairwise(ids))
            if answer:
                inputs.update(rest)
                answers.update(answer)
        rows.append(([], 0))  # a row of nothing
        flat = np.array([i for ids, _ in rows for i in ids], np.int64)
        parts.add(rows, flat)
    told = bool(answers)
    found = parts.histograms(definition if told else None)
    want = {"input": inputs, "answer": answers, "bigrams": bigrams}
    if told:
        want["definition"] = Counter(definition)
    assert {name: counted(one) for name, one in found.items()} == {
        name: dict(one) for name, one in want.items() if one
    }


@pytest.fixture
def bank(golden, tmp_path):
    folder = write_bank(golden, tmp_path / "bank")
    for shift, name in enumerate(("a_r8", "b_r8", "e_r16"), 1):
        rows = map(json.loads, rows_of(shift, 20).splitlines())
        asked = [{**row, "input": f"w60 w{50 + shift} {row['input']}"} for row in rows]
        (folder / name / "train.jsonl").write_text("\n".join(map(json.dumps, asked)))
    make_fingerprints(bank := Bank(folder))
    return bank


def test_parts_of_a_dataset(bank):
    found = bank.fingerprint(bank.members[0])
    assert list(found.parts) == list(PARTS)
    assert counted(found.parts["definition"]) == {1: 1, 60: 1, 51: 1}
    assert counted(found.parts["answer"]) == {i + 1: 1 for i in range(5, 25)}
    every = Counter(counted(found.parts["input"])) + Counter(counted(found.parts["answer"]))
    every.update(dict.fromkeys((1, 60, 51), 20))
    assert counted(Histogram(found.ids, found.counts)) == every
    assert found.parts["bigrams"].counts.sum() == 20 * 6
    path = bank.fingerprint_path(bank.members[0])
    kept = Fingerprint.load(path)
    for name in PARTS:
        assert counted(kept.parts[name]) == counted(found.parts[name])
    assert len(kept.parts) == 4


def test_metrics_of_parts(bank):
    target = bank.fingerprint(bank.members[1])
    for part in PARTS:
        rows = [row.part(part) for row in bank.fingerprints.rows]
        assert {row.vocab_size for row in rows} == {BUCKETS if part == "bigrams" else 64}
        want = jensen_shannon(Fingerprints.stack(rows), target.part(part))
        found = distance.distances(f"js:{part}", bank.fingerprints, target)
        np.testing.assert_array_equal(found, want)
        matrix = distance.pairwise(f"js:{part}", bank.fingerprints)
        np.testing.assert_allclose(matrix[1], want, atol=1e-15)
        similarity = distance.similarity(f"js:{part}", found)
        np.testing.assert_array_equal(similarity, 1 - found / np.log(2))
    ranking = bank.rank(target, metric="js:answer,mmd:definition")
    assert ranking.relevance.nearest == "b_r8"
    assert ranking.settings.metric == "js:answer,mmd:definition"


def test_what_has_no_answers_has_no_parts_but_bigrams(bank, tmp_path):
    (tmp_path / "new.txt").write_text("w1 w2 w3\nw4")
    target = token_distribution(tmp_path / "new.txt", tokenizer=bank.tokenizer)
    assert list(target.parts) == ["bigrams"]
    found = bank.rank(target, metric="js:answer,js,relations")
    assert found.settings.metric == "js"
    assert found.note == (
        "`js:answer`, `relations` are left out: the new dataset's rows do not tell answers from "
        "inputs"
    )
    with pytest.raises(InvalidBank, match="metric `js:input`: a dataset has no answers"):
        bank.rank(target, metric="js:input")
    bank.rank(target, metric="cosine:bigrams")


def test_datasets_with_answers_may_lack_a_part(bank, tmp_path):
    """Inputs that begin in no common way have no definition, where no token begins them all."""
    (tmp_path / "new.jsonl").write_text(rows_of(4))
    target = token_distribution(tmp_path / "new.jsonl", tokenizer=bank.tokenizer)
    target = replace(target, parts={"input": target.parts["input"]})
    found = bank.rank(target, metric="js,js:definition")
    assert found.note == "`js:definition` is left out: a dataset has no such part"
    with pytest.raises(InvalidBank, match="metric `js:definition`: a dataset has no such part"):
        bank.rank(target, metric="js:definition")
    with pytest.raises(InvalidBank, match="a dataset has no part `definition`"):
        distance.distances("js:definition", bank.fingerprints, target)


@pytest.mark.parametrize("metric", ["js:answers", "relations:answer", "vectors:input", "js:"])
def test_there_is_no_such_part(bank, metric):
    with pytest.raises(InvalidSetting, match="of one of the parts definition, input, answer, big"):
        distance.applicable(metric, bank.fingerprints)


@pytest.mark.parametrize(
    "changes",
    [
        {"answer.ids": np.array([3, 2], np.uint32)},
        {"answer.ids": np.array([3, 64], np.uint32)},
        {"answer.counts": np.array([1, 0], np.uint64)},
        {"answer.counts": np.array([1], np.uint64)},
        {"answer.counts": np.array([1, 1], np.int32)},
        {"answer.counts": None},
    ],
    ids=["order", "size", "zero", "length", "type", "missing"],
)
def test_a_broken_part(bank, changes):
    path = bank.fingerprint_path(bank.members[0])
    with safetensors.safe_open(path, "numpy") as content:
        about = content.metadata()
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    tensors |= {"answer.ids": np.array([3, 9], np.uint32), "answer.counts": np.ones(2, np.uint64)}
    tensors = {name: one for name, one in (tensors | changes).items() if one is not None}
    path.write_bytes(safetensors.numpy.save(tensors, about))
    found = Fingerprint.load(path)
    with pytest.raises(InvalidBank, match=r"fingerprint\.safetensors`: its `answer` is broken"):
        found.parts["answer"]
    with pytest.raises(KeyError):
        found.parts["question"]
