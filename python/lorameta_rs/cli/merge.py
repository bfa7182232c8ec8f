"""`lorameta-rs merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options
from lorameta_rs.cli.rank import HEADERS, described, fingerprinted, rows, say_relevance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorameta_rs._core import Plan
    from lorameta_rs.bank import Bank
    from lorameta_rs.merge import Job, Options

_SHOWN = 8
_LARGEST_WEIGHTS = 16 << 20


@click.command()
@click.argument("bank", type=options.PATH, required=False)
@click.argument("datasets", metavar="[DATASET]...", type=options.PATH, nargs=-1)
@click.option(
    "-o",
    "--out",
    "outs",
    metavar="OUT",
    type=options.PATH,
    multiple=True,
    required=True,
    help="The folder to be made. With several datasets: one -o for each, or one for all, "
    "in which each dataset gets a folder.",
)
@click.option(
    "--weights",
    metavar="FILE|NAME=W",
    multiple=True,
    help="Coefficients instead of a dataset: a JSON file of names and numbers, or NAME=0.3.",
)
@click.option("--repeat", type=options.PATH, help="Do again what this lorameta.json records.")
@options.settings
@options.bank
@click.option(
    "--method",
    type=click.Choice(options.METHODS),
    default=options.METHODS[0],
    show_default=True,
    help="How adapters are combined.",
)
@click.option(
    "--dtype",
    type=click.Choice(options.DTYPES),
    default=options.DTYPES[0],
    show_default=True,
    help="The type of the tensors that are written.",
)
@options.threads
@click.option(
    "--memory",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="MIB",
    help="The budget for buffers and mapped pages.",
)
@click.option(
    "--io",
    type=click.Choice(("auto", "mmap", "read")),
    default="auto",
    show_default=True,
    help="How adapters are read; `read` for network and FUSE mounts, where files may vanish.",
)
@click.option("--allow-nan", is_flag=True, help="Go on where tensors hold NaN or infinity.")
@click.option("--verify", is_flag=True, help="Hash the members' files and compare.")
@click.option("--force", is_flag=True, help="Replace OUT if a merge has made it.")
@click.option("--dry-run", is_flag=True, help="Say what would be read; write nothing.")
@options.as_json
def merge(
    bank: Path | None,
    datasets: tuple[Path, ...],
    outs: tuple[Path, ...],
    weights: tuple[str, ...],
    repeat: Path | None,
    dry_run: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Make an adapter for DATASET out of those of BANK.

    Compares the dataset with those of the bank's members, and writes the sum of their adapters,
    each weighted by how near it is, as a PEFT adapter folder.
    """
    from lorameta_rs.merge import merge, plan

    if sum((bool(datasets), bool(weights), repeat is not None)) != 1:
        raise click.UsageError("give one of: a DATASET, --weights, --repeat")
    if repeat is not None:
        opened, jobs, run = _repeated(repeat, bank, _one(outs), arguments)
    else:
        if bank is None:
            raise click.UsageError("Missing argument 'BANK'.")
        run = _options(arguments)
        if weights:
            opened, jobs = _weighted(bank, weights, _one(outs), arguments)
        else:
            opened, jobs = _compared(bank, datasets, outs, arguments, keep=not dry_run)
    if not as_json:
        _say_jobs(jobs)
    if dry_run:
        done = plan(opened, jobs, run)
    else:
        with console.progress("merging") as update:
            done = merge(opened, jobs, run, update)
    if as_json:
        console.data({"jobs": [_described(job) for job in jobs], "plan": _plan(done)})
    else:
        _say_done(jobs, done, dry_run)


def _options(arguments: dict[str, Any]) -> Options:
    from lorameta_rs.merge import Options

    names = ("method", "dtype", "threads", "io", "allow_nan", "verify", "force")
    chosen = {name: arguments[name] for name in names}
    return Options(memory=arguments["memory"] << 20, **chosen)


def _one(outs: Sequence[Path]) -> Path:
    if len(outs) != 1:
        raise click.UsageError("there is one adapter to be made: give one -o")
    return outs[0]


def _compared(
    bank: Path,
    datasets: Sequence[Path],
    outs: Sequence[Path],
    arguments: dict[str, Any],
    keep: bool,
) -> tuple[Bank, list[Job]]:
    """A job for each dataset."""
    from lorameta_rs.flow import jobs_for

    if len(outs) == len(datasets):
        folders = list(outs)
    elif len(outs) == 1:
        folders = [outs[0] / dataset.name.split(".")[0] for dataset in datasets]
    else:
        raise click.UsageError(f"{len(datasets)} datasets, {len(outs)} -o: give one, or as many")
    settings = options.settings_from(arguments)
    opened = fingerprinted(options.bank_from(bank, arguments), keep)
    return opened, jobs_for(opened, datasets, folders, settings, arguments["columns"])


def _weighted(
    bank: Path, weights: Sequence[str], out: Path, arguments: dict[str, Any]
) -> tuple[Bank, list[Job]]:
    """A job with the user's own coefficients."""
    from lorameta_rs.coefficients import explicit
    from lorameta_rs.merge import Job

    given = _read_weights(weights)
    opened = options.bank_from(bank, arguments)
    opened.require(given)
    console.report(opened)
    return opened, [Job(explicit(opened.names, given), out)]


def _repeated(
    path: Path, bank: Path | None, out: Path, arguments: dict[str, Any]
) -> tuple[Bank, list[Job], Options]:
    """The job that a `lorameta.json` records, from the same files."""
    from dataclasses import replace

    from lorameta_rs.coefficients import explicit
    from lorameta_rs.errors import FileChanged
    from lorameta_rs.index import Index
    from lorameta_rs.merge import Job
    from lorameta_rs.provenance import Provenance

    record = Provenance.load(path)
    settings = record.settings
    base = arguments | {"base_model": arguments["base_model"] or settings.get("base_model")}
    opened = options.bank_from(bank or Path(settings["bank"]), base)
    opened.require(record.coefficients)
    index = Index.of(opened)
    for member in opened.members:
        recorded = {one["name"]: one["sha256"] for one in record.members}.get(member.name)
        now = index.sha256(member)
        if None not in (recorded, now) and recorded != now:
            raise FileChanged(f"`{member.adapter.path}` is not the file that `{path}` records")
    console.report(opened)
    run = replace(
        _options(arguments),
        method=record.method,
        dtype=settings["dtype"],
        allow_nan=settings["allow_nan"],
    )
    return opened, [Job(explicit(opened.names, record.coefficients), out)], run


def _read_weights(given: Sequence[str]) -> dict[str, float]:
    """Names and numbers, from `NAME=0.3` or JSON files."""
    from lorameta_rs import files
    from lorameta_rs.errors import InvalidSetting

    weights: dict[str, float] = {}
    for word in given:
        name, equals, number = word.rpartition("=")
        if equals and not Path(word).exists():
            found: object = {name: _number(number)}
        else:
            with files.reading(Path(word)) as file:
                text = file.read(_LARGEST_WEIGHTS)
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InvalidSetting(f"`{word}`: not JSON: {error}") from error
        if not isinstance(found, dict):
            raise InvalidSetting(f"`{word}`: expected an object of names and numbers")
        for member, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidSetting(f"`{word}`: the weight of `{member}` is not a number")
            weights[member] = float(value)
    return weights


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _say_jobs(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if len(jobs) > 1:
            console.say(f"{job.dataset} → {job.out}")
        if job.ranking is not None:
            console.table(HEADERS, rows(job.ranking, _SHOWN))
            say_relevance(job.ranking)


def _say_done(jobs: Sequence[Job], done: Plan, dry_run: bool) -> None:
    used = sum(1 for column in zip(*(job.coefficients for job in jobs), strict=True) if any(column))
    read = f"{console.size(done.bytes)} of {used} adapters"
    memory = f"{console.size(done.memory)} of buffers and mapped pages, {done.threads} threads"
    if dry_run:
        console.say(f"would read {read}, once, with {memory}; nothing was written")
        return
    console.say(f"read {read}, with {memory}")
    for job in jobs:
        console.say(f"wrote {job.out}")


def _described(job: Job) -> dict[str, Any]:
    ranking = {} if job.ranking is None else described(job.ranking)
    dataset = None if job.dataset is None else str(job.dataset)
    return {"out": str(job.out), "dataset": dataset, **ranking}


def _plan(plan: Plan) -> dict[str, int]:
    return {"bytes": plan.bytes, "memory": plan.memory, "threads": plan.threads}
