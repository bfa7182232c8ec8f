"""`lorameta-rs merge`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options
from lorameta_rs.cli.rank import (
    HEADERS,
    calibrated,
    described,
    fingerprinted,
    rows,
    say_relevance,
    vectors,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorameta_rs._core import Outcome
    from lorameta_rs.bank import Bank
    from lorameta_rs.member import Member
    from lorameta_rs.merge import Job, Merged, Options
    from lorameta_rs.provenance import Provenance

_SHOWN = 8
_OF_RESULT = (
    *("method", "rank", "energy", "normalize", "density", "majority_sign", "seed"),
    *("dtype", "allow_nan", "memory"),
)
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
@options.calibration
@options.vectors
@click.option(
    "--refine",
    type=options.PATH,
    metavar="BASE.gguf",
    help="Look for better coefficients by what this base says to rows of DATASET (extra `llama`).",
)
@click.option(
    "--rows",
    type=click.IntRange(4),
    default=32,
    show_default=True,
    help="Of DATASET, for --refine; as many more are held out to judge by.",
)
@click.option(
    "--budget",
    type=click.IntRange(10),
    default=70,
    show_default=True,
    help="Evaluations of these rows, for --refine.",
)
@click.option(
    "--candidates",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Nearest members that --refine mixes with the merge.",
)
@click.option(
    "--cache",
    type=options.PATH,
    metavar="DIR",
    help="Keep what the base said there, and take up a --refine that was broken off.",
)
@options.columns("each DATASET")
@options.bank
@click.option(
    "--method",
    type=click.Choice(options.METHODS),
    default=options.METHODS[0],
    show_default=True,
    metavar="METHOD",
    help="How adapters are combined: `soup` sums A and B apart, `svd` and `cat` their products; "
    "`auto` takes `soup` where that is the same, else `svd`. Those of PEFT: linear, "
    "magnitude_prune, ties, dare_linear, dare_ties, and the last four with _svd behind them.",
)
@click.option(
    "--density", type=float, metavar="SHARE", help="What `ties`, `dare_…` and pruning keep."
)
@click.option(
    "--majority-sign",
    type=click.Choice(options.MAJORITIES),
    default=options.MAJORITIES[0],
    show_default=True,
    help="Whose sign `ties` elects: of the sum, or of the greater number.",
)
@click.option("--rank", type=click.IntRange(1), help="Of the result of `svd`.  [default: 16]")
@click.option(
    "--energy", type=float, metavar="SHARE", help="Or the share of ‖ΔW‖² that it is to keep."
)
@click.option(
    "--normalize",
    type=click.Choice(options.NORMALIZATIONS),
    help="`unit` brings each ΔW to norm one, and the sum to the mean of the norms: the default of "
    "`auto`, `svd` and `cat` for a DATASET.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of what is random.")
@click.option(
    "--dtype",
    type=click.Choice(options.DTYPES),
    default=options.DTYPES[0],
    show_default=True,
    help="The type of the tensors that are written.",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(options.FORMATS),
    multiple=True,
    default=options.FORMATS[:1],
    show_default=True,
    help="What is written: also several, each of which gets a folder in OUT.",
)
@options.base_config
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
    from dataclasses import replace

    from lorameta_rs.merge import merge, plan

    if sum((bool(datasets), bool(weights), repeat is not None)) != 1:
        raise click.UsageError("give one of: a DATASET, --weights, --repeat")
    arguments = options.as_paper(context, arguments)
    if repeat is not None:
        options.refuse(
            context,
            (*options.SETTINGS, "paper", "refine", "columns", "vectors", *_OF_RESULT),
            "--repeat",
        )
        opened, jobs, run = _repeated(repeat, bank, _one(outs), arguments)
    elif bank is None:
        raise click.UsageError("Missing argument 'BANK'.")
    else:
        run = _options(arguments)
        if weights:
            options.refuse(
                context, (*options.SETTINGS, "columns", "refine", "vectors"), "--weights"
            )
            opened, jobs = _weighted(bank, weights, _one(outs), arguments)
        else:
            opened, jobs, norms = _compared(context, bank, datasets, outs, arguments, not dry_run)
            if norms == "none" and run.normalize is None:  # `unit` is what a merge does anyway
                run = replace(run, normalize=norms)
            if arguments["refine"] is not None and not dry_run:
                jobs, run = _refined(opened, jobs, run, arguments)
    if not as_json:
        _say_jobs(jobs)
    if dry_run:
        done = plan(opened, jobs, run)
    else:
        with console.progress("merging") as update:
            done = merge(opened, jobs, run, update)
    if as_json:
        console.data(_as_data(opened, jobs, done, run))
    else:
        _say_done(opened, jobs, done, run, dry_run)


def _options(arguments: dict[str, Any]) -> Options:
    from lorameta_rs.formats.base import Base
    from lorameta_rs.merge import Options

    given = arguments["base_config"]
    base = None if given is None else Base.load(given)
    names = ("formats", *_OF_RESULT[:-1], "threads", "io", "verify", "force")
    chosen = {name: arguments[name] for name in names}
    return Options(memory=arguments["memory"] << 20, base=base, **chosen)


def _one(outs: Sequence[Path]) -> Path:
    if len(outs) != 1:
        raise click.UsageError("there is one adapter to be made: give one -o")
    return outs[0]


def _compared(
    context: click.Context,
    bank: Path,
    datasets: Sequence[Path],
    outs: Sequence[Path],
    arguments: dict[str, Any],
    keep: bool,
) -> tuple[Bank, list[Job], str | None]:
    """A job for each dataset, and what the bank's calibration does with norms."""
    from lorameta_rs.flow import jobs_for
    from lorameta_rs.merge import OWNED, written_to
    from lorameta_rs.staging import check

    if len(outs) == len(datasets):
        folders = list(outs)
    elif len(outs) == 1:
        folders = [outs[0] / dataset.name.split(".")[0] for dataset in datasets]
    else:
        raise click.UsageError(f"{len(datasets)} datasets, {len(outs)} -o: give one, or as many")
    formats = arguments["formats"]
    places = [place for folder in folders for place in written_to(folder, formats).values()]
    check(places, OWNED, arguments["force"])
    opened = options.bank_from(bank, arguments)
    fingerprinted(opened, keep, arguments["allow_nan"])
    settings, norms = calibrated(context, opened, arguments)
    given = vectors(opened, arguments["vectors"])
    with console.rows("counting the new tokens") as update:
        jobs = jobs_for(opened, datasets, folders, settings, arguments["columns"], update, given)
    opened.forget_fingerprints()
    return opened, jobs, norms


def _refined(
    bank: Bank, jobs: Sequence[Job], run: Options, arguments: dict[str, Any]
) -> tuple[list[Job], Options]:
    """The jobs with the coefficients that the base model's answers speak for."""
    import tempfile
    from dataclasses import replace

    from lorameta_rs.refine import Refining, refine

    how = Refining(
        arguments["refine"],
        rows=arguments["rows"],
        candidates=arguments["candidates"],
        budget=arguments["budget"],
        seed=arguments["seed"],
        threads=arguments["threads"],
        cache=arguments["cache"],
    )
    refined = []
    for job in jobs:
        with (
            tempfile.TemporaryDirectory() as folder,
            console.progress(f"refining, at most {how.budget + 2} evaluations") as update,
        ):
            found = refine(bank, job, run, how, Path(folder), update, _say_time)
        refined.append(found.job)
        mixed = sorted(zip(found.names, found.weights, strict=True), key=lambda one: -abs(one[1]))
        parts = ", ".join(f"{weight:.2f} {name}" for name, weight in mixed if abs(weight) >= 0.005)
        console.say(
            f"refined by {found.evaluations} evaluations: the loss of answers that were held out "
            f"is {found.after:.3f}, and {found.before:.3f} before"
            + (f"; {parts}" if found.kept else ": kept as it was")
        )
    # The coefficients that were found hold all that is to be done with norms.
    return refined, replace(run, method="svd", normalize="none")


def _say_time(seconds: float) -> None:
    console.say(f"refining takes about {console.duration(seconds)} at most")


def _weighted(
    bank: Path, weights: Sequence[str], out: Path, arguments: dict[str, Any]
) -> tuple[Bank, list[Job]]:
    """A job with the user's own coefficients."""
    import numpy as np

    from lorameta_rs.coefficients import explicit
    from lorameta_rs.merge import Job

    given, modules = _read_weights(weights)
    opened = options.bank_from(bank, arguments)
    opened.require(given)
    console.report(opened)
    if not modules:
        return opened, [Job(explicit(opened.names, {n: c for n, (c,) in given.items()}), out)]
    _check_modules(weights[0], modules, opened)
    columns = [
        explicit(opened.names, {name: row[i] for name, row in given.items()}, all_zero=True)
        for i in range(len(modules))
    ]
    return opened, [Job(np.stack(columns, axis=1), out, modules=modules)]


def _check_modules(file: str, modules: Sequence[str], bank: Bank) -> None:
    """See that each of the modules that a weights file names is one of the bank."""
    from lorameta_rs.errors import InvalidAdapter, InvalidSetting
    from lorameta_rs.rows import excerpt
    from lorameta_rs.sums import first_match

    names = sorted({module.name for member in bank.members for module in member.modules})
    for key in modules:
        try:
            found = first_match([key], names)
        except InvalidAdapter as error:
            raise InvalidSetting(f"`{file}`: {error}") from error
        if all(match is None for match in found):
            raise InvalidSetting(
                f"`{file}`: no module of the bank matches `{excerpt(key)}`; one is `{names[0]}`"
            )


def _repeated(
    path: Path, bank: Path | None, out: Path, arguments: dict[str, Any]
) -> tuple[Bank, list[Job], Options]:
    """The job that a `lorameta.json` records, from the same files."""
    from dataclasses import replace

    from lorameta_rs.bank import ANY_BASE
    from lorameta_rs.errors import InvalidBank
    from lorameta_rs.provenance import OF_RESULT, Provenance
    from lorameta_rs.repeat import RepeatedJob

    record = Provenance.load(path)
    settings = record.settings
    base = arguments["base_model"] or settings["base_model"] or ANY_BASE
    folder = bank or Path(settings["bank"])
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
    return opened, [job], replace(_options(arguments), **of_result, method=record.method)


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


def _read_weights(given: Sequence[str]) -> tuple[dict[str, list[float]], tuple[str, ...]]:
    """Each name's numbers, and the modules that they are for: one number for all if there are none.

    From `NAME=0.3`, a JSON file `{"name": 0.3}`, or one with a number for each of several modules:
    `{"modules": ["0", "1", ".*q_proj"], "weights": {"name": [0.3, 0.1, 1.0]}}`.
    """
    from lorameta_rs.errors import InvalidSetting

    weights: dict[str, list[float]] = {}
    modules: tuple[str, ...] = ()
    for word in given:
        name, equals, number = word.rpartition("=")
        by_hand = equals and not os.path.exists(word)  # noqa: PTH110, no name is too long for it
        found: object = {name: _number(number)} if by_hand else _weights_file(word)
        match found:
            case {"modules": [*patterns], "weights": dict(rows)} if len(given) == 1 and all(
                isinstance(pattern, str) for pattern in patterns
            ):
                modules, found = tuple(patterns), rows
            case dict():
                pass
            case _:
                raise InvalidSetting(f"`{word}`: expected an object of names and numbers")
        for member, value in found.items():
            row = value if modules and isinstance(value, list) else [value] * max(len(modules), 1)
            if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in row):
                raise InvalidSetting(f"`{word}`: the weight of `{member}` is not a number")
            if len(row) != max(len(modules), 1):
                raise InvalidSetting(
                    f"`{word}`: `{member}` has {len(row)} weights for {len(modules)} modules"
                )
            if member in weights:
                raise InvalidSetting(f"`{word}`: the weight of `{member}` is given twice")
            weights[member] = [float(one) for one in row]
    return weights, modules


def _weights_file(path: str) -> object:
    from lorameta_rs import files
    from lorameta_rs.errors import InvalidSetting
    from lorameta_rs.json_stream import Decoder

    with files.reading(Path(path)) as file:
        text = file.read(_LARGEST_WEIGHTS)
    decoder = Decoder()
    try:
        found = decoder.decode(text.decode("utf-8-sig"))
    except ValueError as error:
        raise InvalidSetting(f"`{path}`: not JSON: {error}") from error
    if decoder.repeated is not None:
        raise InvalidSetting(f"`{path}`: `{decoder.repeated}` is there twice")
    return found


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


def _say_done(bank: Bank, jobs: Sequence[Job], done: Merged, run: Options, dry_run: bool) -> None:
    import numpy as np

    used = np.any([np.any(np.atleast_2d(job.coefficients.T), axis=0) for job in jobs], axis=0)
    plan = done.plan
    read = f"{console.size(plan.bytes)} of {console.number(int(used.sum()), 'adapter')}"
    memory = (
        f"{console.size(plan.memory)} of buffers and mapped pages, "
        f"{console.number(plan.threads, 'thread')}"
    )
    if done.norm_bytes:
        read += f", and {console.size(done.norm_bytes)} for norms, which `index` keeps,"
    if run.allow_nan and run.method == "auto":
        console.say(f"method {done.method}: `svd` could not decompose the NaN that is let by")
    if done.soup_error is not None:
        console.say(
            f"method {done.method}: summing A and B apart would change ΔW by "
            f"{'' if done.soup_error_exact else '≈ '}{100 * done.soup_error:.2g} %"
        )
    if dry_run:
        console.say(f"would read {read} with {memory}; nothing was written")
        return
    console.say(f"read {read} with {memory}")
    for job, outcome in zip(jobs, done.outcomes, strict=True):
        console.say(f"wrote {job.out}{_rank_of(outcome)}")
    _say_use(bank, jobs, run)


def _say_use(bank: Bank, jobs: Sequence[Job], run: Options) -> None:
    """Which servers refuse the results or take them otherwise, and how to run the first."""
    from lorameta_rs.merge import written_to
    from lorameta_rs.runtimes import commands
    from lorameta_rs.servers import breaches

    results = _served(jobs, run)
    # Results of one bank mostly break the same rules: each is said once.
    for breach in dict.fromkeys(breach for result in results for breach in breaches(result)):
        console.say(breach)
    base = results[0].config.base_model_name_or_path if results else bank.base_model
    rank = max(results[0].ranks) if results else 0
    gguf = None if run.base is None else run.base.gguf
    for to, out in written_to(jobs[0].out, run.formats).items():
        name = jobs[0].out.absolute().name
        for runtime, line in commands(to, base, out, rank, gguf, name).items():
            console.say(f"{runtime}: {line}")


def _served(jobs: Sequence[Job], run: Options) -> list[Member]:
    """The PEFT adapters that were written, which servers may load."""
    from lorameta_rs.member import Member, open_members
    from lorameta_rs.merge import written_to

    if "peft" not in run.formats:
        return []
    folders = [written_to(job.out, run.formats)["peft"] for job in jobs]
    return [one for one in open_members(folders) if isinstance(one, Member)]


def _rank_of(outcome: Outcome) -> str:
    """A result's rank and what it keeps of ΔW, where the method chose them."""
    if outcome.rank is None:
        return ""
    total = sum(energy for _, energy, _, _ in outcome.kept)
    if not total:
        return f", rank {outcome.rank}"
    shares = [(kept / energy, name) for name, energy, kept, _ in outcome.kept if energy]
    least, where = min(shares)
    about = "" if all(exact for *_, exact in outcome.kept) else "≈ "
    kept = sum(kept for _, _, kept, _ in outcome.kept) / total
    return (
        f", rank {outcome.rank}, which keeps {about}{100 * kept:.1f} % of ‖ΔW‖² "
        f"(least: {100 * least:.1f} % of {where})"
    )


def _as_data(bank: Bank, jobs: Sequence[Job], done: Merged, run: Options) -> dict[str, Any]:
    from lorameta_rs.servers import breaches

    described = [_described(bank, job) for job in jobs]
    for one, outcome in zip(described, done.outcomes, strict=False):
        one["rank"] = outcome.rank
        one["kept"] = [
            {"module": name, "energy": energy, "kept": kept, "exact": exact}
            for name, energy, kept, exact in outcome.kept
        ]
    served = _served(jobs, run) if done.outcomes else []
    for one, result in zip(described, served, strict=False):
        one["servers"] = breaches(result)
    plan = {name: getattr(done.plan, name) for name in ("bytes", "memory", "threads")}
    plan["norm_bytes"] = done.norm_bytes
    chosen = {
        "method": done.method,
        "soup_error": done.soup_error,
        "soup_error_exact": done.soup_error_exact,
    }
    return {"jobs": described, "plan": plan, **chosen}


def _described(bank: Bank, job: Job) -> dict[str, Any]:
    if job.ranking is None:
        pairs = zip(bank.names, job.coefficients.tolist(), strict=True)
        members = [
            {"name": name, "coefficient": c}
            for name, c in pairs
            if (any(c) if isinstance(c, list) else c)
        ]
        return {"out": str(job.out), "dataset": None, "members": members}
    return {"out": str(job.out), "dataset": str(job.dataset), **described(job.ranking)}
