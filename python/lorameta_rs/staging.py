"""Folders that appear whole or not at all: made beside their place, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lorameta_rs import files
from lorameta_rs.errors import InvalidSetting, OutputExists, UnreadableFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@contextmanager
def staged(
    outs: Sequence[Path], owned: Sequence[str] = (), force: bool = False
) -> Iterator[list[Path]]:
    """Folders to fill; when the block ends well they become `outs`, all of them.

    Args:
        outs: The folders to be made; their parents are made too.
        owned: As `check`.
        force: As `check`.

    Raises:
        OutputExists, InvalidSetting: As `check`.
        UnreadableFile: A folder cannot be made, or its name is too long; or the block raised this
            of a file in a folder, and the output's is named instead.
    """
    check(outs, owned, force)
    stages = [_beside(out) for out in outs]
    parents = {
        parent for stage in stages for parent in stage.parents if not os.path.lexists(parent)
    }
    try:
        for stage in stages:
            with files.refusals(stage.parent):
                stage.mkdir(parents=True)
        yield stages
        check(outs, owned, force)  # again: one may have appeared meanwhile
        _place(stages, outs)
    except UnreadableFile as error:
        for stage, out in zip(stages, outs, strict=True):
            if str(error.filename).startswith(str(stage)):
                error.filename = str(out / Path(str(error.filename)).relative_to(stage))
        raise
    finally:
        for stage in stages:
            shutil.rmtree(stage, ignore_errors=True)
        for parent in sorted(parents, reverse=True):
            with suppress(OSError):
                parent.rmdir()  # refused where a folder has appeared in it


def check(outs: Sequence[Path], owned: Sequence[str] = (), force: bool = False) -> None:
    """See that folders can be made, or replaced.

    Args:
        outs: The folders.
        owned: The names of the files that are put there, first the one that shows who made a
            folder. A folder that is replaced has that one and no others, or is empty, so that
            `force` never deletes what somebody else put there.
        force: Replace folders that exist.

    Raises:
        OutputExists: A folder exists, and is not to be or must not be replaced.
        InvalidSetting: Two outputs are the same folder.
        UnreadableFile: Whether one exists cannot be told.
    """
    places = [os.path.realpath(out) for out in outs]
    for out, place in zip(outs, places, strict=True):
        if places.count(place) > 1:
            raise InvalidSetting(f"two outputs have the same path, `{out}`\ngive each its own")
        if not {str(parent) for parent in Path(place).parents}.isdisjoint(places):
            raise InvalidSetting(f"`{out}` lies in another output\nput it elsewhere")
    for out in outs:
        _check(out, owned, force)


def _check(out: Path, owned: Sequence[str], force: bool) -> None:
    try:
        with files.refusals(out):
            out.lstat()
    except UnreadableFile as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):  # of the latter, making it says more
            return
        raise
    if not force:
        replaced = "replace it with --force (`force=True`), or " if owned else ""
        raise OutputExists(f"`{out}` exists\n{replaced}choose another folder")
    if not out.is_dir() or out.is_symlink():
        raise OutputExists(f"`{out}` is not a folder, and is not replaced")
    with files.refusals(out):
        found = {entry.name for entry in out.iterdir()}
    strange = sorted(found.difference(owned))
    if strange:
        raise OutputExists(
            f"`{out}` is not replaced: it holds `{strange[0]}`, which is not of an output\n"
            "choose another folder"
        )
    if found and owned[0] not in found:
        raise OutputExists(
            f"`{out}` is not replaced: it has no `{owned[0]}`, which lorameta-rs writes\n"
            "choose another folder"
        )


def _beside(out: Path) -> Path:
    # A name of any length that a file may have leaves room for what is added: 60 are 240 bytes.
    return out.absolute().with_name(f".{out.absolute().name[:60]}.{secrets.token_hex(4)}")


def _place(stages: Sequence[Path], outs: Sequence[Path]) -> None:
    """Put finished folders in their places, all or none; those that are there make room first."""
    moves: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        source.rename(target)
        moves.append((source, target))

    replaced = []
    try:
        for stage, out in zip(stages, outs, strict=True):
            with files.refusals(out):
                if out.exists():
                    replaced.append(_beside(out))
                    move(out, replaced[-1])
                move(stage, out)
    except BaseException:
        for source, target in reversed(moves):
            target.rename(source)
        raise
    for old in replaced:
        shutil.rmtree(old, ignore_errors=True)
