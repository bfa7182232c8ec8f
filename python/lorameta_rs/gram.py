"""Gram matrices of a bank: the inner product of every two adapters, from one pass over the files.

They hold all that a sum's error depends on: ‖Σ c_i X_i − X_j‖² is cᵀGc − 2 (Gc)_j + G_jj.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import _core
from lorameta_rs.errors import InvalidSetting
from lorameta_rs.merge import Options

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorameta_rs._metrics import Floats
    from lorameta_rs.bank import Bank

SPACES = ("delta", "parameters")
"""`delta`: of ΔW = s B A. `parameters`: of all numbers of A and B side by side, as the paper has
it; there a smaller rank counts as one that is padded with zeros."""


def gram_matrix(
    bank: Bank,
    space: str = "delta",
    *,
    options: Options | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Floats:
    """G_ij = Σ_modules ⟨X_i, X_j⟩ of the bank's members; modules that one lacks count as zero.

    Args:
        bank: All of its members are read.
        space: One of `SPACES`.
        options: `threads`, `memory`, `io` and `allow_nan` count. What is held beside G does not
            grow with the bank.
        progress: Told bytes read and bytes in all.

    Returns:
        float64 [n, n], symmetric, in the order of `bank.names`.

    Raises:
        InvalidSetting: No such space, or the memory budget is too small.
        LayoutMismatch: The members' modules fit different base models.
        NotFinite: A tensor holds NaN or infinity, and `allow_nan` is not set.
        FileChanged, UnreadableFile: A file changed meanwhile, or cannot be read.
    """
    (matrix,) = _read(bank, space, False, options, progress).values()
    return matrix.copy()


def gram_of_modules(
    bank: Bank,
    space: str = "delta",
    *,
    options: Options | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Floats]:
    """`gram_matrix` of each module alone, by its name: n × n numbers for each, to be read only."""
    return _read(bank, space, True, options, progress)


def _read(
    bank: Bank,
    space: str,
    of_modules: bool,
    options: Options | None,
    progress: Callable[[int, int], object] | None,
) -> dict[str, Floats]:
    if space not in SPACES:
        raise InvalidSetting(f"space `{space}`: expected one of {', '.join(SPACES)}")
    adapters = [member.adapter for member in bank.members]
    strengths = [member.scalings for member in bank.members] if space == "delta" else None
    found = _core.gram(adapters, strengths, of_modules, options or Options(), progress)
    shape = len(adapters), len(adapters)
    return {str(name): np.frombuffer(rows, np.float64).reshape(shape) for name, rows in found}
