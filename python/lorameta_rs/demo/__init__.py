"""The demo: a small real bank that comes with the package, and a dataset that is not in it.

A dozen adapters of a tiny model (`README.md` beside this file says which), copied out to be used.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from lorameta_rs.files import refusals
from lorameta_rs.staging import staged

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Demo:
    """Where the demo was copied to."""

    bank: Path
    """A dozen adapters with their datasets."""
    dataset: Path
    """A dataset of none of them."""


def copy_out(folder: Path) -> Demo:
    """Copy the demo's bank and dataset into a new folder.

    Raises:
        OutputExists: The folder exists.
        UnreadableFile: It cannot be made.
    """
    with (
        as_file(files(__name__)) as data,
        staged([folder]) as (stage,),
        refusals(folder),
    ):
        bank = data / "bank"
        # `copytree` goes on past a full disk, and says so of every file at the end.
        for path in (bank, *sorted(bank.rglob("*")), data / "new.jsonl"):
            place = stage / path.relative_to(data)
            if path.is_dir():
                place.mkdir()
            else:
                shutil.copyfile(path, place)
    return Demo(folder / "bank", folder / "new.jsonl")
