"""`lorameta-rs merge`."""

from __future__ import annotations

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
    from lorameta_rs.provenance import Provenance

_SHOWN = 8
_OF_RESULT = ("method", "dtype", "allow_nan")
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
@options.columns("each DATASET")
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
    type=click.IntRange(1, 1 << 24),
    default=64,
    show_default=True,
    metavar="MIB",
    help="The budget for buffers and mapped pages.",
)
@click.option(
    "--io",
    type=click.Choice(("read", "mmap")),
    default="read",
    show_default=True,
    help="How adapters are read; `mmap` maps them, which a file that is cut short kills.",
)
@click.option("--allow-nan", is_flag=True, help="Go on where tensors hold NaN or infinity.")
@click.option("--verify", is_flag=True, help="Hash the members' files and compare.")
@click.option("--force", is_flag=True, help="Replace OUT if a merge has made it.")
@click.option("--dry-run", is_flag=True, help="Say what would be read; write nothing.")
@options.as_json
@click.pass_context
def merge(
    context: click.Context,
    /,
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
        _refuse(context, (*options.SETTINGS, "columns", *_OF_RESULT), "--repeat")
        opened, jobs, run = _repeated(repeat, bank, _one(outs), arguments)
    elif bank is None:
        raise click.UsageError("Missing argument 'BANK'.")
    else:
        run = _options(arguments)
        if weights:
            _refuse(context, (*options.SETTINGS, "columns"), "--weights")
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
        plan_of = {name: getattr(done, name) for name in ("bytes", "memory", "threads")}
        console.data({"jobs": [_described(opened, job) for job in jobs], "plan": plan_of})
    else:
        _say_done(jobs, done, dry_run)


def _refuse(context: click.Context, names: Sequence[str], beside: str) -> None:
    """Options that would have no effect are no options."""
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} has no effect beside {beside}")


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
    from lorameta_rs.merge import FILES
    from lorameta_rs.staging import check

    if len(outs) == len(datasets):
        folders = list(outs)
    elif len(outs) == 1:
        folders = [outs[0] / dataset.name.split(".")[0] for dataset in datasets]
    else:
        raise click.UsageError(f"{len(datasets)} datasets, {len(outs)} -o: give one, or as many")
    check(folders, FILES, arguments["force"])
    settings = options.settings_from(arguments)
    opened = options.bank_from(bank, arguments)
    fingerprinted(opened, keep)
    with console.rows("counting the new tokens") as update:
        jobs = jobs_for(opened, datasets, folders, settings, arguments["columns"], update)
    return opened, jobs


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

    from lorameta_rs.bank import ANY_BASE
    from lorameta_rs.errors import InvalidBank
    from lorameta_rs.provenance import Provenance
    from lorameta_rs.repeat import RepeatedJob

    record = Provenance.load(path)
    settings = record.settings
    base = arguments["base_model"] or settings["base_model"] or ANY_BASE
    folder = bank or Path(settings["bank"])
    opened = options.bank_from(folder, arguments | {"base_model": base})
    opened.require(record.coefficients)
    for name in record.coefficients:
        if name not in opened.names:
            raise InvalidBank(f"`{folder}` has no member `{name}`, which `{path}` records")
    console.report(opened)
    _same_files(opened, record, path)
    run = replace(_options(arguments), **{name: settings[name] for name in _OF_RESULT[1:]})
    job = RepeatedJob.of(record, opened, out)
    return opened, [job], replace(run, method=record.method)


def _same_files(bank: Bank, record: Provenance, path: Path) -> None:
    """See that the members' files are those of which an adapter was made."""
    from lorameta_rs import files
    from lorameta_rs.errors import FileChanged
    from lorameta_rs.index import Index

    index = Index.of(bank)
    recorded = {member["name"]: member["sha256"] for member in record.members}
    used = [member for member in bank.members if member.name in recorded]
    with console.steps("hashing adapters", len(used)) as step:
        for member in used:
            if step is not None:
                step(member)
            expected = recorded[member.name]
            if expected is None:
                continue
            # A bank that was copied has other times than its index says, and the same bytes.
            if expected != (index.sha256(member) or files.sha256(member.adapter.path)):
                raise FileChanged(f"`{member.adapter.path}` is not the file that `{path}` records")
    unknown = sum(sha256 is None for sha256 in recorded.values())
    if unknown:
        console.warn(
            f"`{path}` has no hash of {console.number(unknown, 'member')}: whether these are the "
            "same files as then is not known"
        )


def _read_weights(given: Sequence[str]) -> dict[str, float]:
    """Names and numbers, from `NAME=0.3` or JSON files."""
    from lorameta_rs import files
    from lorameta_rs.errors import InvalidSetting
    from lorameta_rs.json_stream import Decoder

    weights: dict[str, float] = {}
    for word in given:
        name, equals, number = word.rpartition("=")
        if equals and not Path(word).exists():
            found: object = {name: _number(number)}
        else:
            with files.reading(Path(word)) as file:
                text = file.read(_LARGEST_WEIGHTS)
            decoder = Decoder()
            try:
                found = decoder.decode(text.decode("utf-8-sig"))
            except ValueError as error:
                raise InvalidSetting(f"`{word}`: not JSON: {error}") from error
            if decoder.repeated is not None:
                raise InvalidSetting(f"`{word}`: `{decoder.repeated}` is there twice")
        if not isinstance(found, dict):
            raise InvalidSetting(f"`{word}`: expected an object of names and numbers")
        for member, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidSetting(f"`{word}`: the weight of `{member}` is not a number")
            if member in weights:
                raise InvalidSetting(f"`{word}`: the weight of `{member}` is given twice")
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
    read = f"{console.size(done.bytes)} of {console.number(used, 'adapter')}"
    memory = (
        f"{console.size(done.memory)} of buffers and mapped pages, "
        f"{console.number(done.threads, 'thread')}"
    )
    if dry_run:
        console.say(f"would read {read}, once, with {memory}; nothing was written")
        return
    console.say(f"read {read}, with {memory}")
    for job in jobs:
        console.say(f"wrote {job.out}")


def _described(bank: Bank, job: Job) -> dict[str, Any]:
    if job.ranking is None:
        pairs = zip(bank.names, job.coefficients.tolist(), strict=True)
        members = [{"name": name, "coefficient": c} for name, c in pairs if c != 0]
        return {"out": str(job.out), "dataset": None, "members": members}
    return {"out": str(job.out), "dataset": str(job.dataset), **described(job.ranking)}
