"""`lorameta-rs merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorameta_rs.cli import console, options
from lorameta_rs.cli.rank import calibrated, fingerprinted, vectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorameta_rs.bank import Bank
    from lorameta_rs.merge import Job, Merged, Options

_OF_RESULT = (
    *("method", "rank", "energy", "normalize", "density", "majority_sign", "seed"),
    *("dtype", "allow_nan", "memory"),
)
_OF_RANKING = (*options.SETTINGS, "calibration", "columns", "refine", "vectors")
_OF_REFINING = ("rows", "budget", "candidates", "cache")


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
@click.option(
    "--repeat",
    type=options.PATH,
    help="Do again what this lorameta.json, or its folder's, records.",
)
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
    help="Nearest members that --refine mixes with the best of a few merges.",
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
    from lorameta_rs.cli.merged import as_data, say_done, say_jobs, say_lacking

    if sum((bool(datasets), bool(weights), repeat is not None)) != 1:
        raise click.UsageError("give one of: a DATASET, --weights, --repeat")
    arguments = options.as_paper(context, arguments)
    if context.params["paper"]:
        options.refuse(context, ("refine",), "--paper")
    if arguments["refine"] is None:
        options.refuse(context, _OF_REFINING, "--refine", "without")
    if repeat is not None:
        settled = (*_OF_RANKING, "paper", "drop_unsupported", *_OF_RESULT)
        options.refuse(context, settled, "--repeat")
        from lorameta_rs.cli.repeated import repeated

        run = _options(arguments)
        opened, jobs, run = repeated(context, repeat, bank, _one(outs), run, arguments)
        done = _merged(opened, jobs, run, dry_run)
    elif bank is None:
        raise click.UsageError("Missing argument 'BANK'.")
    elif weights:
        options.refuse(context, _OF_RANKING, "--weights")
        run = _options(arguments)
        opened, jobs = _weighted(bank, weights, _one(outs), arguments)
        done = _merged(opened, jobs, run, dry_run)
    else:
        opened, jobs, run, done = _predicted(context, bank, datasets, outs, arguments, dry_run)
    console.report(opened)
    say_lacking(opened, jobs)
    if dry_run and arguments["refine"] is not None:
        console.say(
            f"--refine would look for better coefficients by {arguments['budget']} evaluations "
            f"of {arguments['rows']} rows at most; what follows is of the merge without it"
        )
    if as_json:
        console.data(as_data(opened, jobs, done, run))
    else:
        say_jobs(jobs)
        say_done(opened, jobs, done, run, dry_run)


def _merged(bank: Bank, jobs: Sequence[Job], run: Options, dry_run: bool) -> Merged:
    """What the merge did, or would do."""
    from dataclasses import replace

    from lorameta_rs.cli.merged import memory_of
    from lorameta_rs.index import hash_adapters
    from lorameta_rs.merge import merge, plan
    from lorameta_rs.sums import used_members

    _check_places([job.out for job in jobs], run)
    if dry_run:
        return plan(bank, jobs, run)
    used = used_members(bank, jobs)
    with console.steps("hashing adapters", len(used)) as step:
        hash_adapters(bank, used, verify=run.verify, progress=step)
    if run.method.endswith("_svd"):
        # These form one module's ΔW at a time: what that takes is said before it is taken.
        console.say(f"{run.method} takes {memory_of(plan(bank, jobs, run))}")
    with console.progress("merging") as update:
        return merge(bank, jobs, replace(run, verify=False), update)


def _check_places(outs: Sequence[Path], run: Options) -> None:
    """See that the outputs can be made, before the work."""
    from lorameta_rs.merge import OWNED, written_to
    from lorameta_rs.staging import check

    places = [place for out in outs for place in written_to(out, run.formats).values()]
    check(places, OWNED, run.force)


def _options(arguments: dict[str, Any]) -> Options:
    from lorameta_rs.formats.base import Base
    from lorameta_rs.merge import Options

    given = arguments["base_config"] or arguments["refine"]
    base = None if given is None else Base.load(given)
    names = ("formats", *_OF_RESULT[:-1], "threads", "io", "verify", "force")
    chosen = {name: arguments[name] for name in names}
    return Options(memory=arguments["memory"] << 20, base=base, **chosen)


def _one(outs: Sequence[Path]) -> Path:
    if len(outs) != 1:
        raise click.UsageError("there is one adapter to be made: give one -o")
    return outs[0]


def _predicted(
    context: click.Context,
    bank: Path,
    datasets: Sequence[Path],
    outs: Sequence[Path],
    arguments: dict[str, Any],
    dry_run: bool,
) -> tuple[Bank, list[Job], Options, Merged]:
    """A job for each dataset, how they were run, and what that did."""
    from lorameta_rs.flow import without_faulty

    run = _options(arguments)
    if arguments["refine"] is not None:
        from lorameta_rs.refine import check_method

        check_method(run)
    if len(outs) == len(datasets):
        folders = list(outs)
    elif len(outs) == 1:
        folders = [outs[0] / dataset.name.split(".")[0] for dataset in datasets]
    else:
        raise click.UsageError(f"{len(datasets)} datasets, {len(outs)} -o: give one, or as many")
    _check_places(folders, run)
    opened = options.bank_from(bank, arguments)

    def make() -> tuple[list[Job], Options, Merged]:
        jobs, how = _compared(context, opened, datasets, folders, run, arguments, not dry_run)
        if arguments["refine"] is not None and not dry_run:
            jobs, how = _refined(opened, jobs, how, arguments)
        return jobs, how, _merged(opened, jobs, how, dry_run)

    return opened, *without_faulty(opened, make)


def _compared(
    context: click.Context,
    bank: Bank,
    datasets: Sequence[Path],
    outs: Sequence[Path],
    run: Options,
    arguments: dict[str, Any],
    keep: bool,
) -> tuple[list[Job], Options]:
    """A job for each dataset, and the options with what the bank's calibration says of norms."""
    from dataclasses import replace

    from lorameta_rs.flow import jobs_for, norms_of

    fingerprinted(bank, keep, run.allow_nan)
    settings = calibrated(context, bank, arguments)
    given = vectors(bank, arguments["vectors"])
    with console.rows("counting the new tokens") as update:
        jobs = jobs_for(bank, datasets, outs, settings, arguments["columns"], update, given)
    console.report(bank)
    bank.forget_fingerprints()
    return jobs, replace(run, normalize=run.normalize or norms_of(jobs, settings))


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
    if run.method == "auto":
        console.say("method svd: what --refine finds is a sum of ΔW, which no sum of factors is")
    # The coefficients that were found hold all that is to be done with norms.
    return refined, replace(run, method="svd", normalize="none")


def _say_time(seconds: float) -> None:
    console.say(f"refining takes about {console.duration(seconds)} at most")


def _weighted(
    bank: Path, weights: Sequence[str], out: Path, arguments: dict[str, Any]
) -> tuple[Bank, list[Job]]:
    """A job with the user's own coefficients."""
    import numpy as np

    from lorameta_rs.cli.weights import check_modules, read_weights
    from lorameta_rs.coefficients import explicit
    from lorameta_rs.merge import Job

    given, modules = read_weights(weights)
    opened = options.bank_from(bank, arguments)
    opened.require(given)
    console.report(opened)
    if not modules:
        return opened, [Job(explicit(opened.names, {n: c for n, (c,) in given.items()}), out)]
    check_modules(weights[0], modules, opened)
    columns = [
        explicit(opened.names, {name: row[i] for name, row in given.items()}, all_zero=True)
        for i in range(len(modules))
    ]
    return opened, [Job(np.stack(columns, axis=1), out, modules=modules)]
