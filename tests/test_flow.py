"""`generate`, and the members that it turns out to be better without."""

from __future__ import annotations

import numpy as np
import pytest

from lorameta_rs import Bank, generate
from lorameta_rs.errors import InvalidBank, NotFinite
from lorameta_rs.flow import without_faulty
from lorameta_rs.merge import Options
from lorameta_rs.ranking import Settings

TEXTS = {"a": "to be or not to be", "b": "a horse a horse", "c": "out brief candle", "d": "be"}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def written(make_bank):
    return make_bank({name: {"text": text} for name, text in TEXTS.items()}, tokenizer=True)


@pytest.fixture
def new(tmp_path):
    path = tmp_path / "new.txt"
    path.write_text("to be a horse")
    return path


def spoil(written, *names, number=np.nan):
    """Put a number that is none into members' last tensors."""
    for name in names:
        written.edit(name, lambda tensors: list(tensors.values())[-1].fill(number))


@pytest.mark.parametrize("options", [None, Options(method="soup"), Options(normalize="none")])
def test_generate_goes_on_without_bad_members(written, new, tmp_path, options):
    spoil(written, "b", "d", number=np.inf)
    bank = Bank(written.folder)
    found = generate(bank, new, tmp_path / "out", options=options)
    assert found.names == bank.names == ["a", "c"]
    assert list(bank.left_out) == ["b", "d"]
    assert all(isinstance(error, NotFinite) for error in bank.left_out.values())
    rest = Bank(written.folder, exclude=["b", "d"])
    want = generate(rest, new, tmp_path / "want", options=options)
    assert found.coefficients.tolist() == want.coefficients.tolist()
    weights = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("out", "want")]
    assert weights[0] == weights[1]


def test_generate_does_not_read_members_that_are_not_chosen(written, new, tmp_path):
    spoil(written, "c")
    found = generate(
        bank := Bank(written.folder), new, tmp_path / "out", settings=Settings(top_k=1)
    )
    assert (found.names, bank.left_out) == (list(TEXTS), {})


def test_generate_lets_nan_by_where_that_is_asked_for(written, new, tmp_path):
    spoil(written, "b")
    options = Options(method="soup", allow_nan=True)
    assert generate(written.folder, new, tmp_path / "out", options=options).names == list(TEXTS)


def test_generate_makes_nothing_of_bad_members_alone(written, new, tmp_path):
    spoil(written, *TEXTS)
    with pytest.raises(InvalidBank, match="none of 4 members can be used"):
        generate(written.folder, new, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_choice_is_as_good_as_the_first(written, new, tmp_path):
    nearest = generate(written.folder, new, tmp_path / "all").nearest_first()
    first, second, third = (sorted(TEXTS)[i] for i in nearest[:3])
    spoil(written, first, second)
    bank = Bank(written.folder)
    found = generate(bank, new, tmp_path / "out", settings=Settings(top_k=1))
    # One after the other was the nearest of those that were left, and turned out to be bad.
    assert list(bank.left_out) == [first, second]
    assert found.names[int(np.argmax(found.coefficients))] == third


def test_what_is_no_fault_of_a_member_is_not_tried_again(written):
    tries = []

    def make():
        tries.append(None)
        raise NotFinite("the weighted sum is beyond the range of F16")

    with pytest.raises(NotFinite, match="beyond the range"):
        without_faulty(bank := Bank(written.folder), make)
    assert (len(tries), bank.names) == (1, list(TEXTS))
