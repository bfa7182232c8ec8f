"""Gram matrices: against NumPy in float64, on factors that are padded, or ΔW that is formed."""

from __future__ import annotations

import numpy as np
import pytest
from test_sums import PREFIX, REAL, delta, scaling

from lorameta_rs import Bank
from lorameta_rs.errors import InvalidSetting, NotFinite
from lorameta_rs.gram import gram_matrix, gram_of_modules
from lorameta_rs.merge import Options


@pytest.fixture(scope="module")
def real(make_bank):
    return make_bank(REAL)


@pytest.fixture(scope="module")
def wide(make_bank):
    """Members whose factors are cut into several reads, pieces and groups."""
    modules = {"model.layers.0.self_attn.q_proj": (4000, 900)}
    return make_bank({f"m{i:02d}": {"rank": 3 + i % 3, "modules": modules} for i in range(70)})


def padded(tensors, module, factor, rank):
    """A factor as one long row; what a smaller rank, or a member without the module, lacks is 0."""
    found = tensors.get(f"{PREFIX}{module}.lora_{factor}.weight")
    if found is None:
        return None
    found = np.asarray(found, np.float64)
    lacking = (0, rank - min(found.shape))
    return np.pad(found, (lacking, (0, 0)) if factor == "A" else ((0, 0), lacking)).ravel()


def exact(written, bank, module, space):
    """The matrix of one module in float64."""
    if space == "delta":
        rows = [
            None
            if (found := delta(written.numbers[name], module)) is None
            else scaling(bank, name, module) * found.ravel()
            for name in bank.names
        ]
    else:
        rank = max(m.rank for one in bank.members for m in one.modules if m.name == module)
        rows = [
            None
            if (a := padded(written.numbers[name], module, "A", rank)) is None
            else np.concatenate([a, padded(written.numbers[name], module, "B", rank)])
            for name in bank.names
        ]
    length = next(len(row) for row in rows if row is not None)
    stacked = np.stack([np.zeros(length) if row is None else row for row in rows])
    return stacked @ stacked.T


def assert_close(found, wanted):
    """To 1e-6 of what the members' norms let an entry be at most."""
    norms = np.sqrt(np.diag(wanted))
    assert np.all(np.abs(found - wanted) <= 1e-6 * np.outer(norms, norms) + 1e-300)


@pytest.mark.parametrize("space", ["delta", "parameters"])
@pytest.mark.parametrize("folder", ["real", "wide"])
def test_it_is_that_of_the_members_in_float64(request, folder, space):
    written = request.getfixturevalue(folder)
    bank = Bank(written.folder)
    found = gram_of_modules(bank, space)
    wanted = {module: exact(written, bank, module, space) for module in found}
    for module, matrix in found.items():
        assert_close(matrix, wanted[module])
    whole = gram_matrix(bank, space)
    assert_close(whole, sum(wanted.values()))
    assert np.array_equal(whole, whole.T)


@pytest.mark.parametrize("space", ["delta", "parameters"])
def test_threads_change_no_bit(wide, real, space):
    for written in (wide, real):
        bank = Bank(written.folder)
        alone = gram_matrix(bank, space, options=Options(threads=1))
        for threads in (2, 3, 8):
            options = Options(threads=threads)
            assert np.array_equal(gram_matrix(bank, space, options=options), alone)


def test_progress_ends_where_it_said(wide):
    told = []
    gram_matrix(Bank(wide.folder), progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0


def test_it_stops_when_asked(wide):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gram_matrix(Bank(wide.folder), progress=stop)


@pytest.mark.parametrize("space", ["delta", "parameters"])
def test_what_is_not_finite_is_named(make_bank, space):
    written = make_bank({"good": {}, "bad": {}})
    path = written.folder / "bad" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(NotFinite, match=r"bad.*lora_[AB]"):
        gram_matrix(Bank(written.folder), space)


def test_what_cannot_be_is_refused(real, make_bank):
    bank = Bank(real.folder)
    with pytest.raises(InvalidSetting, match=r"space `cosine`: expected one of delta, parameters"):
        gram_matrix(bank, "cosine")
    with pytest.raises(InvalidSetting, match="at least 1 MiB"):
        gram_matrix(bank, options=Options(memory=1))
