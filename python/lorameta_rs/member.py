"""One adapter folder: its configuration beside its tensors, and whether the two agree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from lorameta_rs import _core, files
from lorameta_rs.config import AdapterConfig
from lorameta_rs.config_fields import FILE_NAME
from lorameta_rs.errors import InvalidAdapter, LoraMetaError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"
GGUF = ".gguf"
GGUF_WEIGHTS = "adapter.gguf"

_OF_ONE = "take both files from where one adapter was saved"


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
    def config_sha256(self) -> str | None:
        """The SHA-256 of its configuration's file, which a GGUF file has none of."""
        path = self.folder / FILE_NAME
        return files.sha256(path) if path.exists() else None

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What is odd about it, but does no harm."""
        both = (self.folder / PICKLE).exists()
        pickle = (f"`{PICKLE}` lies beside `{WEIGHTS}` and is not read",) if both else ()
        return (*self.config.warnings, *self.adapter.layout.notes, *pickle)


def open_members(
    folders: Sequence[Path],
    drop_unsupported: bool = False,
    heads: tuple[int, int] | None = None,
    *,
    dora: bool = False,
) -> list[Member | LoraMetaError]:
    """Each folder's adapter, or what is wrong with it; the headers are read in parallel.

    A folder is one of PEFT, or holds one GGUF file. `drop_unsupported` takes the factors alone of
    adapters that are more than plain LoRA; `heads` are the base model's, of queries and of keys,
    for GGUF files that need them and do not say them; `dora` takes DoRA as it is.
    """
    found = [_files(folder, drop_unsupported, dora) for folder in folders]
    sound = [i for i, one in enumerate(found) if not isinstance(one, LoraMetaError)]
    paths = [os.fspath(one[0]) for one in found if not isinstance(one, LoraMetaError)]
    opened = _core.open_adapters(paths, drop_unsupported, heads, dora=dora)
    members = dict(zip(sound, opened, strict=True))
    return [
        one if isinstance(one, LoraMetaError) else _member(folder, one[1], members[i])
        for i, (folder, one) in enumerate(zip(folders, found, strict=True))
    ]


def gguf_member(name: str, folder: Path, adapter: _core.Adapter) -> Member:
    """The member that a GGUF file is: it says itself what PEFT has in a configuration.

    llama.cpp scales by alpha / r, or, where alpha is zero or missing, not at all.
    """
    keys = adapter.metadata
    alpha = keys.get("adapter.lora.alpha", 0.0)
    ranks = {module.name: module.rank for module in adapter.layout.modules}
    alphas = dict.fromkeys(ranks, float(alpha)) if alpha else {}
    base = keys.get("lorameta.base_model", keys.get("general.base_model.0.name"))
    path = adapter.path
    config = AdapterConfig.stated(path, ranks, alphas, None if base is None else str(base))
    return Member(name, folder, config, adapter)


def _files(
    folder: Path, drop_unsupported: bool, dora: bool
) -> tuple[Path, AdapterConfig | None] | LoraMetaError:
    """The weights of a folder, and their configuration where it is a file; or what is wrong."""
    try:
        with files.refusals(folder):
            present = sorted(path.name for path in folder.iterdir())
        if WEIGHTS in present:
            return folder / WEIGHTS, AdapterConfig.load(folder, drop_unsupported, dora)
        others = [name for name in present if name.endswith(GGUF)]
        if GGUF_WEIGHTS in others or len(others) == 1:
            return folder / (GGUF_WEIGHTS if GGUF_WEIGHTS in others else others[0]), None
        raise InvalidAdapter(_without_weights(folder, present))
    except LoraMetaError as error:
        return error


def _member(
    folder: Path, config: AdapterConfig | None, adapter: _core.Adapter | LoraMetaError
) -> Member | LoraMetaError:
    if isinstance(adapter, LoraMetaError):
        return adapter
    if config is None:
        return gguf_member(folder.name, folder, adapter)
    if adapter.container != "peft":
        name = f"{adapter.layout.modules[0].name}.lora_a"
        return InvalidAdapter(
            f"`{adapter.path}`: `{name}` and others are {adapter.container} names, not PEFT's\n"
            "`lorameta-rs convert` makes a PEFT adapter of it"
        )
    try:
        member = Member(folder.name, folder, config, _with_experts(config, adapter))
    except InvalidAdapter as error:
        return error
    return _disagreement(member) or member


def _with_experts(config: AdapterConfig, adapter: _core.Adapter) -> _core.Adapter:
    """The adapter, with as many experts in each targeted parameter as its rank leaves room for."""
    if not config.target_parameters:
        return adapter
    modules = adapter.layout.modules
    ranks = config.ranks([module.name for module in modules])
    return adapter.with_experts(
        [
            module.rank // rank if config.parameters(module.name) and module.rank % rank == 0 else 1
            for module, rank in zip(modules, ranks, strict=True)
        ]
    )


def _without_weights(folder: Path, present: Sequence[str]) -> str:
    if PICKLE in present:
        return (
            f"`{folder}` holds only `{PICKLE}`, a pickle, which is never opened because it can run "
            f"any code\nsave the adapter again with PEFT, which writes `{WEIGHTS}`"
        )
    if MLX_WEIGHTS in present:
        hint = "`lorameta-rs convert` makes a PEFT adapter of it"
        return f"`{folder}` is an MLX adapter (`{MLX_WEIGHTS}`)\n{hint}"
    if others := [name for name in present if name.endswith(GGUF)]:
        names = ", ".join(f"`{name}`" for name in others[:3])
        return (
            f"`{folder}` holds {len(others)} GGUF files ({names}{', …' * (len(others) > 3)})\n"
            f"an adapter's folder holds one, or calls it `{GGUF_WEIGHTS}`"
        )
    return (
        f"`{folder}` has no adapter: `{WEIGHTS}` is missing\nput it there, or move the folder away"
    )


def _disagreement(member: Member) -> InvalidAdapter | None:
    """What the configuration says otherwise than the tensors, if anything."""
    names = [module.name for module in member.modules]
    try:
        expected = member.config.ranks(names)
        _ = member.scalings
    except InvalidAdapter as error:
        return error
    declared = member.config.use_dora
    for module in member.modules:
        if module.dora != declared:
            return InvalidAdapter(
                f"`{member.folder / FILE_NAME}`: `use_dora` is {str(declared).lower()}, "
                f"`{module.name}` has {'a' if module.dora else 'no'} magnitude in `{WEIGHTS}`"
                f"\n{_OF_ONE}"
            )
    for module, rank in zip(member.modules, expected, strict=True):
        if module.rank != rank:
            config = member.config
            field = "`r`" if rank == config.r else f"`rank_pattern` (`r` is {config.r})"
            return InvalidAdapter(
                f"`{member.folder / FILE_NAME}`: {field} gives `{module.name}` rank {rank}, "
                f"its tensors in `{WEIGHTS}` have rank {module.rank}\n{_OF_ONE}"
            )
    return None


@lru_cache(maxsize=32)
def _modules(layout: _core.Layout) -> tuple[_core.Module, ...]:
    """The modules of a layout, which hundreds of members may share, taken over once."""
    return tuple(layout.modules)
