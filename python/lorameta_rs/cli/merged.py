"""What `merge` says of its work, in words or as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorameta_rs.cli import console
from lorameta_rs.cli.rank import HEADERS, described, rows, say_relevance
from lorameta_rs.member import Member, open_members
from lorameta_rs.merge import written_to
from lorameta_rs.modules import lacking
from lorameta_rs.runtimes import commands, gguf_conversion
from lorameta_rs.servers import breaches, refusing
from lorameta_rs.sums import used_members

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorameta_rs._core import Outcome
    from lorameta_rs.bank import Bank
    from lorameta_rs.merge import Job, Merged, Options

_SHOWN = 8


def say_jobs(jobs: Sequence[Job]) -> None:
    """The nearest members of each job that a dataset chose, and how near they are."""
    for job in jobs:
        if len(jobs) > 1:
            console.say(f"{job.dataset} → {job.out}")
        if job.ranking is not None:
            console.table(HEADERS, rows(job.ranking, _SHOWN))
            say_relevance(job.ranking)


def say_done(bank: Bank, jobs: Sequence[Job], done: Merged, run: Options, dry_run: bool) -> None:
    """What was read and written, or would be; who loads it, and how."""
    count = len(used_members(bank, jobs))
    read = f"{console.size(done.plan.bytes)} of {console.number(count, 'adapter')}"
    memory = memory_of(done)
    if done.index_bytes:
        read += f", once {console.size(done.index_bytes)} of them are indexed,"
    if done.reason is not None:
        console.say(f"method {done.method}: {done.reason}")
    if dry_run:
        console.say(f"would read {read} with {memory}; nothing was written")
        return
    console.say(f"read {read} with {memory}")
    for job, outcome in zip(jobs, done.outcomes, strict=True):
        console.say(f"wrote {job.out}{_rank_of(outcome)}")
    _say_use(bank, jobs, run)


def say_lacking(bank: Bank, jobs: Sequence[Job]) -> None:
    """Which of the members that take part change fewer modules than others of them."""
    if (odd := lacking(used_members(bank, jobs))) is not None:
        console.warn(odd)


def memory_of(done: Merged) -> str:
    """What a merge takes while it runs."""
    return (
        f"{console.size(done.plan.memory)} of buffers and mapped pages, "
        f"{console.number(done.plan.threads, 'thread')}"
    )


def _say_use(bank: Bank, jobs: Sequence[Job], run: Options) -> None:
    """Which servers refuse the results or take them otherwise, and how to run the first."""
    results = _served(jobs, run)
    # Results of one bank mostly break the same rules: each is said once.
    for breach in dict.fromkeys(breach for result in results for breach in breaches(result)):
        console.say(breach)
    base = results[0].config.base_model_name_or_path if results else bank.base_model
    rank = max(results[0].ranks) if results else 0
    ruled_out = refusing(results[0]) if results else set()
    gguf = None if run.base is None else run.base.gguf
    for to, out in written_to(jobs[0].out, run.formats).items():
        name = jobs[0].out.absolute().name
        for runtime, line in commands(to, base, out, rank, gguf, name).items():
            if to != "peft" or runtime not in ruled_out:
                console.say(f"{runtime}: {line}")
    if results and "gguf" not in run.formats:
        console.say(f"llama.cpp: {gguf_conversion(results[0].folder)}")


def _served(jobs: Sequence[Job], run: Options) -> list[Member]:
    """The PEFT adapters that were written, which servers may load."""
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


def as_data(bank: Bank, jobs: Sequence[Job], done: Merged, run: Options) -> dict[str, Any]:
    """All of that, for `--json`."""
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
    plan["index_bytes"] = done.index_bytes
    chosen = {
        "method": done.method,
        "reason": done.reason,
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
    about = {"refined": job.refined, **described(job.ranking)}
    return {"out": str(job.out), "dataset": str(job.dataset), **about}
