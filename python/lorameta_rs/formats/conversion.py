"""One adapter, written in another format: its tensors by the core, and what else belongs to it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import _core, files
from lorameta_rs.config import as_json
from lorameta_rs.config_fields import FILE_NAME
from lorameta_rs.errors import InvalidSetting
from lorameta_rs.formats.base import Base
from lorameta_rs.formats.mlx import mlx_config
from lorameta_rs.member import GGUF_WEIGHTS, MLX_WEIGHTS, WEIGHTS
from lorameta_rs.result import result_config
from lorameta_rs.sums import common_scaling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorameta_rs.member import Member
    from lorameta_rs.merge import Options

    Progress = Callable[[int, int], object]

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
"""How the command line calls the types of tensors, and how the core does."""

FILES = {
    "peft": (FILE_NAME, WEIGHTS),
    "gguf": (GGUF_WEIGHTS,),
    "mlx": (FILE_NAME, MLX_WEIGHTS),
}
"""What a folder of each format has."""


def write(
    member: Member,
    folder: Path,
    to: str,
    dtype: str,
    base: Base | None,
    options: Options,
    progress: Progress | None = None,
) -> None:
    """Write an adapter's files into a folder.

    Args:
        member: The adapter, of any format.
        folder: It is there already.
        to: One of `FORMATS`.
        dtype: `float32`, `float16`, `bfloat16`; for `gguf` also `q8_0`, which is that of A alone:
            the rows of B are too short for it, and are float16.
        base: The base model, which `gguf` depends on.
        options: `memory`, `threads`, `io` and `allow_nan` are used.
        progress: Told bytes read and bytes in all.

    Raises:
        InvalidSetting: The format needs a base, or does not have the type.
        LoraMetaError: A file cannot be read or written, or a tensor cannot be converted.
    """
    if to == "gguf":
        write_gguf(member, folder / GGUF_WEIGHTS, base, dtype, options, progress)
        return
    if dtype == "q8_0":
        raise InvalidSetting(f"dtype q8_0: only GGUF has it, {to} does not")
    # One rank and one scaling for all modules: mlx-lm has no others, and servers read no others.
    rank = max(member.ranks)
    alpha, strengths = common_scaling([member], rank)
    config = (
        result_config(None, [member], rank, alpha)
        if to == "peft"
        else mlx_config([module.name for module in member.modules], rank, alpha / rank)
    )
    _core.convert(
        member.adapter,
        [1.0] * len(member.modules) if strengths is None else strengths[0],
        os.fspath(folder / (WEIGHTS if to == "peft" else MLX_WEIGHTS)),
        to,
        dtype,
        options,
        rank=rank,
        progress=progress,
    )
    files.write_whole(folder / FILE_NAME, as_json(config).encode())


def check(member: Member, to: str, base: Base | None, options: Options) -> None:
    """See that a format can express an adapter, before there is work to lose; arguments as `write`.

    Raises:
        InvalidSetting: It cannot, or needs to know more of the base.
    """
    if to == "gguf":
        write_gguf(member, None, base, "float32", options)
    else:
        strengths = [1.0] * len(member.modules)
        _core.convert(member.adapter, strengths, None, to, "float32", options)


def write_gguf(
    member: Member,
    path: Path | None,
    base: Base | None,
    dtype: str,
    options: Options,
    progress: Progress | None = None,
) -> None:
    """Write an adapter as the file that llama.cpp and Ollama load on the base model in GGUF.

    llama.cpp multiplies a module's B A by alpha / r, with one alpha for the file. Where that cannot
    say the scalings, as for patterns, they are multiplied into B, and alpha is 0, which means none.

    Args:
        member: The adapter, of any format.
        path: The file; None to see only whether it could be written.
        base: The base model; `Base.load` reads it from a GGUF file or a `config.json`.
        dtype: As `write`.
        options: As `write`.
        progress: As `write`.

    Raises:
        InvalidSetting: No base is given, or one that does not fit.
        LoraMetaError: As `write`.
    """
    base = known_base(base, member.folder)
    alphas = {
        np.float32(scaling * module.rank)
        for module, scaling in zip(member.modules, member.scalings, strict=True)
    }
    alpha = float(alphas.pop()) if len(alphas) == 1 else 0.0
    _fits(member, base)
    known = {
        "general.name": member.name,
        "lorameta.base_model": member.config.base_model_name_or_path,
    }
    _core.convert(
        member.adapter,
        [1.0] * len(member.modules) if alpha else member.scalings,
        None if path is None else os.fspath(path),
        "gguf",
        dtype,
        options,
        architecture=base.architecture,
        alpha=alpha,
        heads=base.head_counts,
        metadata={key: value for key, value in known.items() if value},
        progress=progress,
    )


def _fits(member: Member, base: Base) -> None:
    """See that the base has the adapter's sizes, where both show them.

    Raises:
        InvalidSetting: It has others.
    """
    if (found := _misfit(member, base)) is not None:
        raise InvalidSetting(f"`{member.folder}`: {found}: the base model is another one")


def _misfit(member: Member, base: Base) -> str | None:
    """What of an adapter is of another size than the base says."""
    shapes: dict[str, tuple[int, int]] = {}
    for module in member.modules:
        last = module.name.rpartition(".")[2]
        shapes.setdefault(last, (module.a_shape[1], module.b_shape[0]))
    for name in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        width = shapes[name][0] if name in shapes else None
        if width is not None and base.hidden_size not in (None, width):
            return f"A of {name} is {width} wide, expected the hidden size, {base.hidden_size}"
    if base.head_counts is None or "q_proj" not in shapes:
        return None
    heads, kv_heads = base.head_counts
    q = shapes["q_proj"][1]
    if base.head_dim is not None and q != heads * base.head_dim:
        expected = heads * base.head_dim
        return f"q has {q} rows, expected {expected}, {heads} heads of {base.head_dim}"
    k = shapes["k_proj"][1] if "k_proj" in shapes else None
    if k is not None and q * kv_heads != k * heads:
        sizes = f"{heads} and {kv_heads} heads of one size"
        return f"q has {q} rows and k has {k}, which are no {sizes}"
    return None


def known_base(given: Base | None, folder: Path) -> Base:
    """The base that is given, or else what an adapter's or a bank's folder says.

    Raises:
        InvalidSetting: Neither knows it.
    """
    base = given or Base.known(None, folder)
    if base is None:
        raise InvalidSetting(
            f"`{folder}`: a GGUF adapter names its base model's architecture, which is not "
            "known\ngive the base's config.json, its folder or its GGUF file with --base-config, "
            "or write it into [base] of bank.toml"
        )
    return base
