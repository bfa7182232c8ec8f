"""`lorameta-rs inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorameta_rs.errors import LoraMetaError
    from lorameta_rs.member import Member

HEADERS = ("adapter", "rank", "scaling", "modules", "type", "size", "‖ΔW‖", "base model", "faults")
_SHOWN = 8


@click.command()
@click.argument("paths", metavar="PATH...", type=options.PATH, nargs=-1, required=True)
@click.option("--no-data", is_flag=True, help="Read the headers alone, not the tensors.")
@click.option("--norms", is_flag=True, help="Print ‖ΔW‖ of every module.")
@options.base_config
@options.as_json
def inspect(
    paths: Sequence[Path], no_data: bool, norms: bool, base_config: Path | None, as_json: bool
) -> None:
    """Say what adapters are, and what is wrong with them.

    PATH is an adapter, of any format that `convert` reads, or a bank for all of its members. Says
    how large each adapter's ΔW is, and which began training from the same A; of an adapter, which
    servers refuse it or take it otherwise than PEFT. The status is 1 if any cannot be used.
    """
    from lorameta_rs.errors import LoraMetaError

    if no_data and norms:
        raise click.UsageError("--norms needs the tensors: leave --no-data out")
    adapters: list[tuple[Path, Member | LoraMetaError]] = []
    served = set()
    for path in paths:
        alone, own = _opened(path, base_config)
        adapters += own
        served |= {str(path)} if alone else set()
    found: list[dict[str, Any]] = []
    sound = []
    with console.steps("reading adapters", len(adapters)) as step:
        for path, opened in adapters:
            if step is not None:
                step(path)
            if isinstance(opened, LoraMetaError):
                fault = str(opened)
                found.append({"adapter": str(path), "usable": False, "faults": [fault]})
                continue
            found.append({"adapter": str(path)} | _member(opened, look=not no_data))
            if found[-1]["usable"]:
                sound.append((opened, found[-1]))
    groups = [] if no_data else _norms_and_groups(sound)
    if as_json:
        console.data({"adapters": found, "shared_a": groups})
    else:
        console.table(HEADERS, [_row(one) for one in found])
        if norms:
            console.table(
                ("adapter", "module", "‖ΔW‖"),
                [
                    (one["adapter"], module, f"{norm:.4g}")
                    for one in found
                    for module, norm in one.get("norms", {}).items()
                ],
            )
        for group in groups:
            more = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
            names = ", ".join(f"`{name}`" for name in group[:_SHOWN])
            console.say(f"began from the same A: {names}{more}")
        for one in found:
            for fault in one["faults"]:
                tell = console.warn if one["usable"] else console.fail
                # Most faults of a file begin with its path, and so with the adapter's.
                named = fault.startswith(f"`{one['adapter']}")
                tell(fault if named else f"`{one['adapter']}`: {fault}")
            # Of a bank's members nobody asks: what is made of them is served.
            for breach in one.get("servers", ()) if one["adapter"] in served else ():
                console.warn(f"`{one['adapter']}`: {breach}")
    if not all(one["usable"] for one in found):
        raise click.exceptions.Exit(1)


def _opened(
    path: Path, base_config: Path | None
) -> tuple[bool, list[tuple[Path, Member | LoraMetaError]]]:
    """Whether `path` is an adapter itself; and it, or a bank's members."""
    from lorameta_rs import files
    from lorameta_rs.bank import member_folders, misnamed
    from lorameta_rs.errors import LoraMetaError
    from lorameta_rs.formats.base import Base, heads_in
    from lorameta_rs.formats.opening import is_adapter, open_adapters
    from lorameta_rs.member import open_members

    with files.refusals(path):
        path.stat()
    if not is_adapter(path):
        folders = member_folders(path) or [path]
        heads = heads_in(path) if base_config is None else Base.load(base_config).head_counts
        members = open_members(folders, heads=heads)
        return False, [
            (folder, misnamed(folder) or member)
            for folder, member in zip(folders, members, strict=True)
        ]
    try:
        opened = open_adapters(path, Base.known(base_config, path), base_config)
    except LoraMetaError as error:
        return True, [(path, error)]
    places = [path] if len(opened) == 1 else [path / member.name for member in opened]
    return True, list(zip(places, opened, strict=True))


def _member(member: Member, look: bool) -> dict[str, Any]:
    from lorameta_rs._core import scan
    from lorameta_rs.servers import breaches

    odd = scan(member.adapter) if look else []
    unusable = [f"`{tensor}` holds {what}" for tensor, what in odd if what != "only zeros"]
    harmless = [f"`{tensor}` holds {what}" for tensor, what in odd if what == "only zeros"]
    return {
        "usable": not unusable,
        "ranks": sorted(member.ranks),
        "scalings": sorted(set(member.scalings)),
        "modules": len(member.modules),
        "dtypes": sorted({dtype for module in member.modules for dtype in module.dtypes}),
        "bytes": member.adapter.size,
        "base_model": member.config.base_model_name_or_path,
        "servers": breaches(member),
        "faults": [*unusable, *harmless, *member.notes],
    }


def _norms_and_groups(sound: Sequence[tuple[Member, dict[str, Any]]]) -> list[list[str]]:
    """Add each member's norms; answer the groups that began training from the same A."""
    from lorameta_rs.shape import delta_norms, shared_a

    members = [member for member, _ in sound]
    if not members:
        return []
    with console.progress("measuring ΔW") as update:
        norms = delta_norms(members, progress=update)
    for (_, one), own in zip(sound, norms, strict=True):
        one["norms"] = own
        one["norm"] = sum(norm**2 for norm in own.values()) ** 0.5
    return [[sound[i][1]["adapter"] for i in group] for group in shared_a(members)]


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    if "ranks" not in one:
        return (one["adapter"], *("",) * 7, "unusable")
    return (
        one["adapter"],
        ", ".join(str(rank) for rank in one["ranks"]),
        ", ".join(f"{scaling:g}" for scaling in one["scalings"]),
        str(one["modules"]),
        ", ".join(one["dtypes"]),
        console.size(one["bytes"]),
        f"{one['norm']:.3g}" if "norm" in one else "",
        one["base_model"] or "",
        str(len(one["faults"]) or ""),
    )
