"""`compat="paper"` against `golden/paper`: what the authors' own code computed from 12 datasets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
from safetensors.numpy import load_file

from lorameta_rs import Bank, _metrics, coefficients, distance, paper
from lorameta_rs.errors import InvalidBank, InvalidSetting
from lorameta_rs.fingerprint import Fingerprint, Fingerprints, token_distribution
from lorameta_rs.index import make_fingerprints
from lorameta_rs.merge import Job, Options, merge

PAPER = Path(__file__).parent / "golden" / "paper"
VOCAB = 512
NAMES = {"js": "JS", "kl": "KL", "wasserstein": "WD", "mmd": "MMD"}
VERSIONS = {"attentional": "base_version", "normalized": "normalized_version"}
STORED = load_file(PAPER / "coefficients.safetensors")


@pytest.fixture(scope="module")
def targets():
    lines = (PAPER / "token_ids.jsonl").read_text().splitlines()
    rows = [json.loads(line)["ids"] for line in lines]
    counted = [np.unique(row, return_counts=True) for row in rows]
    return [
        Fingerprint(ids.astype(np.uint32), counts.astype(np.uint64), VOCAB)
        for ids, counts in counted
    ]


@pytest.fixture(scope="module")
def bank(targets):
    return Fingerprints(
        np.cumsum([0] + [len(row.ids) for row in targets], dtype=np.int64),
        np.concatenate([row.ids for row in targets]),
        np.concatenate([row.counts for row in targets]),
        VOCAB,
    )


@pytest.fixture(scope="module")
def golden():
    return load_file(PAPER / "distances.safetensors")


def samples():
    """The authors' samples of each pair of datasets, i ≤ j: i, j, and 1000 ids of each."""
    drawn = iter(load_file(PAPER / "mmd_samples.safetensors")["samples"])
    for i in range(12):
        for j in range(i, 12):
            yield i, j, next(drawn), next(drawn)


def test_histograms(bank):
    want = load_file(PAPER / "histograms.safetensors")["hist_plus_eps"]
    got = [paper.histogram(row, VOCAB) for row in _metrics.bank_rows(bank)]
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_the_last_two_ids_share_a_bin():
    row = _metrics.Row(np.array([5, 6, 7], np.uint32), np.array([1, 1, 2], np.uint64), 4)
    want = np.array([0, 0, 0, 0, 0, 0.25, 0.75])
    np.testing.assert_array_equal(paper.histogram(row, 8), want + 1e-10)


@pytest.mark.parametrize("metric", ["js", "kl", "wasserstein"])
def test_distances(metric, bank, targets, golden):
    got = [distance.distances(metric, bank, target, compat="paper") for target in targets]
    np.testing.assert_allclose(got, golden[NAMES[metric]], rtol=1e-6)


def test_mmd_of_the_authors_samples(golden):
    for i, j, x, y in samples():
        assert paper.mmd_of_samples(x, y) == pytest.approx(golden["MMD"][i, j], rel=1e-6)


def test_mmd_has_the_authors_cancellation():
    cases = json.loads((PAPER / "manifest.json").read_text())["mmd"]["float32_cancellation"]
    for case in cases:
        name = f"mmd_big_{case['ids_from']}_{case['ids_to']}.safetensors"
        drawn = load_file(PAPER / name)
        got = paper.mmd_of_samples(drawn["x"], drawn["y"])
        assert got == pytest.approx(case["authors_float32"], rel=1e-6)
        p, q = (
            reference.dense(*np.unique(side, return_counts=True), case["ids_to"])
            for side in (drawn["x"], drawn["y"])
        )
        used = np.flatnonzero(p - q)
        lag = np.subtract.outer(used, used)
        kernel = sum(a**2 / (a**2 + lag**2) for a in (0.2, 0.5, 0.9, 1.3))
        exact = (p - q)[used] @ kernel @ (p - q)[used]
        assert exact == pytest.approx(case["exact_float64"], rel=1e-9)


def test_the_exact_mmd_of_the_authors_samples():
    for i, j, x, y in samples():
        if i == j or (i + j) % 5:
            continue
        p, q = (np.unique(side, return_counts=True) for side in (x, y))
        member = Fingerprints(np.array([0, len(p[0])]), p[0], p[1].astype(np.uint64), VOCAB)
        target = Fingerprint(q[0], q[1].astype(np.uint64), VOCAB)
        exact = reference.maximum_mean_discrepancy(
            reference.dense(*p, VOCAB), reference.dense(*q, VOCAB)
        )
        got = distance.maximum_mean_discrepancy(member, target)
        np.testing.assert_allclose(got, [exact], rtol=1e-10)


def test_sampled_mmd_is_near_the_exact_and_repeats(bank, targets):
    got = distance.distances("mmd", bank, targets[0], compat="paper")
    exact = distance.maximum_mean_discrepancy(bank, targets[0])
    # Two different samples are 0.007 apart where the distributions are not, as the manifest says.
    np.testing.assert_allclose(got, exact + 0.007, atol=0.05)
    assert got[0] > 0.0
    np.testing.assert_array_equal(got, distance.distances("mmd", bank, targets[0], compat="paper"))
    other = paper.maximum_mean_discrepancy(bank, targets[0], np.random.default_rng(1))
    assert (other != got).any()


@pytest.mark.parametrize("metric", NAMES)
@pytest.mark.parametrize("pipeline", VERSIONS)
def test_coefficients(metric, pipeline, golden):
    want = STORED[f"{NAMES[metric]}/{VERSIONS[pipeline]}"]
    for i, row in enumerate(golden[NAMES[metric]].astype(np.float64)):
        others = np.arange(12) != i
        if pipeline == "normalized" and metric == "mmd":
            got = paper.normalized(row[others], own=row[i])
        else:
            got = coefficients.from_distances(row[others], pipeline, compat="paper")
        np.testing.assert_allclose(got, want[i][others], rtol=1e-6)


def test_the_formulas_are_near_the_authors_numbers(bank, targets, golden):
    """Without `compat` the merged bin and the smoothing make the difference, and no more."""
    exact = [distance.jensen_shannon(bank, target) for target in targets]
    np.testing.assert_allclose(exact, golden["JS"], atol=0.01)
    exact = [distance.wasserstein(bank, target) for target in targets]
    np.testing.assert_allclose(exact, golden["WD_f64"], rtol=1e-12, atol=1e-12)


def test_what_the_paper_does_not_have(bank, targets):
    with pytest.raises(InvalidSetting, match="metric `cosine`: expected one of the paper of js"):
        distance.distances("cosine", bank, targets[0], compat="paper")
    one = Fingerprint(np.array([0], np.uint32), np.array([1], np.uint64), 1)
    bank_of_one = Fingerprints(np.array([0, 1]), one.ids, one.counts, 1)
    with pytest.raises(InvalidBank, match="vocabulary of two tokens"):
        distance.distances("js", bank_of_one, one, compat="paper")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The authors' bank as ours would have it: their datasets lie elsewhere."""
    folder = shutil.copytree(PAPER / "bank", tmp_path_factory.mktemp("paper") / "bank")
    lines = ["[bank]", f"tokenizer = '{PAPER / 'tokenizer' / 'tokenizer.json'}'", "[datasets]"]
    lines += [f"{i:02} = '{PAPER / 'datasets' / f'{i:02}.jsonl'}'" for i in range(12)]
    (folder / "bank.toml").write_text("\n".join(lines))
    make_fingerprints(Bank(folder))
    return folder


@pytest.mark.parametrize("key", [key for key in STORED if "mlp" not in key])
def test_predicted_adapters(folder, tmp_path, key):
    """C X for all twelve in one pass, and the files of the authors where we have them."""
    bank = Bank(folder)
    outs = [tmp_path / name for name in bank.names]
    merge(bank, [Job(*job) for job in zip(STORED[key], outs, strict=True)], Options(method="soup"))
    adapters = load_file(PAPER / "all_adapters_matrix.safetensors")["all_adapters"]
    merged = [load_file(out / "adapter_model.safetensors") for out in outs]
    flat = np.array([np.concatenate([one[name].ravel() for name in sorted(one)]) for one in merged])
    np.testing.assert_allclose(flat, STORED[key] @ adapters, rtol=1e-6, atol=1e-7)
    manifest = json.loads((PAPER / "manifest.json").read_text())["predicted"]
    assert flat.sum(dtype=np.float64) == pytest.approx(manifest[key]["sum"], rel=1e-6)
    for path in (PAPER / "predicted" / key).glob("*.safetensors"):
        want, got = load_file(path), merged[int(path.stem)]
        assert got.keys() == want.keys()
        for name, numbers in want.items():
            np.testing.assert_allclose(got[name], numbers, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("metric", ["js", "kl", "wasserstein"])
@pytest.mark.parametrize("pipeline", VERSIONS)
def test_the_bank_with_its_datasets(folder, metric, pipeline):
    """From texts to coefficients: each dataset is left out of the bank that is asked about it."""
    for i, row in enumerate(STORED[f"{NAMES[metric]}/{VERSIONS[pipeline]}"]):
        name = f"{i:02}"
        bank = Bank(folder, exclude=[name])
        target = token_distribution(PAPER / "datasets" / f"{name}.jsonl", tokenizer=bank.tokenizer)
        found = bank.rank(target, metric=metric, pipeline=pipeline, compat="paper")
        np.testing.assert_allclose(found.coefficients, np.delete(row, i).astype(float), rtol=1e-6)
