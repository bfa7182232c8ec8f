"""The safetensors files of a base model, which DoRA members are said relative to."""

from __future__ import annotations

import errno
import json
from pathlib import Path

from lorameta_rs import _core, files
from lorameta_rs.errors import InvalidAdapter, InvalidSetting, MissingFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LARGEST_INDEX = 64 << 20


def weight_files(path: Path | None) -> list[Path]:
    """The files that hold a model's weights: `path` itself, or those of a model's folder.

    None, if there is no `path`.

    Raises:
        MissingFile, UnreadableFile: There is none, or the folder's index cannot be read.
        InvalidSetting: The index is none, or the file is of another format.
    """
    if path is None:
        return []
    if not path.is_dir():
        tensors_of(path, "DoRA members need the base model's weights")
        return [path]
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    if not (path / INDEX).exists():
        raise MissingFile(errno.ENOENT, f"a folder without `{WEIGHTS}` or `{INDEX}`", str(path))
    with files.reading(path / INDEX) as file:
        text = file.read(_LARGEST_INDEX)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidSetting(f"`{path / INDEX}`: not JSON: {error}") from error
    match found:
        case {"weight_map": dict(shards)} if all(_is_name(name) for name in shards.values()):
            return [path / name for name in sorted(set(shards.values()))]
    raise InvalidSetting(f"`{path / INDEX}`: expected `weight_map`, of tensors and files beside it")


def tensors_of(path: Path, need: str) -> list[tuple[str, str, list[int], int, int]]:
    """The tensors of one file of a base model, as `_core.file_tensors` has them.

    `need` says what they are for.

    Raises:
        InvalidSetting: It is of another format, such as GGUF.
        InvalidAdapter, MissingFile, UnreadableFile: As `_core.file_tensors`.
    """
    try:
        return _core.file_tensors(path)
    except InvalidAdapter as error:
        if path.suffix == ".safetensors":
            raise
        raise InvalidSetting(
            f"`{path}` is no safetensors file: {need}\ngive its safetensors, or its folder"
        ) from error


def _is_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and "\0" not in name
