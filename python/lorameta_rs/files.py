"""Files that a user names: open what can be read to its end, write whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorameta_rs.errors import LoraMetaError, MissingFile, UnreadableFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader
    from pathlib import Path


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Within this block, what the operating system refuses is said to be about `path`.

    Raises:
        MissingFile: instead of `FileNotFoundError`.
        UnreadableFile: instead of any other `OSError`.
    """
    try:
        yield
    except LoraMetaError:
        raise
    except OSError as error:
        kind = MissingFile if isinstance(error, FileNotFoundError) else UnreadableFile
        raise kind(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


@contextmanager
def reading(path: Path) -> Iterator[BufferedReader]:
    """`path`, open to be read; only regular files, because a pipe or device may never end.

    Raises:
        MissingFile: there is no such file.
        UnreadableFile: it is a folder, a pipe or a device, or reading it fails.
    """
    with refusals(path):
        # Asked before opening: opening a pipe that nobody writes to would wait for ever.
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file")
        with path.open("rb") as file:
            yield file


def sha256(path: Path) -> str:
    """The SHA-256 of the bytes of `path`, 64 hexadecimal digits; errors as `reading`."""
    with reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename: whoever sees the file sees all of it.

    Raises:
        UnreadableFile: the folder or the file cannot be written.
        MissingFile: the folder is not there.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with refusals(path):
        try:
            # "x" creates it with the modes that the umask leaves, as `tempfile` would not.
            with beside.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
