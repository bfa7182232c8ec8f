"""`lorameta-rs inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorameta_rs.member import Member

HEADERS = ("adapter", "rank", "scaling", "modules", "type", "size", "base model", "faults")


@click.command()
@click.argument("paths", metavar="PATH...", type=options.PATH, nargs=-1, required=True)
@click.option("--no-data", is_flag=True, help="Read the headers alone, not the tensors.")
@options.as_json
def inspect(paths: Sequence[Path], no_data: bool, as_json: bool) -> None:
    """Say what adapters are, and what is wrong with them.

    PATH is an adapter, or a bank for all of its members. The status is 1 if any cannot be used.
    """
    from lorameta_rs import files
    from lorameta_rs.bank import member_folders
    from lorameta_rs.config import FILE_NAME
    from lorameta_rs.member import WEIGHTS, Member, open_members

    folders = []
    for path in paths:
        with files.refusals(path):
            path.stat()
        alone = (path / FILE_NAME).exists() or (path / WEIGHTS).exists()
        folders += [path] if alone else member_folders(path) or [path]
    found = []
    with console.steps("reading adapters", len(folders)) as step:
        for folder, opened in zip(folders, open_members(folders), strict=True):
            if step is not None:
                step(folder)
            if isinstance(opened, Member):
                found.append(_member(opened, look=not no_data))
            else:
                fault = str(opened)
                found.append({"adapter": str(folder), "usable": False, "faults": [fault]})
    if as_json:
        console.data(found)
    else:
        console.table(HEADERS, [_row(one) for one in found])
        for one in found:
            for fault in one["faults"]:
                tell = console.warn if one["usable"] else console.fail
                tell(f"`{one['adapter']}`: {fault}")
    if not all(one["usable"] for one in found):
        raise click.exceptions.Exit(1)


def _member(member: Member, look: bool) -> dict[str, Any]:
    from lorameta_rs._core import scan

    odd = scan(member.adapter) if look else []
    unusable = [f"`{tensor}` holds {what}" for tensor, what in odd if what != "only zeros"]
    harmless = [f"`{tensor}` holds {what}" for tensor, what in odd if what == "only zeros"]
    return {
        "adapter": str(member.folder),
        "usable": not unusable,
        "ranks": sorted(member.ranks),
        "scalings": sorted(set(member.scalings)),
        "modules": len(member.modules),
        "dtypes": sorted({dtype for module in member.modules for dtype in module.dtypes}),
        "bytes": member.adapter.size,
        "base_model": member.config.base_model_name_or_path,
        "faults": [*unusable, *harmless, *member.notes],
    }


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    if "ranks" not in one:
        return (one["adapter"], *("",) * 6, "unusable")
    return (
        one["adapter"],
        ", ".join(str(rank) for rank in one["ranks"]),
        ", ".join(f"{scaling:g}" for scaling in one["scalings"]),
        str(one["modules"]),
        ", ".join(one["dtypes"]),
        console.size(one["bytes"]),
        one["base_model"] or "",
        str(len(one["faults"]) or ""),
    )
