"""What settings give, from Gram matrices: against adapters that are really merged."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ATTENTION
from test_ranking import text

from lorameta_rs import Bank, closed_forms, distance
from lorameta_rs.errors import InvalidBank
from lorameta_rs.gram import gram_of_modules
from lorameta_rs.index import make_fingerprints
from lorameta_rs.learned import PIPELINES
from lorameta_rs.ranking import Settings, rank
from lorameta_rs.trials import METRICS, applicable, chosen, standard_error, trials

NAMES = list("abcdefgh")


@pytest.fixture(scope="module")
def written(make_bank):
    """Eight members, of which the later ones are larger."""
    written = make_bank({name: {"text": text(i)} for i, name in enumerate(NAMES)}, tokenizer=True)
    for i, name in enumerate(NAMES):

        def larger(tensors, factor=1 + i / 2):
            for numbers in tensors.values():
                numbers *= factor

        written.edit(name, larger)
    make_fingerprints(Bank(written.folder))
    return written


@pytest.fixture(scope="module")
def bank(written):
    return Bank(written.folder)


@pytest.fixture(scope="module")
def found(bank):
    distances = {name: distance.pairwise(name, bank.fingerprints) for name in ("js", "mmd")}
    modules = [*gram_of_modules(bank).values()]
    return trials(modules, distances, ["js", "js,mmd"], width=8)


def deltas(written):
    """The ΔW of each member's modules."""
    return {
        name: [
            2
            * (tensors[f"base_model.model.{module}.lora_B.weight"].astype(np.float64))
            @ tensors[f"base_model.model.{module}.lora_A.weight"]
            for module in ATTENTION
        ]
        for name, tensors in written.numbers.items()
    }


def summed(coefficients, members, normalize):
    """The sum of members' ΔW in each module, as docs/method.md says it."""
    total = []
    for module in zip(*members, strict=True):
        norms = np.array([np.linalg.norm(x) for x in module])
        c = coefficients
        if normalize == "unit":
            c = c / norms * (np.abs(c) @ norms / np.abs(c).sum())
        total.append(sum(weight * x for weight, x in zip(c, module, strict=True)).ravel())
    return np.concatenate(total)


@pytest.mark.parametrize(
    ("settings", "normalize"),
    [
        (Settings(metric="js"), "unit"),
        (Settings(metric="js", temperature=0.5), "none"),
        (Settings(metric="js,mmd", top_k=3), "unit"),
        (Settings(metric="js", pipeline="attentional"), "none"),
        (Settings(metric="js,mmd", pipeline="nearest"), "unit"),
        (Settings(metric="js", pipeline="uniform"), "unit"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.metric} {value.pipeline}",
)
def test_a_trial_says_what_a_sum_without_the_member_is(bank, written, found, settings, normalize):
    (trial,) = (one for one in found[0] if (one.settings, one.normalize) == (settings, normalize))
    every = deltas(written)
    product, square = 0.0, 0.0
    for i, member in enumerate(bank.members):
        rest = bank.without([member.name])
        c = rank(rest, bank.fingerprint(member), settings).coefficients
        made = summed(c, [every[name] for name in rest.names], normalize)
        own = np.concatenate([x.ravel() for x in every[member.name]])
        length = np.linalg.norm(own)
        cosine = made @ own / np.linalg.norm(made) / length
        assert trial.cosine[i] == pytest.approx(cosine, abs=1e-5)
        assert trial.error[i] == pytest.approx(np.linalg.norm(made - own) / length, rel=1e-4)
        product += made @ own / length**2
        square += made @ made / length**2
    assert trial.scale == pytest.approx(product / square, abs=1e-4)


def test_what_is_tried(found):
    tried, networks = found
    assert (tried[0].settings, tried[0].normalize) == (Settings(metric="js"), "unit")
    learned = [one for one in tried if one.settings.pipeline in PIPELINES]
    assert {one.settings.pipeline for one in learned} == set(PIPELINES)
    assert {one.settings.metric for one in learned} == set(networks)
    assert "js" in networks
    assert sum(one.of_modules for one in learned) == 2 * len(networks)
    assert METRICS[0] == Settings().metric


def test_nothing_is_learned_from_those_who_are_asked(bank):
    """A member that is like no other but by its own row of distances cannot be made of others."""
    random = np.random.default_rng(1)
    x = random.normal(size=(12, 60))
    x[1] = x[0]
    distances = random.uniform(0.5, 1.0, (12, 12))
    distances = (distances + distances.T) / 2
    distances[0, 1] = distances[1, 0] = 0.01  # a pair, and what can be learned is learned from it
    np.fill_diagonal(distances, 0.0)
    tried, _ = trials([x @ x.T], {"js": distances}, ["js"], width=8)
    (simplex,) = (one for one in tried if one.settings.pipeline == "simplex" and not one.of_modules)
    (nearest,) = (
        one for one in tried if one.settings.pipeline == "nearest" and one.normalize == "unit"
    )
    assert nearest.cosine[0] == pytest.approx(1.0)
    assert simplex.cosine[0] < 0.7
    full = closed_forms.expected_products(distances, closed_forms.unit_gram([x @ x.T]), 0.01)
    assert full > 0.9


def test_the_first_stays_unless_another_is_better_beyond_doubt():
    random = np.random.default_rng(0)
    first = random.uniform(size=20)
    noise = random.normal(scale=0.1, size=20)
    noise -= noise.mean()
    error = standard_error(noise)
    assert error == pytest.approx(noise.std(ddof=1) / np.sqrt(20))
    assert chosen(np.array([first, first + noise + 1.9 * error])) == 0
    assert chosen(np.array([first, first + noise + 2.1 * error])) == 1
    assert chosen(np.array([first, first - 1.0])) == 0
    assert chosen(np.array([first])) == 0


def test_metrics_that_say_nothing_are_left_out(bank):
    assert bank.fingerprints.relations is None
    assert applicable(METRICS, bank.fingerprints) == ["mmd", "js", "cosine", "js:bigrams"]
    assert applicable(["relations"], bank.fingerprints) == []


def test_a_few_members_are_needed(bank):
    three = np.eye(3)
    with pytest.raises(InvalidBank, match="3 members: calibrating needs 4 at least"):
        trials([three], {"js": 1 - three}, ["js"])


def test_what_is_zero_is_left_out():
    """A module in which no member does anything, and a member that does nothing at all."""
    random = np.random.default_rng(2)
    x = random.normal(size=(8, 60))
    x[3] = 0.0
    distances = random.uniform(0.5, 1.0, (8, 8))
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0.0)
    grams = [x @ x.T, 2 * x @ x.T]
    alone, _ = trials(grams, {"js": distances}, ["js"], width=4)
    beside, _ = trials([*grams, np.zeros((8, 8))], {"js": distances}, ["js"], width=4)
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one.cosine, other.cosine)
        assert one.error.shape == (7,)
    (uniform,) = (
        one for one in alone if (one.settings.pipeline, one.normalize) == ("uniform", "none")
    )
    product = np.array([x[i] @ x.sum(axis=0) - x[i] @ x[i] for i in range(8) if i != 3])
    rest = np.array([np.sum((x.sum(axis=0) - x[i]) ** 2) for i in range(8) if i != 3])
    norms = np.array([x[i] @ x[i] for i in range(8) if i != 3])
    assert uniform.scale == pytest.approx(7 * np.sum(product / norms) / np.sum(rest / norms))
    with pytest.raises(InvalidBank, match="ΔW is zero in 8 of 8 members"):
        trials([np.zeros((8, 8))], {"js": distances}, ["js"])
