"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorameta_rs.bank import Bank
    from lorameta_rs.ranking import Settings

    Command = Callable[..., Any]

# The names are those of `distance.METRICS`, `coefficients.PIPELINES` and `merge`, whose import
# would load numpy; a test compares them.
METRICS = ("js", "kl", "wasserstein", "mmd", "cosine", "relations", "vectors")
OF_PARTS = METRICS[:5]
PARTS = ("definition", "input", "answer", "bigrams")
METRIC = "relations,mmd"
PIPELINES = ("normalized", "attentional", "nearest", "uniform", "neural", "ridge", "simplex")
SPARSE = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
METHODS = ("auto", "soup", "svd", "cat", "linear", *SPARSE, *(f"{name}_svd" for name in SPARSE))
MAJORITIES = ("total", "frequency")
NORMALIZATIONS = ("none", "unit")
DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("peft", "gguf", "mlx")
PROTOCOLS = ("loo", "lofo")
CONVERTED = ("f32", "f16", "bf16", "q8_0")


class _Path(click.Path):
    """A path; nothing at all, as a shell makes of `"$UNSET"`, is none, and not this folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        return super().convert(value, param, ctx) if value else self.fail("it is empty", param, ctx)


# Whether it can be read is the library's to say, with status 1.
PATH = _Path(path_type=Path, readable=False)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
threads = click.option(
    "--threads",
    type=click.IntRange(0, 1024),
    default=0,
    help="Worker threads; 0 for one or two a core, as the job wants.",
)


tokenizer = click.option(
    "--tokenizer",
    type=PATH,
    metavar="FILE",
    help="The base model's tokenizer.json; without it, the base's own is used.",
)
most_tokens = click.option(
    "--most-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="The longest answer.",
)
base_config = click.option(
    "--base-config",
    type=PATH,
    metavar="PATH",
    help="The base model's config.json, its folder, or its GGUF file: for gguf, where neither "
    "bank.toml nor the adapter says what the base is; for kohya's names its safetensors.",
)


class Columns(click.ParamType[tuple[str, ...]]):
    """Names of fields, separated by commas."""

    name = "NAME,…"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The names as a tuple."""
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(","))
        if not all(names):
            self.fail(f"{value!r}: expected names separated by commas", param, ctx)
        return names


class Metrics(click.ParamType[str]):
    """Names of metrics, separated by commas."""

    name = "METRIC,…"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The names, without blanks."""
        names = [name.strip() for name in value.split(",")]
        known = {*METRICS, *(f"{name}:{part}" for name in OF_PARTS for part in PARTS)}
        for name in names:
            if name not in known or names.count(name) > 1:
                expected = f"expected some of {', '.join(METRICS)}; or of a part, as js:answer"
                self.fail(f"{value!r}: {expected}", param, ctx)
        return ",".join(names)


def bank(function: Command) -> Command:
    """Which members a bank has."""
    for decorate in (
        click.option(
            "--base-model",
            metavar="NAME",
            help="The members' base model; `any` takes members of all. By default what "
            "bank.toml says, or else what most members say.",
        ),
        click.option(
            "--exclude", metavar="PATTERN", multiple=True, help="Leave members out, by name."
        ),
        click.option(
            "--drop-unsupported",
            is_flag=True,
            help="Take A and B alone of members that have more: DoRA, biases, whole weights.",
        ),
        click.option(
            "--base-weights",
            type=PATH,
            help="The base's safetensors or their folder: take DoRA members, which change them.",
        ),
        click.option(
            "--fingerprints",
            type=PATH,
            metavar="DIR",
            help="Keep fingerprints there, for a bank that cannot be written to.",
        ),
    ):
        function = decorate(function)
    return function


def columns(whose: str) -> Callable[[Command], Command]:
    """Which fields of certain datasets to use; `whose` says of which."""
    text = f"The fields of {whose} to use, the answer last; they are joined by newlines."
    return click.option("--columns", type=Columns(), help=text)


def settings(function: Command) -> Command:
    """How distances become coefficients."""
    for decorate in (
        click.option(
            "--scale",
            type=float,
            default=1.0,
            show_default=True,
            help="What coefficients are multiplied with at last.",
        ),
        click.option("--min-similarity", type=float, help="Keep members at least this similar."),
        click.option("--mass", type=float, help="Keep the largest that hold this share."),
        click.option("--top-k", type=int, help="Keep this many of the largest coefficients."),
        click.option(
            "--temperature", type=float, default=1.0, show_default=True, help="τ of `normalized`."
        ),
        click.option(
            "--pipeline",
            type=click.Choice(PIPELINES),
            default=PIPELINES[0],
            show_default=True,
            help="How distances become coefficients. `calibrate` has to learn the last three.",
        ),
        click.option(
            "--metric",
            type=Metrics(),
            default=METRIC,
            show_default=True,
            help="How datasets are compared: js, kl, wasserstein, mmd, cosine; these of a part "
            "alone, as js:answer (or definition, input, bigrams); relations; vectors. The "
            "distances of several are added up, in standard deviations.",
        ),
        click.option(
            "--paper",
            is_flag=True,
            help="The paper's setting: metric js, factors summed apart.",
        ),
    ):
        function = decorate(function)
    return function


vectors = click.option(
    "--vectors",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="A vector for each member, and for DATASET, by name (npz or safetensors), for the metric "
    "`vectors`; may be repeated.",
)
calibration = click.option(
    "--calibration/--no-calibration",
    default=True,
    show_default=True,
    help="Use what `calibrate` chose for BANK, where no setting is given by hand.",
)
SETTINGS = ("metric", "pipeline", "temperature", "top_k", "mass", "min_similarity", "scale")
BANK = ("base_model", "exclude", "fingerprints", "drop_unsupported", "base_weights")


PAPER = {
    "metric": "js",
    "temperature": 1.0,
    "method": "soup",
    "normalize": "none",
}


def as_paper(context: click.Context, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with those of the paper in their place, if that was asked for."""
    if not arguments.pop("paper"):
        return arguments
    settled = {name: value for name, value in PAPER.items() if name in arguments}
    refuse(context, tuple(settled), "--paper")
    return arguments | settled


def refuse(context: click.Context, names: Sequence[str], other: str, word: str = "beside") -> None:
    """Options that would have no effect, `beside` or `without` another, are no options."""
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} has no effect {word} {other}")


def settings_from(arguments: dict[str, Any]) -> Settings:
    """The settings among a command's arguments."""
    from lorameta_rs.ranking import Settings

    return Settings(**{name: arguments[name] for name in SETTINGS})


def bank_from(
    folder: Path, arguments: dict[str, Any], columns: tuple[str, ...] | None = None
) -> Bank:
    """The bank in `folder`, as a command's arguments want it; `columns` are its own datasets'."""
    from lorameta_rs.bank import Bank

    return Bank(folder, columns=columns, **{name: arguments[name] for name in BANK})
