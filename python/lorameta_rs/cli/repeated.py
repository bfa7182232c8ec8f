"""`merge --repeat`: the job that an earlier merge recorded."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.bank import ANY_BASE
from lorameta_rs.cli import console, options
from lorameta_rs.config_fields import FILE_NAME as CONFIG
from lorameta_rs.errors import FileChanged, InvalidBank, MissingFile
from lorameta_rs.formats.base import Base
from lorameta_rs.index import hash_adapters
from lorameta_rs.provenance import FILE_NAME, OF_RESULT, Provenance
from lorameta_rs.repeat import RepeatedJob

if TYPE_CHECKING:
    from lorameta_rs.bank import Bank
    from lorameta_rs.merge import Job, Options


def repeated(
    context: click.Context,
    path: Path,
    bank: Path | None,
    out: Path,
    run: Options,
    arguments: dict[str, Any],
) -> tuple[Bank, list[Job], Options]:
    """The job that a `lorameta.json` records, from the same files, and `run` as it was then."""
    path = path / FILE_NAME if path.is_dir() else path
    record = Provenance.load(path)
    settings = record.settings
    base = arguments["base_model"] or settings["base_model"] or ANY_BASE
    folder = bank or Path(settings["bank"])
    if not folder.exists():
        reason = "there is no such bank any more\nsay where it is now: merge BANK --repeat FILE"
        raise MissingFile(errno.ENOENT, reason, str(folder))
    weights = arguments["base_weights"] or settings.get("base_weights")
    recorded = {"drop_unsupported": settings.get("drop_unsupported", False)}
    recorded |= {"base_model": base, "base_weights": weights}
    opened = options.bank_from(folder, arguments | recorded)
    opened.require(record.coefficients)
    for name in record.coefficients:
        if name not in opened.names:
            raise InvalidBank(f"`{folder}` has no member `{name}`, which `{path}` records")
    console.report(opened)
    _same_files(opened, record, path)
    # What an earlier version did not record had its default then.
    of_result = {name: settings[name] for name in OF_RESULT if name in settings}
    job = RepeatedJob.of(record, opened, out)
    run = replace(run, **of_result, method=record.method)
    if context.get_parameter_source("formats") is click.core.ParameterSource.DEFAULT:
        run = replace(run, formats=record.formats)
    if run.base is None and (table := settings.get("base")) is not None:
        run = replace(run, base=Base.of_table(f"`{path}`", table))
    return opened, [job], run


def _same_files(bank: Bank, record: Provenance, path: Path) -> None:
    """See that the members' files are those of which an adapter was made."""
    recorded = {member["name"]: member for member in record.members}
    used = [member for member in bank.members if member.name in recorded]
    with console.steps("hashing adapters", len(used)) as step:
        hash_adapters(bank, used, progress=step)
    for member in used:
        then = recorded[member.name]
        for file, now, digest in (
            (member.adapter.path, bank.index.sha256(member), then["sha256"]),
            (member.folder / CONFIG, member.config_sha256, then.get("config_sha256")),
        ):
            if digest is not None and digest != now:
                raise FileChanged(f"`{file}` is not the file that `{path}` records")
