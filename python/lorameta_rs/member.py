"""One adapter folder: its configuration beside its tensors, and whether the two agree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from lorameta_rs import _core
from lorameta_rs.config import FILE_NAME, AdapterConfig
from lorameta_rs.errors import InvalidAdapter, LoraMetaError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"


@dataclass(frozen=True, eq=False)
class Member:
    """An adapter whose configuration and header have been read and fit each other."""

    name: str
    folder: Path
    config: AdapterConfig
    adapter: _core.Adapter

    @property
    def modules(self) -> tuple[_core.Module, ...]:
        """The modules that it changes, in the order of their names."""
        return _modules(self.adapter.layout)

    @property
    def ranks(self) -> set[int]:
        """The ranks of its modules; one, for most adapters."""
        return {module.rank for module in self.modules}

    @cached_property
    def scalings(self) -> list[float]:
        """The factor s of ΔW = s·B·A of each module, in the order of `modules`.

        Raises:
            InvalidAdapter: A key of `alpha_pattern` is not a regular expression.
        """
        return self.config.scalings([(module.name, module.rank) for module in self.modules])

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What is odd about it, but does no harm."""
        both = (self.folder / PICKLE).exists()
        pickle = (f"`{PICKLE}` lies beside `{WEIGHTS}` and is not read",) if both else ()
        return (*self.config.warnings, *self.adapter.layout.notes, *pickle)


def open_members(
    folders: Sequence[Path], drop_unsupported: bool = False
) -> list[Member | LoraMetaError]:
    """Each folder's adapter, or what is wrong with it; the headers are read in parallel.

    `drop_unsupported` takes the factors alone of adapters that are more than plain LoRA.
    """
    found: list[Member | LoraMetaError | AdapterConfig] = [
        _config(folder, drop_unsupported) for folder in folders
    ]
    sound = [i for i, config in enumerate(found) if isinstance(config, AdapterConfig)]
    paths = [os.fspath(folders[i] / WEIGHTS) for i in sound]
    opened = _core.open_adapters(paths, drop_unsupported)
    for i, adapter in zip(sound, opened, strict=True):
        config = found[i]
        assert isinstance(config, AdapterConfig)
        if isinstance(adapter, LoraMetaError):
            found[i] = adapter
            continue
        member = Member(folders[i].name, folders[i], config, adapter)
        found[i] = _disagreement(member) or member
    return [one for one in found if not isinstance(one, AdapterConfig)]


def _config(folder: Path, drop_unsupported: bool) -> AdapterConfig | LoraMetaError:
    """The configuration of a folder that has weights, or what is wrong."""
    try:
        if not os.path.lexists(folder / WEIGHTS):
            raise InvalidAdapter(_without_weights(folder))
        return AdapterConfig.load(folder, drop_unsupported)
    except LoraMetaError as error:
        return error


def _without_weights(folder: Path) -> str:
    if (folder / PICKLE).exists():
        return (
            f"`{folder}` holds only `{PICKLE}`, a pickle, which is never opened because it can run "
            f"any code\nsave the adapter again with PEFT, which writes `{WEIGHTS}`"
        )
    if (folder / MLX_WEIGHTS).exists():
        return f"`{folder}` is an MLX adapter (`{MLX_WEIGHTS}`); only PEFT's `{WEIGHTS}` is read"
    return f"`{folder}` has no adapter: `{WEIGHTS}` is missing"


def _disagreement(member: Member) -> InvalidAdapter | None:
    """What the configuration says otherwise than the tensors, if anything."""
    names = [module.name for module in member.modules]
    try:
        expected = member.config.ranks(names)
        _ = member.scalings
    except InvalidAdapter as error:
        return error
    for module, rank in zip(member.modules, expected, strict=True):
        if module.rank != rank:
            config = member.config
            field = "`r`" if rank == config.r else f"`rank_pattern` (`r` is {config.r})"
            return InvalidAdapter(
                f"`{member.folder / FILE_NAME}`: {field} gives `{module.name}` rank {rank}, "
                f"its tensors in `{WEIGHTS}` have rank {module.rank}"
            )
    return None


@lru_cache(maxsize=32)
def _modules(layout: _core.Layout) -> tuple[_core.Module, ...]:
    """The modules of a layout, which hundreds of members may share, taken over once."""
    return tuple(layout.modules)
