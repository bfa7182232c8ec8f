"""The tokenizer: its identity, the ids it can produce, and what is said about broken ones."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from lorameta_rs.dataset import Example
from lorameta_rs.errors import InvalidBank, MissingFile, UnreadableFile
from lorameta_rs.tokenizer import MAX_VOCAB_SIZE, Tokenizer


def saved(path, vocabulary, unk_token="?", **settings):
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unk_token))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, value in settings.items():
        setattr(model, name, value)
    model.save(str(path))
    return Tokenizer(path)


def test_sha256_is_that_of_the_file(tmp_path):
    tokenizer = saved(tmp_path / "t.json", {"?": 0})
    assert tokenizer.sha256 == hashlib.sha256((tmp_path / "t.json").read_bytes()).hexdigest()


def test_vocab_size_exceeds_every_id(tmp_path):
    assert saved(tmp_path / "a.json", {"?": 0, "far": 9}).vocab_size == 10
    around = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 40)])
    assert saved(tmp_path / "b.json", {"?": 0}, post_processor=around).vocab_size == 41


def test_texts_are_neither_cut_nor_padded(tmp_path):
    saved(tmp_path / "t.json", {"?": 0, "a": 1})
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    model.enable_truncation(2)
    model.enable_padding(length=5)
    model.save(str(tmp_path / "t.json"))
    encodings = Tokenizer(tmp_path / "t.json").encode(["a a a", "a"])
    assert [encoding.ids for encoding in encodings] == [[1, 1, 1], [1]]


def test_token_ids_keep_every_row(tmp_path):
    tokenizer = saved(tmp_path / "t.json", {"?": 0, "a": 1})
    rows = [Example("a " * (i % 400), "a" * (i % 2)) if i % 3 else [2] * i for i in range(1500)]
    batches = list(tokenizer.token_ids(rows))
    assert len(batches) > 2
    assert sorted(row for batch in batches for row in batch) == sorted(
        ([1] * (i % 400 + i % 2), i % 400) if i % 3 else ([2] * i, i) for i in range(1500)
    )


@pytest.mark.parametrize(
    ("example", "start"),
    [
        (Example("a b", " c"), 3),  # the blank is in no token
        (Example("a b ", "c a"), 3),
        (Example("a b", "b c"), 2),  # a token of both is the answer's
        (Example("a b", "  "), 3),
        (Example("a b"), 3),
        (Example("", "a"), 1),
    ],
)
def test_an_answer_begins_where_its_first_character_is(tmp_path, example, start):
    around = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    words = {"?": 0, "a": 1, "b": 2, "c": 3}
    tokenizer = saved(tmp_path / "t.json", words, post_processor=around)
    ((found,),) = tokenizer.token_ids([example])
    assert found[1] == start


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send a signal to a thread")
def test_ctrl_c_waits_for_the_batch_in_work_alone(tmp_path, monkeypatch):
    tokenizer = saved(tmp_path / "t.json", {"?": 0, "a": 1})
    encoded = []

    def encode(tokenizer, texts, placed):
        encoded.append(texts)
        time.sleep(0.1)  # until the next batch has been handed over, and is waited for
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.1)
        return []

    monkeypatch.setattr(Tokenizer, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        list(tokenizer.token_ids([Example("a " * (1 << 17))] * 5))
    assert len(encoded) == 1
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a tokenizer"),
        ("{}", "not a tokenizer"),
        ("[" * 100_000, "not a tokenizer"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, message):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(InvalidBank, match=message) as caught:
        Tokenizer(tmp_path / "t.json").encode([""])
    assert str(tmp_path / "t.json") in str(caught.value)


def test_no_vocabulary_or_a_huge_one_is_refused(tmp_path):
    with pytest.raises(InvalidBank, match="it has no token"):
        _ = saved(tmp_path / "a.json", {}).vocab_size
    with pytest.raises(InvalidBank, match=f"largest token id is {MAX_VOCAB_SIZE}"):
        _ = saved(tmp_path / "b.json", {"?": MAX_VOCAB_SIZE}).vocab_size


def test_a_text_without_tokens_is_said(tmp_path):
    with pytest.raises(InvalidBank, match=r"t\.json`: cannot encode a text: .*UNK"):
        saved(tmp_path / "t.json", {"a": 0}).encode(["b"])


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(MissingFile):
        _ = Tokenizer(tmp_path / "t.json").sha256
    with pytest.raises(UnreadableFile):
        _ = Tokenizer(tmp_path).vocab_size


def test_of_takes_a_path_or_a_tokenizer(tmp_path):
    tokenizer = saved(tmp_path / "t.json", {"?": 0})
    assert Tokenizer.of(tokenizer) is tokenizer
    assert Tokenizer.of(str(tmp_path / "t.json")) == tokenizer
    assert json.loads(tokenizer.path.read_text())["version"] == "1.0"


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
        (
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                "special_tokens": {},
            },
        ),
    ],
)
def test_what_the_library_panics_over_is_a_broken_tokenizer(tmp_path, part, content):
    saved(tmp_path / "t.json", {"?": 0, "a": 1})
    settings = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(settings | {part: content}))
    with pytest.raises(InvalidBank, match=str(tmp_path / "t.json")):
        list(Tokenizer(tmp_path / "t.json").token_ids([Example("a a")]))
