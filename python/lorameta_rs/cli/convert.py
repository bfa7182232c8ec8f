"""`lorameta-rs convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options

if TYPE_CHECKING:
    from pathlib import Path

    from lorameta_rs.merge import Options


@click.command()
@click.argument("adapter", metavar="ADAPTER|BANK", type=options.PATH)
@click.option(
    "-o",
    "--out",
    type=options.PATH,
    required=True,
    metavar="OUT",
    help="The folder to be made; for gguf also a file, if it ends with .gguf.",
)
@click.option(
    "--to",
    type=click.Choice(options.FORMATS),
    required=True,
    help="`peft` for transformers and servers, `gguf` for llama.cpp and Ollama, `mlx` for mlx-lm.",
)
@click.option(
    "--dtype",
    type=click.Choice(options.CONVERTED),
    default=options.CONVERTED[0],
    show_default=True,
    help="The type of the tensors; q8_0, for gguf, is that of A, and B is f16.",
)
@options.base_config
@click.option(
    "--force",
    is_flag=True,
    help="Replace OUT, if it is an adapter of that format and nothing else.",
)
@click.option(
    "--memory",
    type=click.IntRange(1, 1 << 24),
    default=64,
    show_default=True,
    metavar="MIB",
    help="The budget for buffers.",
)
@options.threads
def convert(
    adapter: Path,
    out: Path,
    to: str,
    dtype: str,
    base_config: Path | None,
    force: bool,
    **arguments: Any,
) -> None:
    """Write an adapter, or a bank, in another runtime's format.

    ADAPTER is one of PEFT, GGUF, MLX, diffusers, or kohya. A BANK becomes one whose members are in
    the other format, with the fingerprints and the tokenizer that it needs.
    """
    from lorameta_rs.formats.conversion import DTYPES
    from lorameta_rs.formats.opening import is_adapter
    from lorameta_rs.merge import Options

    run = Options(memory=arguments["memory"] << 20, threads=arguments["threads"], force=force)
    if is_adapter(adapter):
        _one(adapter, out, to, DTYPES[dtype], base_config, run)
    else:
        _bank(adapter, out, to, DTYPES[dtype], base_config, run)


def _one(
    path: Path, out: Path, to: str, dtype: str, base_config: Path | None, run: Options
) -> None:
    from lorameta_rs import files
    from lorameta_rs._core import gguf_metadata
    from lorameta_rs.errors import InvalidSetting, OutputExists
    from lorameta_rs.formats.base import Base
    from lorameta_rs.formats.conversion import FILES, write, write_gguf
    from lorameta_rs.formats.conversion import check as check_format
    from lorameta_rs.formats.opening import is_gguf, open_adapters
    from lorameta_rs.runtimes import commands
    from lorameta_rs.staging import check, staged

    # Of kohya's base only the names are read: a pipeline's folder has no config.json.
    known = to == "gguf" or is_gguf(path)
    base = Base.known(base_config, path) if known else None
    found = open_adapters(path, base, base_config)
    alone = to == "gguf" and out.suffix == ".gguf"
    if alone and len(found) > 1:
        raise InvalidSetting(f"`{path}` holds {len(found)} adapters: `{out}` has to be a folder")
    outs = [out] if len(found) == 1 else [out / member.name for member in found]
    if alone:
        if not run.force:
            check(outs)
        elif out.exists() and gguf_metadata(out).get("general.type") != "adapter":
            raise OutputExists(f"`{out}` is not replaced: it is no adapter\nchoose another name")
        check_format(found[0], to, base, run)  # before there are folders
        with files.refusals(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        with console.progress("converting") as update:
            write_gguf(found[0], out, base, dtype, run, update)
    else:
        with staged(outs, FILES[to], run.force) as stages, console.progress("converting") as update:
            for member, stage in zip(found, stages, strict=True):
                write(member, stage, to, dtype, base, run, update)
    for member, place in zip(found, outs, strict=True):
        console.say(f"wrote {place}, {console.number(len(member.modules), 'module')}")
    name = found[0].config.base_model_name_or_path
    gguf = None if base is None else base.gguf
    for runtime, line in commands(to, name, outs[0], max(found[0].ranks), gguf).items():
        console.say(f"{runtime}: {line}")


def _bank(
    path: Path, out: Path, to: str, dtype: str, base_config: Path | None, run: Options
) -> None:
    from lorameta_rs.bank import Bank
    from lorameta_rs.formats.base import Base
    from lorameta_rs.formats.packing import pack

    if run.force:
        raise click.UsageError("--force replaces an adapter, not a bank: choose another folder")
    bank = Bank(path)
    console.report(bank)
    base = Base.known(base_config, path)
    with console.steps("converting", len(bank)) as step:
        made = pack(bank, out, to, dtype, base, run, step)
    console.report(bank)
    console.say(
        f"wrote {out}: {console.number(len(bank), 'member')}, {console.size(made)} of adapters, "
        f"which were {console.size(sum(member.adapter.size for member in bank.members))}"
    )
