"""A merge that is done again: its record says what of, and why in these parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs.merge import Job

if TYPE_CHECKING:
    from pathlib import Path

    from lorameta_rs.bank import Bank
    from lorameta_rs.provenance import Provenance


@dataclass(frozen=True, eq=False, kw_only=True)
class RepeatedJob(Job):
    """A job whose coefficients were recorded by an earlier merge."""

    record: Provenance
    """What that merge recorded; the new record says the same of the dataset and its distances."""

    @classmethod
    def of(cls, record: Provenance, bank: Bank, out: Path) -> RepeatedJob:
        """The job that makes a record's adapter, from a bank that has its members."""
        recorded = record.coefficients
        # Taken as they are: what a pipeline gives may be smaller than any weight that is given.
        nothing = [0.0] * len(record.modules) or 0.0
        row = np.array([recorded.get(name, nothing) for name in bank.names], dtype=np.float64)
        return cls(coefficients=row, out=out, record=record, modules=record.modules)
