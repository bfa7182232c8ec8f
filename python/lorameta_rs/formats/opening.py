"""Adapters of any format, opened as a bank's members are."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, TypeVar

from lorameta_rs import _core, files
from lorameta_rs.bank import member_folders
from lorameta_rs.config import AdapterConfig
from lorameta_rs.config_fields import FILE_NAME
from lorameta_rs.errors import InvalidAdapter, LoraMetaError
from lorameta_rs.formats import mlx
from lorameta_rs.formats.naming import components
from lorameta_rs.member import (
    GGUF,
    MLX_WEIGHTS,
    PICKLE,
    WEIGHTS,
    Member,
    gguf_member,
    open_members,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lorameta_rs.formats.base import Base
    from lorameta_rs.formats.naming import Component

T = TypeVar("T")

_SAFETENSORS = ".safetensors"


def is_adapter(path: Path) -> bool:
    """Whether `path` is one adapter, and not a bank of them."""
    if not path.is_dir():
        return True
    with files.refusals(path):
        names = {entry.name for entry in path.iterdir()}
    if not names.isdisjoint((FILE_NAME, WEIGHTS, PICKLE, MLX_WEIGHTS)):
        return True
    # A bank may have others beside its members: what `calibrate` learned, the base model.
    if member_folders(path):
        return False
    return any(name.endswith((GGUF, _SAFETENSORS)) for name in names)


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a folder about one."""
    file = _only_file(path)
    return file is not None and file.suffix == GGUF


def open_adapters(
    path: Path, base: Base | None = None, names_from: Path | None = None
) -> list[Member]:
    """The adapter that `path` is, or those of a file for several models of one pipeline.

    Args:
        path: A folder of PEFT or MLX, a GGUF file, a file of kohya or diffusers, or a folder that
            holds one such file.
        base: Its base model, for a GGUF file of others, which does not say how many heads that has.
        names_from: The base model whose modules kohya's names mean; see `naming.components`.

    Returns:
        The adapter. Of a file for several models one for each, named as diffusers names them.

    Raises:
        LoraMetaError: It cannot be used, and why.
    """
    with files.refusals(path):
        path.stat()
    file = _only_file(path)
    if file is None:
        return [_sound(open_members([path])[0])]
    if file.name == MLX_WEIGHTS:
        adapter = _opened(file)
        scale = mlx.scale(file.parent)
        alphas = {module.name: scale * module.rank for module in adapter.layout.modules}
        return [Member(_stem(path), file.parent, _stated(file, adapter, alphas), adapter)]
    if file.suffix == GGUF:
        heads = None if base is None else base.head_counts
        return [gguf_member(_stem(path), file.parent, _opened(file, heads=heads))]
    renamed = components(file, names_from)
    if renamed is None:
        raise InvalidAdapter(
            f"`{file}`: none of its tensors has a name as kohya or diffusers give them\n"
            f"an adapter of PEFT is a folder with `{FILE_NAME}` and `{WEIGHTS}`"
        )
    return [_component(file, one) for one in renamed[1]]


def _only_file(path: Path) -> Path | None:
    """The file that `path` is or that its folder is about; None for a folder of PEFT."""
    if not path.is_dir():
        return path
    if any((path / name).exists() for name in (WEIGHTS, PICKLE)):
        return None
    if (path / MLX_WEIGHTS).exists():
        return path / MLX_WEIGHTS
    for suffix in (GGUF, _SAFETENSORS):
        found = sorted(path.glob(f"*{suffix}"))
        if len(found) == 1:
            return found[0]
    return None


def _component(file: Path, one: Component) -> Member:
    """The adapter of one model of a pipeline."""
    adapter = _opened(file, one.names)
    if one.config is not None:
        config = AdapterConfig.parse(file, json.dumps(one.config).encode())
    else:
        config = _stated(file, adapter, one.alphas)
    return Member(one.name or _stem(file), file.parent, config, adapter)


def _opened(
    file: Path,
    names: Mapping[str, str] | None = None,
    heads: tuple[int, int] | None = None,
) -> _core.Adapter:
    (adapter,) = _core.open_adapters([os.fspath(file)], names=names, heads=heads)
    return _sound(adapter)


def _sound(one: T | LoraMetaError) -> T:
    if isinstance(one, LoraMetaError):
        raise one
    return one


def _stem(path: Path) -> str:
    return path.stem if path.is_file() else path.absolute().name


def _stated(file: Path, adapter: _core.Adapter, alphas: Mapping[str, float]) -> AdapterConfig:
    ranks = {module.name: module.rank for module in adapter.layout.modules}
    return AdapterConfig.stated(file, ranks, alphas)
