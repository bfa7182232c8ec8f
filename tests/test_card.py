"""The model card: front matter that the Hub reads, and a text that says what the adapter is."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lorameta_rs.card import model_card
from lorameta_rs.provenance import Provenance


def record(count=3, *, target=True, **names):
    """What a merge of members with falling coefficients would leave."""
    return Provenance(
        version="1.2.3",
        settings={"bank": "bank", "metric": "js", "pipeline": "normalized"},
        target={"path": "new.jsonl", "sha256": "00"} if target else None,
        method="soup",
        relevance={"nearest": "m0", "distance": 0.25, "percentile": 40.0, "effective_number": 2.5}
        if target
        else None,
        members=[
            {
                "name": names.get(f"m{i}", f"m{i}"),
                "distance": i / 8 if target else None,
                "coefficient": (-1) ** i / (i + 1),
            }
            for i in range(count)
        ],
    )


def card(found=None, base="org/base", out="predicted"):
    config = {"base_model_name_or_path": base, "r": 8}
    return model_card(found or record(), config, Path(out))


def test_front_matter():
    lines = card().splitlines()
    assert lines[:6] == [
        "---",
        'base_model: "org/base"',
        "library_name: peft",
        "tags: [lora, lorameta-rs]",
        "---",
        "",
    ]
    assert lines[6] == "# predicted"
    assert "base_model" not in card(base=None)


@pytest.mark.parametrize("base", ['a"b: c', "línea\nanother: 1", "#x"])
def test_no_name_of_a_base_breaks_out_of_the_front_matter(base):
    lines = card(base=base).splitlines()
    assert lines[1] == f"base_model: {json.dumps(base)}"
    assert lines[4] == "---"


def test_what_it_was_made_of():
    text = card()
    assert "1.2.3 combined from 3 others (`soup`), without training: each weighs" in text
    assert "metric `js`, pipeline `normalized`" in text
    assert "| m0 | 0.0000 | 1.0000 |\n| m1 | 0.1250 | -0.5000 |\n| m2 | 0.2500 | 0.3333 |" in text
    assert "nearest dataset is that of `m0`, at 0.2500: farther than 40 % of the bank's" in text
    assert "In effect 2.5 adapters take part." in text


def test_given_coefficients():
    text = card(record(1, target=False))
    assert "combined from 1 other (`soup`), without training, by coefficients that its" in text
    assert "| m0 |  | 1.0000 |" in text
    assert "nearest" not in text


def test_many_members_are_cut_to_the_largest():
    text = card(record(50))
    assert text.count("\n| m") == 20
    assert "| m19 |" in text
    assert "… and 30 more with smaller coefficients." in text


def test_a_name_does_not_break_the_table():
    (line,) = [line for line in card(record(m1="a|b")).splitlines() if "a\\|b" in line]
    assert line == r"| a\|b | 0.1250 | -0.5000 |"


@pytest.mark.parametrize("name", ["predicted", "a b", "it's", "$(rm -rf x)"])
def test_the_commands_can_be_pasted(name):
    text = card(out=name)
    (command,) = [line for line in text.splitlines() if line.startswith("lorameta-rs")]
    assert shlex.split(command)[3] == f"{name}/lorameta.json"
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert json.dumps(name) in code


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (1.5, "refined with the base model on 9 rows of the new dataset: the loss of answers that"),
        (2.5, "Refining with the base model on 9 rows of the new dataset found no better"),
    ],
)
def test_refined_coefficients(after, words):
    found = record()
    parts = {"m0": 0.125, "m1": 0.75, "m2": -0.25}
    refined = {"rows": 9, "before": 2.5, "after": after, "coefficients": parts}
    refined["weights"] = {"(merge)": 0.125, "(uniform)": 0.0, "m1": -0.5}
    found.settings["refined"] = refined
    text = card(found)
    assert "| m1 | 0.1250 | 0.7500 |\n| m2 | 0.2500 | -0.2500 |\n| m0 | 0.0000 | 0.1250 |" in text
    assert words in text
    assert f"held out is {after:.3f}" in text
    assert "weights in the mixture: (merge) 0.12, (uniform) 0.00, m1 -0.50." in text
